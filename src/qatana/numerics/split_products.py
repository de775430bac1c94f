"""Products of floats with codes, in float32 accuracy, by integer products.

A gradient g is float32, the codes c that it multiplies are int8. A row of g becomes integers of 24 bits, which are three digits:

    s = max |g| / (127 * 2^16),   q = round(g / s),   q = 2^16 q_0 + 2^8 q_1 + q_2,   every q_i in [-128, 127]
    sum g c = s * (2^16 sum q_0 c + 2^8 sum q_1 c + sum q_2 c)            each sum exact in int32

An element is off by at most 2^-23 of the largest of its row, about what float32 itself leaves of that one; the sums add no error, where a
float32 product rounds each partial one. Three int8 products take less time than a float32 one where the processor has VNNI: its int8
instructions do four times as many multiply-adds.

Reference: Ozaki et al. 2012 (error-free splitting); Ootomo, Ozaki, Yokota 2024, DGEMM on integer matrix multiplication units."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.hardware import isa
from qatana.numerics.fused import sweep
from qatana.numerics.integer_sums import EXACT_INT, MOST, choose, integer_sum
from qatana.numerics.workspace import buffer

LARGEST = 127 * 2**16
"""Of |q|: its first digit stays in int8."""
SMALLEST = 2.0**-100
"""Rows below it count as this large: their elements below 2^-123 become 0."""
OFFSET = 128 * 2**8 + 128
"""q + OFFSET has digits without sign: q_0, q_1 + 128, q_2 + 128."""
WORTH = 2**27
"""Multiply-adds of a product from which the passes over its operands pay."""


def pays(m: int, n: int, k: int, device: torch.device) -> bool:
    """Whether g (M, N) times codes, summed over K, is faster this way, and exact: a rule of the processor and the shape alone, so that a
    training gives the same bits whenever it runs."""
    if device.type != "cpu" or isa() != "avx512vnni" or m * n * k < WORTH:
        return False
    return k * MOST * 3 * MOST < EXACT_INT and choose(m, n, k, device) == "int_mm"


def times_codes(g: Tensor, columns: Tensor | None, codes: Tensor) -> Tensor:
    """(g * columns) codes, float32 (M, N).   g (M, K) float32, columns (1, K) or None, codes (K, N) int8."""
    most = torch.empty((g.shape[0], 1), dtype=torch.float32, device=g.device)
    sweep(_largest, [most], [g, columns])
    sums = [integer_sum(digit, codes.t(), total) for digit, total in _digits(g, columns, most, codes.shape[1])]
    out = torch.empty((g.shape[0], codes.shape[1]), dtype=torch.float32, device=g.device)
    sweep(_joined, [out], [*sums, *(None,) * 3, most / LARGEST])
    return out


def transposed_times_levels(
    g: Tensor, rows: Tensor | None, codes: Tensor, zero_point: Tensor | None, scale: Tensor | None
) -> Tensor:
    """(g * rows)^T (codes - zero_point) * scale, float32 (K, N).   g (M, K) float32, rows (M, 1) or None, codes (M, N) int8;
    zero_point (an integer) and scale () or None: 0 and 1. Here it is the columns of g that become integers, each by its own largest."""
    g = g if rows is None else torch.mul(g, rows, out=buffer("rows scaled", g.shape, torch.float32, g.device))
    most = torch.maximum(g.amax(0), -g.amin(0)).clamp_(min=SMALLEST)
    found = _digits(g, None, most.view(1, -1), codes.shape[1], transposed=True)
    sums = [integer_sum(digit.t(), codes.t(), total) for digit, total in found]
    shift: list[Tensor | None] = [None] * 3
    if zero_point is not None and bool(zero_point != 0):
        # A product with ones: torch's own sum over columns of int8 takes ten times as long.
        ones = torch.ones((1, g.shape[0]), dtype=torch.int8, device=g.device)
        shift = [integer_sum(ones, digit.t()).view(-1, 1) * zero_point.to(torch.int32) for digit, _ in found]
    most = most if scale is None else most * scale
    out = torch.empty((g.shape[1], codes.shape[1]), dtype=torch.float32, device=g.device)
    sweep(_joined, [out], [*sums, *shift, most.view(-1, 1) / LARGEST])
    return out


def _largest(g: Tensor, columns: Tensor | None) -> tuple[Tensor]:
    g = g if columns is None else g * columns
    return (g.abs().amax(-1, keepdim=True).clamp(min=SMALLEST),)


def _digits(
    g: Tensor, columns: Tensor | None, most: Tensor, outputs: int, transposed: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """The three digits of g * columns, int8 (M, K), each with memory for its product's sums."""
    names = [f"digit {i}" for i in range(3)]
    digits = [buffer(name, g.shape, torch.int8, g.device) for name in names]
    sweep(_split, digits, [g, columns, most])
    rows = g.shape[1] if transposed else g.shape[0]
    totals = [buffer(f"sum of {name}", (rows, outputs), torch.int32, g.device) for name in names]
    return list(zip(digits, totals, strict=True))


def _split(g: Tensor, columns: Tensor | None, most: Tensor) -> tuple[Tensor, ...]:
    """q_0, q_1, q_2. Integers below 2^24: every step is exact in float32."""
    q = torch.round((g if columns is None else g * columns) * (LARGEST / most)) + OFFSET
    first = torch.floor(q * 2.0**-16)
    rest = q - first * 2.0**16
    second = torch.floor(rest * 2.0**-8)
    return first.to(torch.int8), (second - 128).to(torch.int8), (rest - second * 2.0**8 - 128).to(torch.int8)


def _joined(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    shift_a: Tensor | None,
    shift_b: Tensor | None,
    shift_c: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor]:
    """The product from the sums of its digits. Shifts: what a zero point adds to each, integers too."""
    if shift_a is not None and shift_b is not None and shift_c is not None:
        a, b, c = a - shift_a, b - shift_b, c - shift_c
    return ((a.float() * 2.0**16 + b.float() * 2.0**8 + c.float()) * scale,)
