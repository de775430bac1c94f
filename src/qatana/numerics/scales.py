"""Scale types: in which numbers the scales of a format are stored, and how a range becomes one of them.

float32, float16, bfloat16   scale = largest |x| of the block / largest value of the format, rounded to the type
float32:reciprocal           x is multiplied by s = (1 / largest |x|) * largest value of the format;  scale = 1 / s
e8m0     a power of two, 2^-127 .. 2^127, by one of four rules (OCP Microscaling Formats 1.0, section 6.3; NVIDIA cuBLAS), or
         e8m0:reciprocal  2^ceil(log2(float32:reciprocal's scale)), the logarithm rounded to float32
e4m3     two levels (NVFP4): an E4M3 scale per block in units of one float32 scale of the tensor, as torchao or compressed-tensors
double   two levels (bitsandbytes): largest |x| minus its mean, itself quantized to 8 bits in blocks of 256"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.errors import SchemeError, nearest
from qatana.numerics.formats import DYNAMIC8, DYNAMIC8_CPU, Codebook, FloatFormat
from qatana.numerics.gguf.blocks import stored_half

SMALLEST_SCALE = 2.0**-100
"""Scale of an all-zero tensor: far below any real one, a normal float32 together with its products."""

SCALE_TYPES = {
    "float32": ("", "reciprocal"),
    "float16": ("",),
    "bfloat16": ("",),
    "e8m0": ("", "floor", "ceil", "even", "rceil", "reciprocal"),
    "e4m3": ("", "compressed-tensors"),
    "double": ("", "cpu"),
}
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Scale of zeros as compressed-tensors has it: the distance from 1 to the next number of the type."""
_E4M3 = FloatFormat(4, 3, "fn")


class Parameters(NamedTuple):
    """What turns a block of reals into codes and back; float32, broadcasting against the block view.

    scale   the value scale as stored: x_hat = level * scale (+ offset for formats with a minimum)
    offset  zero point of integer formats, minimum of formats that store one, 0 elsewhere
    encode  what x is divided by (or multiplied with, where the grid says so) when its code is computed"""

    scale: Tensor
    offset: Tensor
    encode: Tensor


@dataclass(frozen=True)
class ScaleType:
    """A scale type and its rule; written "float32", "e8m0:floor", "double:cpu". "e8m0" alone rounds like "e8m0:floor"."""

    name: str = "float32"
    rule: str = ""

    def __post_init__(self) -> None:
        if self.name not in SCALE_TYPES:
            raise SchemeError(f"unknown scale type '{self.name}'{nearest(self.name, SCALE_TYPES)}")
        if self.rule not in SCALE_TYPES[self.name]:
            rules = ", ".join(rule for rule in SCALE_TYPES[self.name] if rule) or "none"
            raise SchemeError(f"scale type {self.name} knows no rule '{self.rule}'; its rules: {rules}")

    @classmethod
    def parse(cls, text: str) -> ScaleType:
        name, _, rule = text.partition(":")
        return cls(name, rule)

    def __str__(self) -> str:
        return f"{self.name}:{self.rule}" if self.rule else self.name

    @property
    def local(self) -> bool:
        """Whether the scale of a block depends on that block alone."""
        return self.name not in ("e4m3", "double")

    @property
    def bits(self) -> float:
        """Stored bits per scale (second level included, per-tensor numbers not counted)."""
        return {"float32": 32, "float16": 16, "bfloat16": 16, "e8m0": 8, "e4m3": 8, "double": 8 + 32 / 256}[self.name]

    def store(self, scale: Tensor) -> Tensor:
        """A positive float32 scale as the type holds it, never 0. Raises: SchemeError for the two-level types.

        By arithmetic on its bits: compilers drop a cast to a narrow type and back."""
        if self.name == "float32":
            return torch.where(scale > SMALLEST_SCALE, scale, torch.full_like(scale, SMALLEST_SCALE))
        if self.name == "float16":
            return stored_half(scale.clamp(2.0**-24, 65504.0))
        if self.name == "bfloat16":
            return _upper_half(scale.clamp(SMALLEST_SCALE, 2.0**126))
        if self.name == "e8m0":
            return _power_of_two(_exponent(scale, up=self.rule in ("ceil", "rceil", "reciprocal")))
        raise SchemeError(f"scale type {self.name} has two levels: its scales follow from the whole tensor")

    def store_or_eps(self, scale: Tensor) -> Tensor:
        """A float32 scale >= 0 as the type (float32, float16, bfloat16) holds it, its `EPS` where that is 0."""
        if self.name == "float16":
            scale = stored_half(scale.clamp(max=65504.0))
        elif self.name == "bfloat16":
            scale = _upper_half(scale)
        return torch.where(scale > 0, scale, torch.full_like(scale, EPS[self.name]))

    def parameters(self, largest: Tensor, format: FloatFormat | Codebook) -> Parameters:
        """Parameters from the largest |x| of each block, for formats symmetric about 0."""
        zero = torch.zeros_like(largest)
        if self.rule == "reciprocal":
            return self._reciprocal(largest, format, zero)
        if self.name == "e8m0" and isinstance(format, FloatFormat):
            return self._mx(largest, format, zero)
        if self.name == "e4m3":
            return (_two_level_inverse if self.rule else _two_level)(largest, format, zero)
        if isinstance(format, Codebook):
            limit = largest / torch.full_like(largest, format.largest) if format.largest != 1 else largest
            scale = _doubled(limit, self.rule == "cpu") if self.name == "double" else limit
            if self.name not in ("double", "float32"):
                scale = limit = self.store(limit)
            return Parameters(scale, zero, limit.clamp(min=1e-38).reciprocal())
        limit = largest / torch.full_like(largest, format.largest)
        # Numbers of 1e-40 have a scale, too: only zeros have none, and get compressed-tensors'.
        scale = self.store_or_eps(limit) if self.name == "float32" else self.store(limit)
        return Parameters(scale, zero, scale)

    def _reciprocal(self, largest: Tensor, format: FloatFormat | Codebook, zero: Tensor) -> Parameters:
        """As transformers' FineGrainedFP8 quantizes weights (`Fp8Quantize`): every division is a reciprocal, rounded, and zeros have
        the scale 1."""
        encode = (largest.reciprocal() * format.largest).clamp(max=2.0**127)
        encode = torch.where(largest > 0, encode, torch.ones_like(encode))
        scale = encode.reciprocal()
        if self.name == "e8m0":
            scale = _power_of_two(torch.log2(scale).ceil().to(torch.int32))
            encode = scale.reciprocal()
        return Parameters(scale, zero, encode)

    def _mx(self, largest: Tensor, format: FloatFormat, zero: Tensor) -> Parameters:
        """X = 2^e with e = floor(log2 m) - emax (floor), ceil(log2 m) - emax (ceil), floor(log2 of m rounded to the element's
        mantissa) - emax (even), ceil(log2(m / largest value)) (rceil); m the largest |x|. As torchao: X never divides as less than
        2^-126, and a block with the rceil exponent -127 is not scaled up at all."""
        if self.rule == "rceil":
            e = _exponent(largest / torch.full_like(largest, format.largest), up=True)
            scale = _power_of_two(e)
            return Parameters(scale, zero, torch.where(e <= -127, torch.ones_like(scale), scale))
        if self.rule == "even":
            half = 1 << (22 - format.mantissa)
            largest = (largest.contiguous().view(torch.int32) + half).view(torch.float32)
        e = _exponent(largest, up=self.rule == "ceil") - format.largest_exponent
        scale = _power_of_two(e)
        return Parameters(scale, zero, scale.clamp(min=2.0**-126))


def _upper_half(x: Tensor) -> Tensor:
    """x > 0 rounded to bfloat16, to nearest even: adding just below half a place, and one more where it is odd, carries into it."""
    raw = x.contiguous().view(torch.int32)
    return ((raw + (0x7FFF + ((raw >> 16) & 1))) & -0x10000).view(torch.float32)


def _exponent(x: Tensor, up: bool) -> Tensor:
    """floor(log2 x) or ceil(log2 x) of x >= 0 by its bits, int32; -127 for 0, and below 2^-126 no less than that."""
    raw = x.contiguous().view(torch.int32)
    exponent = (raw >> 23) - 127
    if not up:
        return exponent
    above = torch.where(exponent > -127, raw & 0x7FFFFF, (raw - 0x400000).clamp(min=0))  # 2^-127 itself is a subnormal
    return exponent + (above > 0).to(torch.int32)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^e, e clamped to -127 .. 127, exactly: 2^-127 is a subnormal float32."""
    e = exponent.clamp(-127, 127)
    raw = torch.where(e > -127, (e + 127) << 23, torch.full_like(e, 1 << 22))
    return raw.view(torch.float32)


def _two_level(largest: Tensor, format: FloatFormat | Codebook, zero: Tensor) -> Parameters:
    """g = max |x| of the tensor / (448 * largest value);  s = e4m3(clamp((m / largest value) / g, 2^-6, 448));  scale = g * s.
    x is multiplied by (1 / g) / s. Reference: NVFP4 as torchao's nvfp4_quantize computes it."""
    most = torch.full_like(largest, format.largest)
    g = largest.amax() if largest.numel() else largest.new_zeros(())
    g = g / torch.full_like(g, _E4M3.largest * format.largest)
    g = torch.where(g > SMALLEST_SCALE, g, torch.full_like(g, SMALLEST_SCALE))
    s = _E4M3.round_((largest / most / g).clamp_(2.0**-6, _E4M3.largest))
    return Parameters(g * s, zero, g.reciprocal() / s)


def _two_level_inverse(largest: Tensor, format: FloatFormat | Codebook, zero: Tensor) -> Parameters:
    """G = (448 * largest value) * (1 / max |x| of the tensor), 1 where that overflows;  s = e4m3(min(G * (m / largest value), 448)),
    1/8 where that is 0;  scale = s / G. x is divided by it. Reference: compressed-tensors 0.20, `generate_gparam`, `calculate_qparams`."""
    most = torch.full_like(largest, format.largest)
    whole = largest.amax() if largest.numel() else largest.new_zeros(())
    inverse = whole.clamp(min=2.0**-126).reciprocal() * (_E4M3.largest * format.largest)
    inverse = torch.where(torch.isinf(inverse), torch.ones_like(inverse), inverse)
    s = _E4M3.round_((inverse * (largest / most)).clamp_(max=_E4M3.largest))
    scale = torch.where(s > 0, s, torch.full_like(s, 0.125)) / inverse
    return Parameters(scale, zero, scale)


def _doubled(limit: Tensor, cpu: bool) -> Tensor:
    """The largest |x| as bitsandbytes stores it twice quantized: offset = mean;  code = dynamic map of (limit - offset) / m per 256
    blocks in a row, m their largest magnitude;  limit' = value * m + offset."""
    flat = limit.reshape(-1)
    if not flat.numel():
        return limit
    book = DYNAMIC8_CPU if cpu else DYNAMIC8
    offset = flat.mean()
    padded = torch.nn.functional.pad(flat - offset, (0, -len(flat) % 256)).view(-1, 256)
    most = padded.abs().amax(1, keepdim=True)
    t = padded * torch.where(most > 0, most, torch.ones_like(most)).reciprocal()
    values = book.round_(torch.where(most > 0, t, -torch.ones_like(t)))
    return (values * most).view(-1)[: len(flat)].add_(offset).view_as(limit)
