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
from qatana.numerics.by_scheme import fake_quantize_by
from qatana.numerics.engine import Affine, Engine
from qatana.numerics.engines import engine
from qatana.numerics.formats import Codebook, FloatFormat, IntFormat, parse_format, register_format
from qatana.numerics.granularity import Granularity
from qatana.numerics.held import fake_quantize_held, held_shapes, hold
from qatana.numerics.packing import pack, unpack
from qatana.numerics.parameters import scale_and_zero_point
from qatana.numerics.scales import Parameters, ScaleType
from qatana.numerics.scheme import RANGES, SCALE_MODES, Scheme
from qatana.numerics.scheme_names import NAMES, scheme
from qatana.numerics.stochastic import quantize_gradient, stochastic
from qatana.numerics.to_codes import dequantize_by, quantize_by

__all__ = [
    "NAMES", "RANGES", "SCALE_MODES", "Affine", "Codebook", "Engine", "FloatFormat", "Granularity", "IntFormat",
    "Parameters", "ScaleType", "Scheme", "dequantize", "dequantize_by", "engine", "fake_quantize", "fake_quantize_by",
    "fake_quantize_held", "held_shapes", "hold", "levels", "pack", "parse_format", "quantize", "quantize_by",
    "quantize_gradient", "register_format", "replace_forward", "round_clamp", "scale_and_zero_point", "scale_gradient", "scheme",
    "stochastic", "unpack",
]  # fmt: skip
