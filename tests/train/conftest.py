"""Small prepared models and data for training tests: made anew for each call, the same each time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qatana as qt


class ConvNet(nn.Module):
    """Convolution, BatchNorm, ReLU, pooling, a residual add and a classifier on (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)) + x)
        return self.head(self.pool(x).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4)
    )


def image_batches(count: int = 5, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, 8, 8, generator=draw), torch.randint(0, 4, (size,), generator=draw)) for _ in range(count)
    ]


def vector_batches(count: int = 5, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 128, generator=draw), torch.randint(0, 4, (size,), generator=draw)) for _ in range(count)
    ]


def prepared_cnn(calibrated: bool = True) -> nn.Module:
    torch.manual_seed(3)
    model = ConvNet().eval()
    with torch.no_grad():  # statistics as of some training
        model.train()
        for x, _ in image_batches():
            model(x)
        model.eval()
    model = qt.prepare(model, qt.plan(model, "ort:int8", image_batches()[0][0]))
    return qt.calibrate(model, image_batches()) if calibrated else model


def prepared_mlp(target: str = "ort:int2", calibrated: bool = True) -> nn.Module:
    torch.manual_seed(4)
    model = mlp()
    model = qt.prepare(model, qt.plan(model, target, vector_batches()[0][0]))
    return qt.calibrate(model, vector_batches()) if calibrated else model


@pytest.fixture
def cnn() -> Callable[..., nn.Module]:
    """Makes an int8 ConvNet."""
    return prepared_cnn


@pytest.fixture
def two_bits() -> Callable[..., nn.Module]:
    """Makes an MLP of 2-bit weights in blocks, whose scales are learned."""
    return prepared_mlp


@pytest.fixture
def images() -> list[tuple[Tensor, Tensor]]:
    return image_batches()


@pytest.fixture
def vectors() -> list[tuple[Tensor, Tensor]]:
    return vector_batches()
