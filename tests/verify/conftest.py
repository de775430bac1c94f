"""Deployed models to verify: a residual CNN and a two-layer BERT, small and with random weights, exported once per session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification

import qatana as qt

CLASSES = 5


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


class TinyResNet(nn.Module):
    """(B, 3, 8, 8) -> (B, CLASSES)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block, self.pool, self.head = Block(8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.bn(self.conv(x))))
        return self.head(torch.flatten(self.pool(x), 1))


@dataclass
class Deployed:
    """A QAT model with its artifact, its file and batches that it has not seen."""

    model: nn.Module
    artifact: qt.Artifact
    path: Path
    batches: list[Any]

    def verify(self, path: Path | None = None, **options: Any) -> qt.Certificate:
        return qt.verify(self.model, self.artifact, path or self.path, self.batches, **options)


def deploy(model: nn.Module, target: str, batches: list[Any], folder: Path) -> Deployed:
    """Calibrate on the first two batches, keep the others."""
    recipe = qt.recipe(target).skip("classifier")
    model = qt.prepare(model, qt.plan(model, recipe, batches[0]))
    qt.calibrate(model, batches[:2])
    artifact = qt.convert(model)
    return Deployed(model, artifact, qt.export(artifact, folder / f"{target.replace(':', '-')}.onnx"), batches[2:])


def bert_batches(count: int) -> list[dict[str, Tensor]]:
    """4 sentences of 5 to 8 tokens, padded to 8; the first token of a sentence has no label (-100)."""
    draw = torch.Generator().manual_seed(3)
    made = []
    for _ in range(count):
        ids = torch.randint(1, 64, (4, 8), generator=draw)
        mask = (torch.arange(8)[None] < torch.tensor([8, 7, 6, 5])[:, None]).long()
        labels = torch.randint(0, CLASSES, (4, 8), generator=draw)
        labels[:, 0] = -100
        made.append({"input_ids": ids * mask, "attention_mask": mask, "labels": labels})
    return made


def bert(seed: int = 0, layers: int = 2) -> nn.Module:
    """Weights wide enough (0.2) for activations that use their functions' curves."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16, num_labels=CLASSES, initializer_range=0.2,
    )  # fmt: skip
    return BertForTokenClassification(config).eval()


def resnet(seed: int = 0) -> nn.Module:
    """BatchNorm statistics as of some training."""
    torch.manual_seed(seed)
    model = TinyResNet().train()
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(16, 3, 8, 8))
    return model.eval()


@pytest.fixture(scope="session")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randn(16, 3, 8, 8, generator=draw), torch.zeros(16, dtype=torch.int64)) for _ in range(4)]
    return deploy(resnet(), "ort:int8", batches, tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="session")
def deployed_bert(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Deployed]:
    """BERT deployed for a target, of two blocks for int8 and one for the others; each target is exported once."""
    made: dict[str, Deployed] = {}

    def get(target: str) -> Deployed:
        if target not in made:
            made[target] = deploy(
                bert(layers=2 if target == "ort:int8" else 1), target, bert_batches(5), tmp_path_factory.mktemp("bert")
            )
        return made[target]

    return get


@pytest.fixture
def tampered(tmp_path: Path) -> Callable[..., Path]:
    """A copy of a file in which `change(array)` was applied to one initializer."""

    def tamper(path: Path, name: str, change: Callable[[Any], Any]) -> Path:
        model = onnx.load(str(path))
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))
        out = tmp_path / "tampered.onnx"
        onnx.save(model, str(out))
        return out

    return tamper
