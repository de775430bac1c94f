"""Grids: what turns blocks of reals into codes and back. One class per equation; `Scheme.grid` chooses.

Every grid computes  t = x / encode (or x * encode),  level = the format's number nearest to t,  x_hat = level * scale.
Codes are the format's, and values(codes(x)) is the fake-quantized x bit for bit. All of it is float32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qatana.numerics.formats import BINARY, Codebook, FloatFormat, IntFormat
from qatana.numerics.scales import SMALLEST_SCALE, Parameters, ScaleType

INT8, E4M3, FLOAT32 = IntFormat(8), FloatFormat(4, 3, "fn"), ScaleType()
HALF = ("torchao", "compressed-tensors", "gptq")
"""Rules whose symmetric scale spreads max |x| over half the codes, (hi - lo) / 2 = 127.5 of int8."""
LARGEST = 2.0**127
Dims = tuple[int, ...]
Statistics = tuple[Tensor, ...]


@dataclass(frozen=True)
class Grid(ABC):
    """What every grid can do. `block`: elements that share a scale along the last dimension (0: given by the granularity)."""

    block: int = 0

    @property
    def local(self) -> bool:
        """Whether the parameters of a block depend on its own elements alone."""
        return True

    @property
    def whole(self) -> bool:
        """Whether `solve` needs the whole tensor at once: its parameters are no function of statistics per block."""
        return False

    @property
    def clips(self) -> bool:
        """Whether elements may lie outside the range although the range is their own."""
        return False

    @property
    def straight(self) -> bool:
        """Whether the gradient passes everywhere, clipped or not (absmean formats, as their papers have it)."""
        return False

    @property
    def inverse(self) -> bool:
        """Whether `encode` multiplies."""
        return False

    @property
    def fields(self) -> tuple[str, ...]:
        """The parameters that are held; the others are copies of these or 0."""
        return ("scale", "offset", "encode")

    @abstractmethod
    def solve(self, view: Tensor, dims: Dims = (-1,)) -> Parameters:
        """Parameters from the elements themselves; `dims` are those over which a block extends."""

    @abstractmethod
    def apply(
        self, view: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Fake-quantized view (float32) and, if asked for and known, 1.0 where it was inside the range.

        fits  the parameters are the view's own: nothing lies outside the range by more than rounding"""

    @abstractmethod
    def codes(self, view: Tensor, p: Parameters) -> Tensor:
        """Codes of a view."""

    @abstractmethod
    def values(self, codes: Tensor, p: Parameters) -> Tensor:
        """What codes stand for, float32."""

    def of(self, scale: Tensor, offset: Tensor) -> Parameters:
        """Parameters from a given (static, learned) scale."""
        return Parameters(scale, offset, scale.reciprocal() if self.inverse else scale)

    def restore(self, held: Sequence[Tensor]) -> Parameters:
        """Parameters from those held: what is not held is 0 (offset) or a copy of the scale (encode)."""
        known = dict(zip(self.fields, held, strict=True))
        scale = known["scale"]
        return Parameters(scale, known.get("offset", scale.new_zeros(())), known.get("encode", scale))

    def field_shape(self, name: str, stack: Sequence[int], dims: Dims) -> tuple[int, ...]:
        """Shape of a held parameter of a stack: one number per block, () for one block that is the whole tensor."""
        if len(dims) == len(stack):
            return ()
        return tuple(1 if d in dims or d - len(stack) in dims else n for d, n in enumerate(stack))


@dataclass(frozen=True)
class LevelGrid(Grid):
    """Grids that go by way of t and level: x_hat = level * scale."""

    def scaled(self, view: Tensor, p: Parameters) -> Tensor:
        """t, a new tensor."""
        return view * p.encode if self.inverse else view / p.encode

    @abstractmethod
    def round_(self, t: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False) -> Tensor | None:
        """Levels in place of t. `fits`: as in `apply`. `mask`: return where t was inside, as 1.0 and 0.0: kept float, a comparison
        is five times faster than one to bool."""

    @abstractmethod
    def encode(self, t: Tensor, p: Parameters) -> Tensor:
        """Codes of t in the storage dtype."""

    @abstractmethod
    def decode(self, codes: Tensor, p: Parameters) -> Tensor:
        """Levels of codes, float32."""

    def apply(
        self, view: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        t = self.scaled(view, p)
        inside = self.round_(t, p, fits=fits, mask=mask)
        return t.mul_(p.scale), inside

    def codes(self, view: Tensor, p: Parameters) -> Tensor:
        return self.encode(self.scaled(view.float(), p), p)

    def values(self, codes: Tensor, p: Parameters) -> Tensor:
        return self.decode(codes, p) * p.scale


@dataclass(frozen=True)
class RangeGrid(LevelGrid):
    """Grids whose parameters follow from the smallest and largest element of each block."""

    def statistics(self, view: Tensor, dims: Dims = (-1,)) -> Statistics:
        """What `parameters` needs to know of each block: its smallest and largest element, 0 where it has none."""
        if not view.numel():
            view = view.new_zeros([max(1, n) for n in view.shape])
        return view.amin(dims, keepdim=True).float(), view.amax(dims, keepdim=True).float()

    @abstractmethod
    def parameters(self, *statistics: Tensor) -> Parameters:
        """Parameters from the smallest and the largest element of each block."""

    def solve(self, view: Tensor, dims: Dims = (-1,)) -> Parameters:
        return self.parameters(*self.statistics(view, dims))


def bound(low: Tensor, high: Tensor) -> Tensor:
    """max |x| of a range."""
    return torch.maximum(low.abs(), high.abs())


@dataclass(frozen=True)
class IntGrid(RangeGrid):
    """Integers with a zero point.   level = clamp(round(t), lo - z, hi - z);  code = level + z.

    rule                scale (m = max |x|)                   zero point               t
    ""                  m / (hi - z); (high - low)/(hi - lo)  round(lo - low / scale)  x / scale        ONNX, as `affine`
    torchao             m / ((hi - lo) / 2); the same         lo - round(low / scale)  x * (1 / scale), the reciprocal rounded first
    compressed-tensors  m / ((hi - lo) / 2); the same         round(lo - low / scale)  x / scale
    gptq                m / ((hi - lo) / 2); the same         lo - round(low / scale)  x / scale
    awq                 m / (hi - z); the same                lo - round(low / scale)  x / scale
    bitsandbytes        m / (hi - z); symmetric alone                                  x * ((1 / m) * (hi - z))
    Zero points are clamped to lo .. hi, ranges take in 0 (but awq's). torchao's scales are at least the smallest normal float32, awq's
    come from ranges of at least 1e-5.
    compressed-tensors adds an asymmetric zero point before it rounds: code = clamp(round(t + z), lo, hi), which takes ties to even
    codes, not to even levels; its scale of zeros is the type's eps, and the zero point comes from the scale before its type rounds it.
    Reference: Jacob et al. 2018; torchao 0.18; compressed-tensors 0.20, `calculate_qparams` and `quantize`; auto-gptq 0.7.1,
    `Quantizer.find_params`; autoawq 0.2.9, `pseudo_quantize_tensor`; bitsandbytes 0.50, `int8_vectorwise_quant` on a CPU."""

    format: IntFormat = INT8
    symmetric: bool = True
    scale_type: ScaleType = FLOAT32
    rule: str = ""

    @property
    def clips(self) -> bool:
        """Half ranges, lo .. hi about 0, leave the largest element outside; so does a range that 0 lies outside."""
        return self.scale_type.name != "float32" or (self.rule in HALF if self.symmetric else self.rule == "awq")

    @property
    def inverse(self) -> bool:
        return self.rule in ("torchao", "bitsandbytes")

    @property
    def zero(self) -> int:
        """The zero point of the symmetric form."""
        return 0 if self.format.signed else 2 ** (self.format.bits - 1)

    def parameters(self, *statistics: Tensor) -> Parameters:
        low, high = statistics
        if self.symmetric:
            return self._symmetric(bound(low, high))
        lo, hi = self.format.lo, self.format.hi
        if self.rule == "awq":
            scale = (high - low).clamp(min=1e-5) / torch.full_like(low, hi - lo)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / torch.full_like(low, hi - lo)
        if self.rule == "compressed-tensors":
            zero = (lo - low / scale).clamp(lo, hi).nan_to_num(nan=self.zero)  # 0 / 0: the range is 0
            return self.of(self._stored(scale), zero.round_())
        if self.rule:
            scale = self._stored(scale)
            return self.of(scale, (lo - torch.round(low / scale)).clamp(lo, hi))
        if self.scale_type.name != "float32":
            scale = self.scale_type.store(scale)
        zero = torch.round(lo - low / scale.clamp(min=SMALLEST_SCALE)).clamp(lo, hi)
        return self.of(self._stored(scale), zero)

    def _symmetric(self, most: Tensor) -> Parameters:
        """Parameters from the largest |x|."""
        most = most.clamp(min=1e-5) if self.rule == "awq" else most
        width = torch.full_like(
            most, (self.format.hi - self.format.lo) / 2 if self.rule in HALF else self.format.hi - self.zero
        )
        p = self.of(self._stored(most / width), torch.full_like(most, self.zero))
        if self.rule != "bitsandbytes":
            return p
        return p._replace(encode=(most.reciprocal() * width).clamp(max=LARGEST))  # zeros: 0 * LARGEST is 0

    def _stored(self, scale: Tensor) -> Tensor:
        if self.rule == "compressed-tensors":
            return self.scale_type.store_or_eps(scale)
        if self.rule and self.scale_type.name == "float32":
            return scale.clamp(min=2.0**-126)
        return self.scale_type.store(scale)

    def round_(self, t: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False) -> Tensor | None:
        shifted = self.rule == "compressed-tensors" and not self.symmetric
        t = t.add_(p.offset).round_().sub_(p.offset) if shifted else t.round_()
        if fits and self.symmetric and not self.clips:
            return None
        rounded = t.clone() if mask else t
        if self.symmetric:
            t.clamp_(self.format.lo - self.zero, self.format.hi - self.zero)
        else:
            torch.maximum(t, self.format.lo - p.offset, out=t)
            torch.minimum(t, self.format.hi - p.offset, out=t)
        return rounded.eq_(t) if mask else None

    def encode(self, t: Tensor, p: Parameters) -> Tensor:
        self.round_(t, p)
        return (t + p.offset).to(self.format.dtype)

    def decode(self, codes: Tensor, p: Parameters) -> Tensor:
        return codes.float() - p.offset


@dataclass(frozen=True)
class ScaledGrid(RangeGrid):
    """Minifloats and codebooks, symmetric about 0, with one scale per block by the scale type.

    Floats divide by the scale; torchao's two-level scales, codebooks and reciprocal scales multiply, as their references do."""

    format: FloatFormat | Codebook = E4M3
    scale_type: ScaleType = FLOAT32

    @property
    def local(self) -> bool:
        return self.scale_type.local

    @property
    def fields(self) -> tuple[str, ...]:
        return ("scale", "encode")

    @property
    def inverse(self) -> bool:
        if self.scale_type.name == "e4m3":
            return not self.scale_type.rule
        return isinstance(self.format, Codebook) or self.scale_type.rule == "reciprocal"

    @property
    def clips(self) -> bool:
        """e8m0 by floor leaves up to 2 * 2^emax; by even only where the largest mantissa is kept for NaN (E4M3FN). Small scales in
        E4M3 lose up to a third, where torchao has none below 2^-6."""
        if isinstance(self.format, Codebook) or self.scale_type.name != "e8m0":
            return str(self.scale_type) in ("float16", "bfloat16", "e4m3:compressed-tensors")
        return self.scale_type.rule in ("", "floor") or (self.scale_type.rule == "even" and self.format.special == "fn")

    def statistics(self, view: Tensor, dims: Dims = (-1,)) -> Statistics:
        if dims == (-1,) and 0 < view.shape[-1] < 32:  # two reductions over short rows cost more than |x|
            largest = view.abs().amax(-1, keepdim=True).float()
            return largest, largest
        return super().statistics(view, dims)

    def parameters(self, *statistics: Tensor) -> Parameters:
        return self.scale_type.parameters(bound(*statistics), self.format)

    def round_(self, t: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False) -> Tensor | None:
        if isinstance(self.format, Codebook):
            inside = self.format.inside(t).float() if mask else None
            self.format.round_(t)
            return inside
        most = self.format.largest
        if not fits:
            t.clamp_(-2 * most, 2 * most)
        self.format.nearest_(t)
        inside = t.abs().le_(most) if mask else None
        t.clamp_(-most, most)
        return inside

    def encode(self, t: Tensor, p: Parameters) -> Tensor:
        return self.format.encode(t if isinstance(self.format, Codebook) else self.format.round_(t))

    def decode(self, codes: Tensor, p: Parameters) -> Tensor:
        return self.format.decode(codes)


@dataclass(frozen=True)
class MeanGrid(LevelGrid):
    """Ternary and binary weights with the mean magnitude as scale.

    ternary  level = clamp(round(x / max(gamma, 1e-5)), -1, 1),  x_hat = level * gamma   (BitNet b1.58, Ma et al. 2024)
    binary   level = +1 where x >= 0, else -1,  x_hat = level * gamma                    (XNOR-Net, Rastegari et al. 2016)
    gamma = mean |x|, 0 for zeros. The gradient passes everywhere.

    reciprocal   s = 1 / max(gamma, 1e-5),  level = clamp(round(x * s), -1, 1),  x_hat = level * (1 / s), each rounded: BitNet as
                 transformers trains it (`WeightQuant` of AutoBitLinear)"""

    format: IntFormat | Codebook = BINARY
    reciprocal: bool = False

    @property
    def inverse(self) -> bool:
        return self.reciprocal

    @property
    def straight(self) -> bool:
        return True

    @property
    def fields(self) -> tuple[str, ...]:
        return ("scale", "encode")

    def solve(self, view: Tensor, dims: Dims = (-1,)) -> Parameters:
        magnitude = (view.float() if self.reciprocal else view).abs()
        gamma = (magnitude.mean() if len(dims) == view.ndim else magnitude.mean(dims, keepdim=True)).float()
        if self.reciprocal:
            encode = gamma.clamp(min=1e-5).reciprocal()
            return Parameters(encode.reciprocal(), torch.zeros_like(gamma), encode)
        return Parameters(gamma, torch.zeros_like(gamma), gamma.clamp(min=1e-5))

    def round_(self, t: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False) -> Tensor | None:
        if isinstance(self.format, IntFormat):
            t.round_().clamp_(self.format.lo, self.format.hi)
        else:
            self.format.round_(t)
        return None

    def encode(self, t: Tensor, p: Parameters) -> Tensor:
        if isinstance(self.format, IntFormat):
            self.round_(t, p)
            return t.to(self.format.dtype)
        return self.format.encode(t)

    def decode(self, codes: Tensor, p: Parameters) -> Tensor:
        return codes.float() if isinstance(self.format, IntFormat) else self.format.decode(codes)
