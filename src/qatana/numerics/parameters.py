"""Scale and zero point from a range: the one place where a range of reals becomes quantization parameters."""

from __future__ import annotations

from torch import Tensor

from qatana.numerics.scales import SMALLEST_SCALE as SMALLEST_SCALE
from qatana.numerics.scheme import Scheme


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Parameters under which [low, high] fits the format's codes (0 is always a code, exactly). For integers:

    symmetric:  scale = max(-low / -(lo - z), high / (hi - z)) for signed formats, with z the scheme's zero point; narrow or
                not, +-max|x| maps within the range: scale = max|x| / (hi - z)
    asymmetric: low = min(low, 0), high = max(high, 0);  scale = (high - low) / (hi - lo);
                zero_point = clamp(round(lo - low / scale), lo, hi)
    Other formats: `Grid.parameters`, with zero point 0.
    All float32. Shapes: low, high, scale, zero_point are equal. Reference: ONNX DynamicQuantizeLinear; Jacob et al. 2018."""
    p = scheme.ranged.parameters(low.float(), high.float())
    return p.scale, p.offset
