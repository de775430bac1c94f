"""A target of your own: what your deployment computes, as a change to one that exists. Recipes and job files find it by name.

    python examples/own_target.py
"""

import torch
from torch import nn

import qatana as qt


@qt.register_target("npu:w4a8", base="ort:int8")
def npu() -> dict:
    """4-bit weights per channel, 8-bit activations, no integer sums."""
    return {
        ("linear", "weight"): "int4n/channel sym dynamic",
        ("conv", "weight"): "int4n/channel sym dynamic",
        ("add", "input"): None,
        ("add", "output"): None,
    }


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
images = torch.randn(64, 1, 8, 8)
plan = qt.plan(model, qt.recipe("npu:w4a8").skip("4"), images[:2])
print(plan)
model = qt.calibrate(qt.prepare(model, plan), [images])
artifact = qt.convert(model)
print(artifact.target, "equal:", torch.equal(artifact(images), model.eval()(images)))
