"""Exact integer sums on float hardware.

A product sum of integer-valued float32 operands is exact, in whatever order it is added, while sum |a * w| < 2^24. The helpers bound
that sum (first by the formats, then by the weights themselves) and fall back to float64 (exact below 2^53), so the accumulator
always equals the engine's int32. Gradients flow through as for the float operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EXACT = 2**24


def linear(levels: Tensor, weight: Tensor, bound: int) -> Tensor:
    """acc = levels @ weight^T.   levels (*batch, K) with |level| <= bound; weight (N, K). float32, or float64 where needed."""
    if not _weight_fits(weight, bound):
        return F.linear(levels.double(), weight.double())
    return F.linear(levels, weight)


def conv(
    levels: Tensor, weight: Tensor, bound: int, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """acc = conv(levels, weight); padding adds level 0, that is the zero point. 1-D or 2-D by the weight's rank."""
    convolve = F.conv1d if weight.ndim == 3 else F.conv2d
    if not _weight_fits(weight, bound):
        levels, weight = levels.double(), weight.double()
    return convolve(levels, weight, None, list(stride), list(padding), list(dilation), groups)


def matmul(a: Tensor, b: Tensor, bound_a: int, bound_b: int) -> Tensor:
    """acc = a @ b for two activations of levels |a| <= bound_a, |b| <= bound_b."""
    if a.shape[-1] * bound_a * bound_b >= EXACT and int(a.detach().abs().sum(-1).max()) * bound_b >= EXACT:
        return torch.matmul(a.double(), b.double())
    return torch.matmul(a, b)


def _weight_fits(weight: Tensor, bound: int) -> bool:
    rows = weight.detach().flatten(1)
    return rows.shape[1] * bound * 128 < EXACT or (rows.numel() == 0 or int(rows.abs().sum(1).max()) * bound < EXACT)
