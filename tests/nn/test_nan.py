"""Codes have no NaN; a layer on codes hands one on all the same, so that a loss and whoever watches it sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatana as qt
from qatana.quantizer import Quantizer


class Attended(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from qatana.nn.attention import AttentionProducts

        self.products: Any = AttentionProducts("onnxruntime")
        for role in ("query", "key", "probability", "value", "context"):
            fixed = (1 / 255, 0) if role == "probability" else (0.02, 128)
            quantizer = Quantizer(qt.scheme("uint8", symmetric=False, fixed=fixed), name=role)
            quantizer.enabled = True
            setattr(self.products, f"{role}_quantizer", quantizer)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.a(x)))
        return torch.relu(y + self.b(y))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["linear", "convolutions"])
@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_comes_out(training: bool, name: str, where: str) -> None:
    torch.manual_seed(0)
    model, x = (nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 8)) if name == "linear" else (
        Residual(), torch.randn(2, 3, 6, 6)
    )  # fmt: skip
    model = qt.prepare(model, qt.plan(model, qt.recipe("ort:int8"), x))
    qt.calibrate(model, [x])
    model.train(training)
    assert torch.isfinite(model(x)).all()
    if where == "input":
        x.view(-1)[3] = torch.nan
    else:
        next(p for p in model.parameters() if p.ndim > 1).data.view(-1)[3] = torch.nan
    assert model(x).isnan().any()


@pytest.mark.parametrize("position", range(3))
def test_nan_comes_out_of_attention(position: int) -> None:
    torch.manual_seed(0)
    products = Attended().products
    operands = [torch.randn(1, 2, 5, 8) for _ in range(3)]
    assert torch.isfinite(products(*operands, None, 1.0)).all()
    operands[position][0, 0, 0, 0] = torch.nan
    assert products(*operands, None, 1.0).isnan().any()
