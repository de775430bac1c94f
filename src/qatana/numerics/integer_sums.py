"""Exact sums of products of int8 codes, by whatever kernel the device has.

    sum[m, n] = sum over k of a[m, k] * b[n, k]
The kernels differ in speed alone: integers have one sum, which is a test. `choose` takes the first of `KERNELS` that is exact for a shape;
`prefer` overrides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qatana.errors import SchemeError, nearest
from qatana.numerics.fused import sweep
from qatana.numerics.workspace import buffer

MOST = 128
"""The largest |code|."""
LEVEL = 255
"""The largest |code - zero point|."""
EXACT_FLOAT, EXACT_INT = 2**24, 2**31
"""Below these every sum of integers is exact in float32 and in int32, in whatever order."""


def _int_mm(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    out = buffer("sum", (a.shape[0], b.shape[0]), torch.int32, a.device) if out is None else out
    return torch.ops.aten._int_mm.out(_plain(a), _plain(b.t()), out=out)


def _plain(a: Tensor) -> Tensor:
    """a; one row or column with the strides of a contiguous tensor: of others torch 2.13 reads wrong numbers, without a word."""
    return a.reshape(-1).view(a.shape) if 1 in a.shape else a


def _bfloat16(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _into(out, torch.mm(a.bfloat16(), b.bfloat16().t(), out_dtype=torch.float32))


def _float32(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _into(out, F.linear(a.float(), b.float()))


def _float64(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    return _into(out, F.linear(a.double(), b.double()))


def _into(out: Tensor | None, total: Tensor) -> Tensor:
    return total if out is None else out.copy_(total)


@lru_cache(maxsize=8)
def _int_mm_is_exact(device: torch.device) -> bool:
    """Whether the device's int8 product keeps sums of the largest products: processors without VNNI add pairs in 16 bits, which
    saturates. Tried once on rows of extreme codes."""
    rows = torch.tensor([[-128, -128], [-128, 127], [127, -128], [127, 127]], dtype=torch.int8).repeat(8, 32)
    expected = rows.long() @ rows.long().t()
    on_device = rows.to(device)
    return torch.equal(torch.ops.aten._int_mm(on_device, on_device.t()).cpu().long(), expected)


def _int_mm_takes(m: int, n: int, k: int, device: torch.device) -> bool:
    if device.type == "cuda" and (m <= 16 or n % 8 or k % 8):
        return False
    return device.type in ("cpu", "cuda") and k * MOST**2 < EXACT_INT and min(m, n, k) > 0 and _int_mm_is_exact(device)


def _float_takes(m: int, n: int, k: int, device: torch.device) -> bool:
    return k * MOST**2 < EXACT_FLOAT


class Kernel(NamedTuple):
    """run(a (M, K), b (N, K), out) -> (M, N), any dtype that holds the sums;   takes(m, n, k, device): exact there."""

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    takes: Callable[[int, int, int, torch.device], bool]


KERNELS: dict[str, Kernel] = {
    "int_mm": Kernel(_int_mm, _int_mm_takes),
    "bfloat16": Kernel(_bfloat16, lambda m, n, k, device: device.type == "cuda" and _float_takes(m, n, k, device)),
    "float32": Kernel(_float32, _float_takes),
    "float64": Kernel(_float64, lambda m, n, k, device: True),
}
"""The fastest first."""

_preferred: list[str] = []


@contextmanager
def prefer(kernel: str) -> Iterator[None]:
    """Use this kernel inside the block wherever it is exact: "int_mm", "bfloat16", "float32" or "float64"."""
    if kernel not in KERNELS:
        raise SchemeError(f"unknown kernel '{kernel}'{nearest(kernel, KERNELS)}")
    _preferred.append(kernel)
    try:
        yield
    finally:
        _preferred.pop()


def choose(m: int, n: int, k: int, device: torch.device) -> str:
    """The kernel for a product (M, K) x (N, K)."""
    return next(name for name in (*_preferred[-1:], *KERNELS) if KERNELS[name].takes(m, n, k, device))


def integer_sum(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (M, K) and b (N, K) int8 of any strides -> the exact sums (M, N): int32, float32 or float64; in `out` (int32) if given, else in
    memory that is good until the next call of this thread."""
    kernel = choose(a.shape[0], b.shape[0], a.shape[1], a.device)
    return KERNELS[kernel].run(a, b, out)


def exact_float(total: Tensor, out: Tensor | None = None) -> Tensor:
    """Integers as float32 (in `out`, if given), or as float64 where one of them is not below 2^24."""
    values = total if total.dtype == torch.float64 else total.float() if out is None else out.copy_(total)
    if not values.numel():
        return values.float()
    low, high = torch.aminmax(values)
    if bool(torch.maximum(high, -low) < EXACT_FLOAT):
        return values.float()
    return total.double()


def row_sums(codes: Tensor) -> Tensor:
    """Exact sums over all dimensions but the first, float64 (N,)."""
    flat = codes.flatten(1)
    dtype = torch.int32 if flat.shape[1] * MOST < EXACT_INT else torch.int64
    out = torch.empty((flat.shape[0], 1), dtype=dtype, device=codes.device)
    sweep(_row_sum, [out], [flat], dtype)
    return out.view(-1).double()


def _row_sum(codes: Tensor, dtype: torch.dtype) -> tuple[Tensor]:
    return (codes.sum(-1, keepdim=True, dtype=dtype),)


# -- convolutions ---------------------------------------------------------------------------------------------------------
class Geometry(NamedTuple):
    """Of a convolution, a number for each dimension of space."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def convolution_sum(x: Tensor, zero_point: Tensor, w: Tensor, g: Geometry) -> Tensor:
    """Exact sum of (x - zero_point) * w over a window, padded with zero_point:   x (B, C, *space) int8, w (N, C / groups, *kernel) int8
    -> (B, N, *space'), float32, or float64 where a sum is not below 2^24. 1-D or 2-D."""
    if w.ndim == 3:
        flat = Geometry([1, *g.stride], [0, *g.padding], [1, *g.dilation], g.groups)
        return convolution_sum(x.unsqueeze(2), zero_point, w.unsqueeze(2), flat).squeeze(2)
    bound = w[0].numel() * MOST * LEVEL
    if x.numel() and w.numel() and x.device.type == "cpu" and not _preferred and _onednn_is_exact():
        total = _onednn(x, int(zero_point), w, g)
        if bound < EXACT_FLOAT or _largest_sum(w) < EXACT_FLOAT or _below(total, EXACT_FLOAT):
            return total
        if g.groups == 1 and w.shape[1] > 1:
            half = w.shape[1] // 2
            parts = ((x[:, :half], w[:, :half]), (x[:, half:], w[:, half:]))
            return sum(convolution_sum(a, zero_point, b, g).double() for a, b in parts)  # type: ignore[return-value]
    dtype = torch.float32 if bound < EXACT_FLOAT else torch.float64
    levels = x.to(dtype) - zero_point.to(dtype)
    return F.conv2d(levels, w.to(dtype), None, *g)


def _largest_sum(w: Tensor) -> int:
    """No sum exceeds this: the largest level times the largest sum of |w| of an output.   w (N, *any) int8
    Most weights are far below 128, and asking them takes less than asking every sum."""
    sums = torch.empty((w.shape[0], 1), dtype=torch.int32, device=w.device)
    sweep(_row_magnitude, [sums], [w.flatten(1)])
    return LEVEL * int(sums.amax())


def _row_magnitude(w: Tensor) -> tuple[Tensor]:
    return (w.to(torch.int32).abs().sum(-1, keepdim=True, dtype=torch.int32),)


def _below(total: Tensor, limit: int) -> bool:
    low, high = torch.aminmax(total)
    return bool(torch.maximum(high, -low) < limit)


def _onednn(x: Tensor, zero_point: int, w: Tensor, g: Geometry) -> Tensor:
    """oneDNN's int8 convolution with scales of 1: the int32 sum as float32, exact below 2^24. Unsigned activations: signed ones take a
    reference kernel, a thousand times slower."""
    count, ops = w.shape[0], torch.ops.onednn
    one, zero = _constants(count)
    packed = ops.qconv_prepack(w.contiguous(), one, 1.0, 0, g.stride, g.padding, g.dilation, g.groups, list(x.shape))
    unsigned = torch.bitwise_xor(x, -128).view(torch.uint8)
    head = (unsigned, 1.0, zero_point + 128, packed, one, zero, None)
    return ops.qconv2d_pointwise(*head, *g, 1.0, 0, torch.float32, "none", [], "")


@lru_cache(maxsize=64)
def _constants(count: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points of weights: 1 and 0."""
    return torch.ones(count), torch.zeros(count, dtype=torch.int32)


@lru_cache(maxsize=1)
def _onednn_is_exact() -> bool:
    """Whether oneDNN's int8 convolution is there and keeps sums of the largest products: tried once, as `_int_mm_is_exact`."""
    if not hasattr(torch.ops.onednn, "qconv2d_pointwise"):
        return False
    extremes = torch.tensor([-128, 127], dtype=torch.int8)
    x = extremes.repeat(1, 32, 5, 3)[..., :5].contiguous()
    w = torch.stack(
        [extremes.repeat(288), extremes.flip(0).repeat(288), extremes[:1].expand(576), extremes[1:].expand(576)]
    )
    w = w.view(4, 64, 3, 3)[:, :32].contiguous()
    plain = Geometry([1, 1], [1, 1], [1, 1], 1)
    try:
        found = _onednn(x, 127, w, plain)
    except (RuntimeError, TypeError):
        return False
    return torch.equal(found.double(), F.conv2d(x.double() - 127, w.double(), None, *plain))
