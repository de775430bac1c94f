"""Integer formats: the codes are consecutive integers, a level is a code minus its zero point."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qatana.errors import SchemeError

_NAME = re.compile(r"(u?)int([1-8])(n?)")


@dataclass(frozen=True)
class IntFormat:
    """Integers of `bits` bits.   signed: [-2^(b-1), 2^(b-1)-1], narrow: [-(2^(b-1)-1), 2^(b-1)-1], unsigned: [0,
    2^b-1].

    Written "int8", "uint4", and "int8n" for the narrow (symmetric) signed range; "int2n" is the ternary {-1, 0, 1}.
    Raises: SchemeError for other widths than 1 to 8 and for a narrow unsigned format."""

    bits: int
    signed: bool = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SchemeError(f"an integer format has 1 to 8 bits, not {self.bits}")
        if self.narrow and not self.signed:
            raise SchemeError("a narrow range exists for signed formats only: use 'uint' without 'n'")
        if self.narrow and self.bits == 1:
            raise SchemeError("a narrow int1 holds 0 alone: use 'binary' for {-1, +1} or 'int2n' for {-1, 0, 1}")

    @classmethod
    def parse(cls, name: str) -> IntFormat:
        match = _NAME.fullmatch(name)
        if match is None:
            raise SchemeError(f"unknown number format '{name}'; write 'int8', 'uint4', 'int8n' (1 to 8 bits)")
        return cls(int(match[2]), signed=not match[1], narrow=bool(match[3]))

    @property
    def lo(self) -> int:
        return 0 if not self.signed else -(2 ** (self.bits - 1)) + self.narrow

    @property
    def hi(self) -> int:
        return 2 ** (self.bits - self.signed) - 1

    @property
    def stored_bits(self) -> int:
        """The width that files hold: 1, 2, 4 or 8 bits."""
        return next(width for width in (1, 2, 4, 8) if self.bits <= width)

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype that stores one code per byte."""
        return torch.int8 if self.signed else torch.uint8

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}int{self.bits}{'n' if self.narrow else ''}"
