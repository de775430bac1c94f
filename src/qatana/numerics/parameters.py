"""Scale and zero point from a range: the one place where a range of reals becomes quantization parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.numerics.scheme import Scheme

SMALLEST_SCALE = 2.0**-100
"""Scale of an all-zero tensor: far below any real one, a normal float32 together with its products."""


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Parameters under which [low, high] fits the format's codes (0 is always a code, exactly).

    symmetric:  scale = max(-low / -(lo - z), high / (hi - z)) for signed formats, with z the scheme's zero point; narrow or
                not, +-max|x| maps within the range: scale = max|x| / (hi - z)
    asymmetric: low = min(low, 0), high = max(high, 0);  scale = (high - low) / (hi - lo);
                zero_point = clamp(round(lo - low / scale), lo, hi)
    All float32. Shapes: low, high, scale, zero_point are equal. Reference: ONNX DynamicQuantizeLinear; Jacob et al. 2018."""
    low, high = low.float(), high.float()
    lo, hi = scheme.format.lo, scheme.format.hi
    if scheme.symmetric:
        bound = torch.maximum(low.abs(), high.abs())
        scale = bound / torch.full_like(bound, hi - scheme.zero_point)
        zero_point = torch.full_like(scale, scheme.zero_point)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / torch.full_like(low, hi - lo)
        zero_point = torch.round(lo - low / scale.clamp(min=SMALLEST_SCALE)).clamp(lo, hi)
    return torch.where(scale > SMALLEST_SCALE, scale, torch.full_like(scale, SMALLEST_SCALE)), zero_point
