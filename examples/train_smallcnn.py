"""Train the float SmallCNN on Fashion-MNIST: three epochs, about a minute on two idle cores.

python examples/train_smallcnn.py --data fashion-mnist   # Debian's package dataset-fashion-mnist, or a folder
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from models import SmallCNN
from safetensors.torch import save_file

from qatana.jobs.images import ImageBatches, load_images

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data", default="fashion-mnist")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights/smallcnn-fashion.safetensors")
args = parser.parse_args()

torch.manual_seed(0)
model, data, begin = SmallCNN(), load_images(args.data), time.perf_counter()
train, test = ImageBatches(data, "train", 128), ImageBatches(data, "test", 500)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4, nesterov=True)
for epoch in range(args.epochs):
    for step, (x, y) in enumerate(train.epoch(epoch)):
        # One cycle of the learning rate (Smith and Topin 2018): in a line up to 0.2, along half a cosine down to 0.
        progress = (epoch + step / len(train)) / args.epochs
        fall = 0.1 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))
        optimizer.param_groups[0]["lr"] = progress if progress < 0.2 else fall
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch + 1}/{args.epochs}: last loss {loss.item():.4f}", flush=True)
seconds = time.perf_counter() - begin

model.eval()
with torch.no_grad():
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in test)
accuracy = 100 * right / len(test.x)
print(f"test accuracy {accuracy:.2f} %")
save_file(model.state_dict(), args.out)
facts = {"epochs": args.epochs, "seconds": round(seconds), "test_accuracy": accuracy, "torch": torch.__version__}
args.out.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")
