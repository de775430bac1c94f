"""The shapes that are measured, with random weights: speed does not depend on their values.

This file needs torch and transformers alone, so that it also runs in the environments of the peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@dataclass(frozen=True)
class Shape:
    """A model and its batches.   make() -> float model, eval mode; batch(seed) -> what it takes.

    head       the last layer, which stays float;   optimizer  "adamw" or "sgd", of a training step
    folded     the float model runs folded (see `fold`);   judged  whether the bars speak of this shape"""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    head: str = "classifier"
    optimizer: str = "adamw"
    folded: bool = False
    judged: bool = False


def _bert(layers: int, width: int, heads: int, vocabulary: int, labels: int = 9) -> nn.Module:
    """Without dropout: drawing its masks takes as long for everyone, and tells nothing."""
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = labels
    torch.manual_seed(0)
    return BertForTokenClassification(config).eval()


def _llama(layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    """Gated units of 8/3 times the width; the vocabulary is small, so that the head has the share that it has in a Llama of 7 billion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=-(-8 * width // 3 // 128) * 128, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def _tokens(count: int, length: int, vocabulary: int) -> Callable[[int], dict[str, Tensor]]:
    def batch(seed: int) -> dict[str, Tensor]:
        ids = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    return batch


def _ids(count: int, length: int, vocabulary: int) -> Callable[[int], dict[str, Tensor]]:
    tokens = _tokens(count, length, vocabulary)
    return lambda seed: {"input_ids": tokens(seed)["input_ids"]}


def _images(count: int, size: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class ConvNorm(nn.Module):
    """Convolution and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """Two 3x3 (the first with the stride), and the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(inputs, width, 3, stride), ConvNorm(width, width, 3)
        plain = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if plain else ConvNorm(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1, and the shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = ConvNorm(inputs, width, 1), ConvNorm(width, width, 3, stride)
        self.c = ConvNorm(width, 4 * width, 1)
        plain = stride == 1 and inputs == 4 * width
        self.shortcut = nn.Identity() if plain else ConvNorm(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return torch.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet with bottlenecks (v1.5: the 3x3 convolution has the stride).   x (B, 3, H, W) -> logits (B, classes).

    small  for images of 32x32: blocks of two 3x3 convolutions, and a stem of one with stride 1 and no pooling
    Reference: He et al. 2016; ResNet-50 is `ResNet((3, 4, 6, 3))`, ResNet-18 for CIFAR-10 `ResNet((2, 2, 2, 2), 64, 10, small=True)`."""

    def __init__(self, blocks: tuple[int, ...], width: int = 64, classes: int = 1000, small: bool = False) -> None:
        super().__init__()
        self.stem = ConvNorm(3, width, 3) if small else ConvNorm(3, width, 7, 2)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        stages, inputs = [], width
        for number, count in enumerate(blocks):
            for index in range(count):
                kind, stride = Block if small else Bottleneck, 2 if number and not index else 1
                stages.append(kind(inputs, width << number, stride))
                inputs = (1 if small else 4) * (width << number)
        self.blocks, self.average = nn.Sequential(*stages), nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu(self.stem(x))))
        return self.head(torch.flatten(self.average(x), 1))


def _resnet(
    blocks: tuple[int, ...], width: int, size: int, count: int = 8, classes: int = 1000, small: bool = False
) -> nn.Module:
    """With the statistics of one random batch: activations of every layer have the spread of a trained network's."""
    torch.manual_seed(0)
    model = ResNet(blocks, width, classes, small)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(_images(count, size)(99))
    return model.eval()


def fold(model: nn.Module) -> nn.Module:
    """BatchNorm folded into the convolution before it, in place: the float contestants are folded as the integer ones are."""
    for module in model.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)  # type: ignore[type-var]
            module.norm = nn.Identity()
    return model


def inference_shapes(quick: bool) -> dict[str, Shape]:
    """What the speed bars speak of; quick: the same layers, small."""
    if quick:
        bert = Shape("BERT, 1 layer of 64, batch 2 x 16", lambda: _bert(1, 64, 2, 100), _tokens(2, 16, 100))
        net = Shape("ResNet, 2 blocks, batch 2 x 32x32", lambda: _resnet((1, 1), 8, 32, 2), _images(2, 32), folded=True)
        return {"bert": bert, "resnet": net}
    bert = Shape("BERT-base, batch 8 x 128", lambda: _bert(12, 768, 12, 30522), _tokens(8, 128, 30522), judged=True)
    net = Shape("ResNet-50, batch 8 x 224x224", lambda: _resnet((3, 4, 6, 3), 64, 224), _images(8, 224),
                folded=True, judged=True)  # fmt: skip
    return {"bert": bert, "resnet": net}


def training_shapes(quick: bool) -> dict[str, Shape]:
    """What the price of a step is measured on; quick: the same layers, small."""
    if quick:
        bert = Shape("BERT, 1 layer of 128, batch 2 x 16", lambda: _bert(1, 128, 2, 100), _tokens(2, 16, 100))
        llama = Shape(
            "Llama, 1 layer of 128, batch 2 x 16", lambda: _llama(1, 128, 2, 100), _ids(2, 16, 100), "lm_head"
        )
        net = Shape("ResNet, 2 blocks, batch 4 x 16x16", lambda: _resnet((1, 1), 16, 16, 4, 10, small=True),
                    _images(4, 16), "head", "sgd")  # fmt: skip
        return {"bert": bert, "llama": llama, "resnet": net}
    bert = Shape("BERT, 4 layers of 768, batch 8 x 128", lambda: _bert(4, 768, 12, 30522), _tokens(8, 128, 30522),
                 judged=True)  # fmt: skip
    llama = Shape("Llama, 8 layers of 512, batch 4 x 256", lambda: _llama(8, 512, 8, 4096), _ids(4, 256, 4096), "lm_head",
                  judged=True)  # fmt: skip
    net = Shape("ResNet-18, batch 64 x 32x32", lambda: _resnet((2, 2, 2, 2), 64, 32, 64, 10, small=True),
                _images(64, 32), "head", "sgd", judged=True)  # fmt: skip
    return {"bert": bert, "llama": llama, "resnet": net}
