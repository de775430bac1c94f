"""Floating-point formats of few bits: sign, `exponent` bits, `mantissa` bits, with subnormals.

With bias = 2^(exponent-1) - 1 and smallest normal 2^(1-bias):
    value = (-1)^s * 2^(max(E, 1) - bias) * ([E > 0] + M / 2^mantissa)
Rounding is to nearest, ties to the even mantissa, and saturates: nothing becomes infinity or NaN.
Reference: OCP 8-bit Floating Point Specification 1.0 (E4M3, E5M2); OCP Microscaling Formats 1.0 (E2M1, E2M3, E3M2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qatana.errors import SchemeError

_NAME = re.compile(r"float\((\d+),\s*(\d+)\)(fn|ieee|)")
_NAMES = {
    "e4m3": (4, 3, "fn"), "e5m2": (5, 2, "ieee"), "e2m3": (2, 3, ""), "e3m2": (3, 2, ""), "e2m1": (2, 1, ""),
}  # fmt: skip


@dataclass(frozen=True)
class FloatFormat:
    """A float of 1 + exponent + mantissa bits; a code is its bit pattern (uint8, int32 above 8 bits).

    special  "" every pattern is a number (OCP MX);  "fn" exponent and mantissa all ones is NaN, no infinity (E4M3FN);
             "ieee" the largest exponent is kept for infinity and NaN (E5M2, float16)
    Written "e4m3" (that is E4M3FN), "e5m2", "e2m1", "e2m3", "e3m2"; any other "float(e,m)", "float(e,m)fn", "float(e,m)ieee".
    Raises: SchemeError outside 1..7 exponent bits, 1..10 mantissa bits."""

    exponent: int
    mantissa: int
    special: str = ""

    def __post_init__(self) -> None:
        if not (1 <= self.exponent <= 7 and 1 <= self.mantissa <= 10):
            raise SchemeError(
                f"float({self.exponent},{self.mantissa}): a float format has 1 to 7 exponent bits and 1 to 10 mantissa bits"
            )
        if self.special not in ("", "fn", "ieee"):
            raise SchemeError(f"unknown kind of special values '{self.special}'; write '', 'fn' or 'ieee'")
        if self.special == "ieee" and self.exponent < 2:
            raise SchemeError(
                "float(1,m)ieee has no normal number left: its one exponent bit would be infinity and NaN"
            )

    @classmethod
    def parse(cls, name: str) -> FloatFormat | None:
        """The format of that name, or None if it is no float's name."""
        if name in _NAMES:
            return cls(*_NAMES[name])
        match = _NAME.fullmatch(name)
        return cls(int(match[1]), int(match[2]), match[3]) if match else None

    def __str__(self) -> str:
        named = [name for name, parts in _NAMES.items() if parts == (self.exponent, self.mantissa, self.special)]
        return named[0] if named else f"float({self.exponent},{self.mantissa}){self.special}"

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def stored_bits(self) -> int:
        return self.bits

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int32

    @property
    def bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest)): emax of the MX specification."""
        return 2**self.exponent - 1 - self.bias - (self.special == "ieee")

    @property
    def largest(self) -> float:
        """The largest finite value: 448 (E4M3FN), 57344 (E5M2), 7.5, 28, 6 (E2M3, E3M2, E2M1)."""
        return 2.0**self.largest_exponent * (2 - 2.0**-self.mantissa * (1 + (self.special == "fn")))

    @property
    def smallest_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    def nearest_(self, t: Tensor) -> Tensor:
        """The nearest value of the format without an upper bound, ties to even, in place; -0 stays -0.

        Adding and subtracting c = 1.5 * 2^(23 - mantissa) * 2^e, e the exponent of t (at least that of the smallest normal),
        leaves `mantissa` fraction bits: the addition itself rounds to nearest even. |t| must stay below 2^90."""
        signs = t.clone()
        c = torch.bitwise_and(t.view(torch.int32), 0x7F800000).view(torch.float32)
        c.clamp_min_(self.smallest_normal).mul_(1.5 * 2.0 ** (23 - self.mantissa))
        return t.add_(c).sub_(c).copysign_(signs)

    def round_(self, t: Tensor) -> Tensor:
        """Nearest value, saturating, in place (float32)."""
        return self.nearest_(t.clamp_(-2 * self.largest, 2 * self.largest)).clamp_(-self.largest, self.largest)

    def encode(self, values: Tensor) -> Tensor:
        """Bit patterns of values that lie on the grid."""
        raw = values.contiguous().view(torch.int32)
        magnitude = raw & 0x7FFFFFFF
        shift = 23 - self.mantissa
        normal = (magnitude >> shift) - ((127 - self.bias) << self.mantissa)
        subnormal = (values.abs() * 2.0 ** (self.bias - 1 + self.mantissa)).to(torch.int32)
        code = torch.where(values.abs() < self.smallest_normal, subnormal, normal)
        sign = (raw < 0).to(torch.int32) << (self.bits - 1)
        return (code | sign).to(self.dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Values (float32) of bit patterns; those kept for NaN and infinity give them."""
        return float_table(self).to(codes.device)[codes.long()]


@lru_cache
def float_table(format: FloatFormat) -> Tensor:
    """All values in code order, (2^bits,) float32."""
    e, m, bias = format.exponent, format.mantissa, format.bias
    half = []
    for code in range(2 ** (e + m)):
        power, fraction = code >> m, (code & (2**m - 1)) / 2**m
        half.append(2.0 ** (max(power, 1) - bias) * ((power > 0) + fraction))
    if format.special == "fn":
        half[-1] = float("nan")
    elif format.special == "ieee":
        half[-(2**m) :] = [float("inf")] + [float("nan")] * (2**m - 1)
    positive = torch.tensor(half)
    return torch.cat([positive, -positive])
