"""Layers of a converted model on the free target: the weight is codes and the scales that read them back, in any format; inputs,
outputs, keys and values are quantized as in training. Every layer computes what its QAT layer computed, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatana.numerics import Scheme
from qatana.numerics.stored import Packed, read_back
from qatana.quantizer import Quantizer


class StoredWeight(nn.Module):
    """A weight as `store` packed it. Calling it gives the weight of `shape` in the dtype that it was trained in."""

    codes: Tensor

    def __init__(self, stored: Packed, scheme: Scheme, weight: Tensor, name: str) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes)
        for key, value in zip(("scale", "offset"), stored.parameters, strict=False):
            self.register_buffer(key, value)
        self.scheme, self.shape, self.name, self.dtype = scheme.text, list(weight.shape), name, weight.dtype

    def extra_repr(self) -> str:
        return f"{self.scheme}, {tuple(self.shape)}"

    @property
    def device(self) -> torch.device:
        """Models ask a layer's weight for its place and dtype, to bring inputs there."""
        return self.codes.device

    def forward(self) -> Tensor:
        parameters = [v for k, v in self.named_buffers() if k != "codes"]
        return read_back(self.codes, parameters, self.scheme, self.shape, self.name).to(self.dtype)


class StoredLinear(nn.Module):
    """y = x W^T + b.   x (*batch, K) -> (*batch, N)."""

    bias: Tensor | None

    def __init__(self, weight: StoredWeight, bias: Tensor | None, x: Quantizer | None, y: Quantizer | None) -> None:
        super().__init__()
        self.weight, self.x, self.y = weight, x, y
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.x is None else self.x(x)
        y = F.linear(x, self.weight(), self.bias)
        return y if self.y is None else self.y(y)


class StoredConv(nn.Module):
    """The folded convolution, and its ReLU.   x (B, C, *space) -> (B, N, *space')."""

    bias: Tensor | None

    def __init__(
        self, weight: StoredWeight, bias: Tensor | None, x: Quantizer | None, y: Quantizer | None, relu: bool,
        geometry: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight, self.x, self.y, self.relu, self.geometry = weight, x, y, relu, geometry
        self.kernel_size = tuple(weight.shape[2:])
        self.stride, self.padding, self.dilation, self.groups = geometry
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.x is None else self.x(x)
        weight = self.weight()
        convolve = F.conv1d if weight.ndim == 3 else F.conv2d
        y = convolve(x, weight, self.bias, *self.geometry)  # type: ignore[call-overload]
        y = y.relu() if self.relu else y
        return y if self.y is None else self.y(y)


class StoredEmbedding(nn.Module):
    """Rows of a table: ids (*shape) -> float32 (*shape, D)."""

    def __init__(self, weight: StoredWeight) -> None:
        super().__init__()
        self.weight = weight
        self.num_embeddings, self.embedding_dim = weight.shape

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight())
