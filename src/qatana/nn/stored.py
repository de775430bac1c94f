"""Layers of a converted model on the free target: the weight is codes and the scales that read them back, in any format; inputs,
outputs, keys and values are quantized as in training. Every layer computes what its QAT layer computed, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatana.numerics import Scheme, products
from qatana.numerics.stored import Packed, read_back, read_back_rows, read_levels, reads_rows
from qatana.quantizer import Quantizer


class StoredWeight(nn.Module):
    """A weight as `store` packed it. Calling it gives the weight of `shape` in the dtype that it was trained in."""

    codes: Tensor

    def __init__(self, stored: Packed, scheme: Scheme, weight: Tensor, name: str) -> None:
        super().__init__()
        self.register_buffer("codes", stored.codes)
        for key, value in zip(("scale", "offset"), stored.parameters, strict=False):
            self.register_buffer(key, value)
        self.scale_shape = scheme.granularity.scale_shape(tuple(weight.shape))
        self.scheme, self.shape, self.name, self.dtype = scheme.text, list(weight.shape), name, weight.dtype
        self.reads_rows, self.by_rows = reads_rows(scheme, weight.shape), products.goes_by_rows(scheme, True)

    def extra_repr(self) -> str:
        return f"{self.scheme}, {tuple(self.shape)}"

    @property
    def device(self) -> torch.device:
        """Models ask a layer's weight for its place and dtype, to bring inputs there."""
        return self.codes.device

    def forward(self) -> Tensor:
        return read_back(self.codes, self._parameters_of(), self.scheme, self.shape, self.name).to(self.dtype)

    def levels(self) -> tuple[Tensor, Tensor]:
        """Levels int8 (N, K) and their scales float32, one per row or block of a row."""
        scale, wanted = self.get_buffer("scale").float(), self.scale_shape
        scale = scale.expand(wanted) if scale.numel() == 1 else scale.reshape(wanted)
        return read_levels(self.codes, self.scheme, self.shape), scale

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table: ids (*shape) -> (*shape, D). Only they are read, where their codes lie together."""
        if not self.reads_rows:
            return F.embedding(ids, self())
        return read_back_rows(ids, self.codes, self._parameters_of(), self.scheme, self.shape, self.name).to(self.dtype)

    def _parameters_of(self) -> list[Tensor]:
        return [v for k, v in self.named_buffers() if k != "codes"]


class StoredLinear(nn.Module):
    """y = x W^T + b.   x (*batch, K) -> (*batch, N)."""

    bias: Tensor | None

    def __init__(self, weight: StoredWeight, bias: Tensor | None, x: Quantizer | None, y: Quantizer | None) -> None:
        super().__init__()
        self.weight, self.x, self.y = weight, x, y
        self.out_features, self.in_features = weight.shape
        self.register_buffer("bias", bias)

    @property
    def by_rows(self) -> bool:
        """Whether the QAT layer multiplied integers, by its schemes."""
        x, w = self.x, self.weight
        return x is not None and x.enabled and x.by_rows and w.by_rows and w.dtype == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if self.by_rows:
            assert self.x is not None
            y = products.linear_of_levels(self.x.encode(x), *self.weight.levels(), self.bias)
        else:
            y = F.linear(x if self.x is None else self.x(x), self.weight(), self.bias)
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
        return self.weight.rows(ids)
