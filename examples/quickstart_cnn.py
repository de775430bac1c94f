"""From a float CNN to a proven int8 file, with your own training loop: random images stand for your data.

    python examples/quickstart_cnn.py [FILE.onnx]
"""

import sys

import torch
import torch.nn.functional as F
from models import resnet20

import qatana as qt

file = sys.argv[1] if len(sys.argv) > 1 else "quickstart-cnn.onnx"
torch.manual_seed(0)
model = resnet20().eval()
batches = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(4)]

plan = qt.plan(model, "ort:int8", batches[0][0])            # captures the graph: folds BatchNorm, finds residual adds
print(str(plan).splitlines()[-1])
model = qt.prepare(model, plan)
qt.calibrate(model, batches)

controller = qt.Controller(model, total_steps=len(batches))
optimizer = torch.optim.SGD(qt.parameter_groups(model, lr=1e-3, weight_decay=1e-4), lr=1e-3, momentum=0.9)
model.train()
for images, labels in batches:
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    controller.step()                                       # freezes ranges and BatchNorm statistics on schedule
    print(f"loss {loss.item():.3f}")
model.eval()

artifact = qt.convert(model)
qt.export(artifact, file)
certificate = qt.verify(model, artifact, file, [images for images, _ in batches])
print(certificate)
certificate.raise_on_difference()
