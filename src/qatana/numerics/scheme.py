"""A scheme says how one tensor is quantized: format x granularity x symmetry x scale type x where the scale comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from qatana.errors import SchemeError, nearest
from qatana.numerics.formats import Codebook, FloatFormat, Format, GgufFormat, IntFormat, parse_format
from qatana.numerics.gguf_grid import GgufGrid
from qatana.numerics.granularity import Granularity
from qatana.numerics.grid import Grid, IntGrid, MeanGrid, RangeGrid, ScaledGrid
from qatana.numerics.half_quadratic import HqqGrid
from qatana.numerics.minimum import MinimumGrid
from qatana.numerics.scales import ScaleType
from qatana.numerics.scheme_checks import refuse_impossible

ScaleMode = Literal["static", "dynamic", "learned"]
RangeName = Literal["minmax", "moving_average", "percentile", "mse", "entropy"]
SCALE_MODES = ("static", "dynamic", "learned")
RANGES = ("minmax", "moving_average", "percentile", "mse", "entropy")
_DEFAULTS = {"scale_type": "float32", "rule": ""}
_KEYS = {"format", "granularity", "symmetric", "scale", "range", "fixed", *_DEFAULTS}


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized.

    symmetric   zero_point is fixed: 0 for signed formats, 2^(b-1) for unsigned ones
    scale       "static" (calibrated; where more than a scale is needed: held), "dynamic" (from the tensor itself at each call),
                "learned" (LSQ; starts calibrated)
    range       the estimator that calibration uses: minmax, moving_average, percentile, mse, entropy
    fixed       (scale, zero_point) known beforehand, e.g. a softmax output: (1/255, 0); no calibration
    scale_type  in which numbers the scales are stored: float32, float16, bfloat16, e8m0, e4m3 (two levels), double
    rule        "" the format's own equation; integers also: "torchao", "compressed-tensors", "gptq", "awq", "bitsandbytes" (their
                rounding of scale, zero point and code), "quanto" (codes count up from a block's smallest value), "absmean" (ternary
                with the mean magnitude, BitNet; "absmean:reciprocal" as transformers rounds it), "hqq" (a float zero point by
                half-quadratic search; "hqq:round" begins it at a whole number, as hqq does with 4 bits)
    text        what `str` gives and `parse` reads;  grid: the equations
    takes_scale whether its parameters are a scale and a zero point, which can be given (static, learned)
    holds       they are more than that (two levels, minima, a search) and static: solved once by `hold`, then kept

    Raises: SchemeError for combinations that cannot exist."""

    format: Format
    granularity: Granularity = field(default_factory=Granularity)
    symmetric: bool = True
    scale: ScaleMode = "static"
    range: RangeName = "minmax"
    fixed: tuple[float, int] | None = None
    scale_type: ScaleType = field(default_factory=ScaleType)
    rule: str = ""
    text: str = field(init=False, repr=False, compare=False, default="")
    takes_scale: bool = field(init=False, repr=False, compare=False, default=True)
    holds: bool = field(init=False, repr=False, compare=False, default=False)
    grid: Grid = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.scale not in SCALE_MODES:
            raise SchemeError(f"unknown scale mode '{self.scale}'{nearest(str(self.scale), SCALE_MODES)}")
        if self.range not in RANGES:
            raise SchemeError(f"unknown range estimator '{self.range}'{nearest(str(self.range), RANGES)}")
        # Plain attributes, so that torch.compile reads constants where it would have to trace their making.
        mean = self.rule.startswith(("absmean", "hqq")) or str(self.format) == "binary"
        object.__setattr__(self, "takes_scale", not self.is_gguf and self.scale_type.local and not mean)
        object.__setattr__(self, "holds", not self.takes_scale and self.scale == "static" and self.fixed is None)
        refuse_impossible(self)
        object.__setattr__(self, "text", self._written())
        object.__setattr__(self, "grid", _grid(self))

    # -- what follows from it --------------------------------------------------------------------------------------
    @property
    def is_integer(self) -> bool:
        """Whether codes are integers with a scale and an integer zero point, as integer layers need them."""
        return isinstance(self.format, IntFormat) and not self.rule and self.scale_type.name == "float32"

    @property
    def integer(self) -> IntFormat:
        """The integer format. Raises: SchemeError for schemes whose codes are no integers with a zero point."""
        if not (isinstance(self.format, IntFormat) and self.is_integer):
            raise SchemeError(
                f"{self} has no integer codes with a zero point; an integer product needs a scheme like 'int8'"
            )
        return self.format

    @property
    def integer_grid(self) -> IntGrid:
        """The grid of an integer scheme. Raises: SchemeError as `integer`."""
        assert self.integer
        assert isinstance(self.grid, IntGrid)
        return self.grid

    @property
    def ranged(self) -> RangeGrid:
        """The grid, one whose parameters follow from a range. Raises: SchemeError for those whose parameters are more than a scale."""
        if not isinstance(self.grid, RangeGrid) or not self.takes_scale:
            raise SchemeError(
                f"{self}: its parameters follow from the tensor's own values and cannot be given as a scale; "
                f"set scale='static' and hold them, or scale='dynamic'"
            )
        return self.grid

    @property
    def is_gguf(self) -> bool:
        return isinstance(self.format, GgufFormat)

    @property
    def rounds_scale(self) -> bool:
        return self.scale_type.name != "float32"

    @property
    def zero_point(self) -> int:
        """The zero point of a symmetric scheme."""
        format = self.format
        return 2 ** (format.bits - 1) if isinstance(format, IntFormat) and not format.signed else 0

    @property
    def code_dtype(self) -> torch.dtype:
        """Storage of one code."""
        return torch.int16 if self.is_gguf else self.format.dtype

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element, the scale of each block included (per-tensor and per-channel scales not counted), and with
        a zero point in blocks the format's bits for it (HQQ's is a float32, so is quanto's minimum)."""
        if isinstance(self.format, GgufFormat):
            return self.format.bits_per_element
        size = self.granularity.size * (self.granularity.rows or 1)
        zero_point = 0 if self.symmetric else 32 if self.rule.startswith(("hqq", "quanto")) else self.format.bits
        return self.format.bits + ((self.scale_type.bits + zero_point) / size if size else 0)

    def check(self, shape: torch.Size | tuple[int, ...], name: str = "tensor") -> None:
        """Raise SchemeError if a tensor of this shape cannot be quantized so."""
        self.granularity.check(shape, name)
        if isinstance(self.format, GgufFormat) and (not shape or shape[-1] % self.format.row):
            raise SchemeError(
                f"{name}: {self.format} stores rows of a multiple of {self.format.row} elements; shape is {tuple(shape)}; "
                f"take a type with smaller blocks (gguf:q8_0, gguf:q4_0: 32)"
            )

    def with_(self, **changes: Any) -> Scheme:
        return replace(self, **changes)

    # -- text ------------------------------------------------------------------------------------------------------
    def __str__(self) -> str:
        return self.text

    def _written(self) -> str:
        parts = [f"{self.format}/{self.granularity}", "sym" if self.symmetric else "asym"]
        if self.fixed:
            parts.append(f"fixed={self.fixed[0]!r},{self.fixed[1]}")
        if not self.fixed or self.scale != "static":
            parts.append(self.scale)
        if self.range != "minmax" or not (self.fixed or self.holds or self.scale == "dynamic"):
            parts.append(self.range)
        parts += [str(self.scale_type)] * (self.scale_type != ScaleType())
        return " ".join(parts + [f"rule={self.rule}"] * bool(self.rule))

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """The scheme that `str` wrote: "int4/group32 sym learned mse", "e2m1/group32 sym dynamic e8m0:floor". Per token is dynamic,
        written or not."""
        head, *words = text.split(" ")
        format, _, granularity = head.rpartition("/")
        data: dict[str, Any] = {"format": format, "granularity": granularity}
        if granularity == "token":
            data["scale"] = "dynamic"
        for word in words:
            key, _, value = word.partition("=")
            if word in ("sym", "asym"):
                data["symmetric"] = word == "sym"
            elif word in SCALE_MODES:
                data["scale"] = word
            elif word in RANGES:
                data["range"] = word
            elif key == "fixed" and re.fullmatch(r"[^,]+,-?\d+", value):
                data["fixed"] = [float(value.partition(",")[0]), int(value.partition(",")[2])]
            elif key == "rule":
                data["rule"] = value
            else:
                data["scale_type"] = word
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "format": str(self.format),
            "granularity": str(self.granularity),
            "symmetric": self.symmetric,
            "scale": self.scale,
            "range": self.range,
        }
        extra = {"scale_type": str(self.scale_type), "rule": self.rule}
        out |= {key: value for key, value in extra.items() if value != _DEFAULTS[key]}
        return out | ({"fixed": list(self.fixed)} if self.fixed else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        for key in data:
            if key not in _KEYS:
                raise SchemeError(f"unknown key '{key}' in a scheme{nearest(key, _KEYS)}")
        if "format" not in data:
            raise SchemeError("a scheme needs a 'format', e.g. 'int8'")
        for key in ("format", "granularity", "scale_type", "rule"):
            if not isinstance(data.get(key, ""), str):
                raise SchemeError(f"'{key}' of a scheme is text such as 'int8' or 'group32', not {data[key]!r}")
        fixed = data.get("fixed")
        if fixed is not None and not (isinstance(fixed, (list, tuple)) and len(fixed) == 2):
            raise SchemeError(f"'fixed' of a scheme is [scale, zero_point], not {fixed!r}")
        return cls(
            parse_format(data["format"]),
            Granularity.parse(data.get("granularity", "tensor")),
            symmetric=bool(data.get("symmetric", True)),
            scale=data.get("scale", "static"),
            range=data.get("range", "minmax"),
            fixed=(float(fixed[0]), int(fixed[1])) if fixed else None,
            scale_type=ScaleType.parse(data.get("scale_type", "float32")),
            rule=data.get("rule", ""),
        )


def _grid(scheme: Scheme) -> Grid:
    format, block = scheme.format, scheme.granularity.size
    if isinstance(format, GgufFormat):
        return GgufGrid(format.block, format.name)
    if isinstance(format, IntFormat):
        if scheme.rule.startswith("absmean"):
            return MeanGrid(block, format, scheme.rule == "absmean:reciprocal")
        if scheme.rule == "quanto":
            return MinimumGrid(block, format)
        if scheme.rule.startswith("hqq"):
            return HqqGrid(block, format, scheme.rule == "hqq:round")
        return IntGrid(block, format, scheme.symmetric, scheme.scale_type, scheme.rule)
    assert isinstance(format, (FloatFormat, Codebook))
    if isinstance(format, Codebook) and format.name == "binary":
        return MeanGrid(block, format)
    return ScaledGrid(block, format, scheme.scale_type)
