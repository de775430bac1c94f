"""The range that loses the least information: Kullback-Leibler divergence on a histogram.

For each window [-w, w] about 0, w a whole number of bins:
    p  the counts inside, those outside added to the window's end bins
    q  the counts inside, merged into `levels` equal groups and spread evenly over the bins of a group that are not empty
    D(w) = sum p log(p / q), p and q normalized, q at least 1e-10 where p > 0
Reference: Migacz 2017 (TensorRT), as ONNX Runtime's calibrator has it, in float64 instead of its truncated integers."""

from __future__ import annotations

import torch
from torch import Tensor

STEP = 8
FLOOR = 1e-10


def divergence(counts: Tensor, half: int, levels: int) -> float:
    """D of the window of `half` bins on either side of the middle of `counts` (float64, an even number of bins)."""
    middle = len(counts) // 2
    inside = counts[middle - half : middle + half]
    p = inside.clone()
    p[0] += counts[: middle - half].sum()
    p[-1] += counts[middle + half :].sum()
    group = torch.arange(2 * half) * levels // (2 * half)
    empty = torch.zeros(levels, dtype=torch.float64)
    totals = empty.index_add(0, group, inside)
    filled = empty.index_add(0, group, (inside > 0).double())
    q = torch.where(inside > 0, totals[group] / filled[group].clamp(min=1), 0.0)
    if not float(q.sum()):
        return float("inf")
    p, q = p / p.sum(), (q / q.sum()).clamp(min=FLOOR)
    return float((p * (p / q).log()).nan_to_num(0.0).sum())


def best_window(counts: Tensor, levels: int) -> int:
    """Bins on either side of the middle with the least divergence; the widest of equals. levels: codes that the window gets."""
    middle = len(counts) // 2
    smallest = min(middle, max(STEP, -(-levels // 2)))
    halves = list(range(middle, smallest - 1, -STEP))
    return min(halves, key=lambda half: (divergence(counts, half, levels), -half))
