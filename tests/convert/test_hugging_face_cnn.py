"""A convolutional Hugging Face model: captured as a graph by default, and its in-place residual adds converted either way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import qatana as qt

pytestmark = pytest.mark.engine


def resnet() -> nn.Module:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic", num_labels=5,
        downsample_in_first_stage=False,
    )  # fmt: skip
    model = ResNetForImageClassification(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize(("mode", "convolutions", "sums"), [(None, 8, 3), ("modules", 0, 0)])
def test_a_resnet_of_transformers_is_exact(mode: str | None, convolutions: int, sums: int, tmp_path: Path) -> None:
    """3 blocks of two convolutions, a stem and one shortcut; its forward adds the residual in place."""
    model, images = resnet(), torch.randn(8, 3, 32, 32)
    plan = qt.plan(model, "ort:int8", {"pixel_values": images[:2]}, mode=mode)
    assert plan.mode == (mode or "graph")
    model = qt.prepare(model, plan)
    qt.calibrate(model, [{"pixel_values": images}])
    artifact = qt.convert(model)
    file = qt.export(artifact, tmp_path / "resnet.onnx")
    certificate = qt.verify(model, artifact, file, [{"pixel_values": images}]).raise_on_difference()
    assert certificate.parity["codes_different"] == 0
    assert certificate.parity["codes_compared"] > 0
    assert (certificate.kernels.get("QLinearConv", 0), certificate.kernels.get("QLinearAdd", 0)) == (convolutions, sums)
