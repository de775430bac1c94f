"""A number format of your own: powers of two, which hardware multiplies by shifting. Named in a recipe, trained, packed, proven.

    python examples/own_format.py
"""

import tempfile

import torch
from torch import nn

import qatana as qt


@qt.register_format
def powers() -> list[float]:
    """Codes 0 to 15: 1, 1/2 ... 1/128, then the negatives. Without 0: the smallest value stands for it."""
    sizes = [2.0**-i for i in range(8)]
    return sizes + [-size for size in sizes]


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
x, y = torch.randn(256, 64), torch.randint(0, 4, (256,))
batches = [{"input": a, "labels": b} for a, b in zip(x.split(32), y.split(32), strict=True)]

recipe = qt.recipe("torch", weight="powers/group32", input="int8/token")
model = qt.ptq(model, recipe, [b["input"] for b in batches])
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(40):
    batch = batches[step % len(batches)]
    loss = nn.functional.cross_entropy(model.train()(batch["input"]), batch["labels"])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

artifact = qt.convert(model.eval())
with tempfile.TemporaryDirectory() as folder:
    artifact.save(folder + "/artifact")                    # 4 bits a weight
    print(qt.verify(model, artifact, folder + "/artifact", [x[:32]]).raise_on_difference())
