"""A scheme says how one tensor is quantized: format x granularity x symmetry x where the scale comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qatana.errors import SchemeError, nearest
from qatana.numerics.format import IntFormat
from qatana.numerics.granularity import Granularity

ScaleMode = Literal["static", "dynamic", "learned"]
RangeName = Literal["minmax", "moving_average", "percentile", "mse"]
SCALE_MODES = ("static", "dynamic", "learned")
RANGES = ("minmax", "moving_average", "percentile", "mse")


@dataclass(frozen=True)
class Scheme:
    """How one tensor is quantized.

    symmetric  zero_point is fixed: 0 for signed formats, 2^(b-1) for unsigned ones
    scale      "static" (calibrated), "dynamic" (from the tensor itself at each call), "learned" (LSQ; starts
               calibrated)
    range      the estimator that calibration uses: minmax, moving_average, percentile, mse
    fixed      (scale, zero_point) known beforehand, e.g. a softmax output: (1/255, 0); no calibration

    Raises: SchemeError for combinations that cannot exist."""

    format: IntFormat
    granularity: Granularity = field(default_factory=Granularity)
    symmetric: bool = True
    scale: ScaleMode = "static"
    range: RangeName = "minmax"
    fixed: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        if self.scale not in SCALE_MODES:
            raise SchemeError(f"unknown scale mode '{self.scale}'{nearest(str(self.scale), SCALE_MODES)}")
        if self.range not in RANGES:
            raise SchemeError(f"unknown range estimator '{self.range}'{nearest(str(self.range), RANGES)}")
        if self.granularity.kind == "token" and self.scale != "dynamic":
            raise SchemeError("per-token scales belong to activations and are dynamic: set scale='dynamic'")
        if self.format.narrow and not self.symmetric:
            raise SchemeError("a narrow format has no room for a zero point: use symmetric=True or drop the 'n'")
        if self.fixed is not None and not (self.fixed[0] > 0 and self.format.lo <= self.fixed[1] <= self.format.hi):
            raise SchemeError(f"fixed parameters {self.fixed} need scale > 0 and a zero point within {self.format}")

    @property
    def zero_point(self) -> int:
        """The zero point of a symmetric scheme."""
        return 0 if self.format.signed else 2 ** (self.format.bits - 1)

    @property
    def bits_per_element(self) -> float:
        """Stored bits per element, a float32 scale per group included (per-tensor and per-channel scales not
        counted)."""
        size = self.granularity.size * (self.granularity.rows or 1)
        return self.format.bits + (32 / size if size else 0)

    def with_(self, **changes: Any) -> Scheme:
        return replace(self, **changes)

    def __str__(self) -> str:
        parts = [f"{self.format}/{self.granularity}", "sym" if self.symmetric else "asym", self.scale]
        if self.fixed:
            parts[-1] = "fixed"
        elif self.scale != "dynamic":
            parts.append(self.range)
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        out: dict[str, Any] = {
            "format": str(self.format),
            "granularity": str(self.granularity),
            "symmetric": self.symmetric,
            "scale": self.scale,
            "range": self.range,
        }
        return out | ({"fixed": list(self.fixed)} if self.fixed else {})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scheme:
        known = {"format", "granularity", "symmetric", "scale", "range", "fixed"}
        for key in data:
            if key not in known:
                raise SchemeError(f"unknown key '{key}' in a scheme{nearest(key, known)}")
        if "format" not in data:
            raise SchemeError("a scheme needs a 'format', e.g. 'int8'")
        for key in ("format", "granularity"):
            if not isinstance(data.get(key, ""), str):
                raise SchemeError(f"'{key}' of a scheme is text such as 'int8' or 'group32', not {data[key]!r}")
        fixed = data.get("fixed")
        if fixed is not None and not (isinstance(fixed, (list, tuple)) and len(fixed) == 2):
            raise SchemeError(f"'fixed' of a scheme is [scale, zero_point], not {fixed!r}")
        return cls(
            IntFormat.parse(data["format"]),
            Granularity.parse(data.get("granularity", "tensor")),
            symmetric=bool(data.get("symmetric", True)),
            scale=data.get("scale", "static"),
            range=data.get("range", "minmax"),
            fixed=(float(fixed[0]), int(fixed[1])) if fixed else None,
        )


def scheme(
    format: str,
    granularity: str = "tensor",
    *,
    symmetric: bool = True,
    scale: ScaleMode = "static",
    range: RangeName = "minmax",
    fixed: tuple[float, int] | None = None,
) -> Scheme:
    """A scheme from its written parts: `scheme("uint8", symmetric=False)`, `scheme("int4", "group32", scale="learned")`."""
    return Scheme(IntFormat.parse(format), Granularity.parse(granularity), symmetric, scale, range, fixed)
