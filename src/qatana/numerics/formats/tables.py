"""The codebooks of bitsandbytes, and {-1, +1}. Reference: Dettmers et al. 2021 (dynamic map), 2023 (NF4); bitsandbytes 0.50."""

from __future__ import annotations

import torch

from qatana.numerics.formats.codebook import Codebook

NF4 = Codebook(
    "nf4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
)  # fmt: skip
"""Quantiles of the normal distribution, scaled to [-1, 1]."""


def _fp4() -> Codebook:
    """Codes by bit pattern, sign first: [0, 0.0625, 8, 12, 4, 6, 2, 3] / 12, then the negatives. Codes 0 and 8 are both +0:
    bitsandbytes gives (-0.0026, 0] to code 0 and (0, 0.0026] to code 8."""
    half = (torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3]) / torch.tensor(12.0)).tolist()
    table = (*half, *(-value if value else 0.0 for value in half))
    return Codebook("fp4", table, (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3))


FP4 = _fp4()


def _dynamic() -> tuple[float, ...]:
    """Decades 10^-6 .. 10^0, decade i with 2^i values evenly spaced in [0.1, 1], both signs, and 0 and 1: 256 numbers."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += ((10 ** (i - 6)) * means).tolist() + (-(10 ** (i - 6)) * means).tolist()
    return tuple(torch.tensor(sorted(values), dtype=torch.float32).tolist())


DYNAMIC8 = Codebook("dynamic8", _dynamic())
"""bitsandbytes' signed 8-bit dynamic map; nearest value, as its CUDA and its portable kernels choose it."""

DYNAMIC8_CPU = Codebook("dynamic8-cpu", DYNAMIC8.table, lookup=65536)
"""The same map as bitsandbytes' CPU kernel reads it, through 65,536 steps: about 1 code in 700 is a neighbour of the nearest."""

BINARY = Codebook("binary", (-1.0, 1.0), ties_up=True)
"""{-1, +1}; zero is +1."""
