"""What a quantized number is: formats, schemes, the equations, their gradients, integer arithmetic, packing."""

from qatana.numerics import operators as operators
from qatana.numerics.affine import (
    dequantize,
    fake_quantize,
    levels,
    quantize,
    replace_forward,
    round_clamp,
    scale_gradient,
)
from qatana.numerics.engine import Affine, Engine, engine
from qatana.numerics.format import IntFormat
from qatana.numerics.granularity import Granularity
from qatana.numerics.packing import pack, unpack
from qatana.numerics.parameters import scale_and_zero_point
from qatana.numerics.scheme import RANGES, SCALE_MODES, Scheme, scheme

__all__ = [
    "RANGES", "SCALE_MODES", "Affine", "Engine", "Granularity", "IntFormat", "Scheme", "dequantize", "engine",
    "fake_quantize", "levels", "pack", "quantize", "replace_forward", "round_clamp", "scale_and_zero_point",
    "scale_gradient", "scheme", "unpack",
]  # fmt: skip
