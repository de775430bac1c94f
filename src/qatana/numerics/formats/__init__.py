"""Number formats as values: the set of numbers that a quantized tensor may hold, and their codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qatana.errors import SchemeError, nearest
from qatana.numerics import gguf
from qatana.numerics.formats.codebook import Codebook
from qatana.numerics.formats.integer import IntFormat
from qatana.numerics.formats.minifloat import FloatFormat
from qatana.numerics.formats.tables import BINARY, DYNAMIC8, DYNAMIC8_CPU, FP4, NF4


@dataclass(frozen=True)
class GgufFormat:
    """A GGUF block type by its name, "q4_0": format, scale type and block in one; `qatana.numerics.gguf` has its equations."""

    name: str

    def __post_init__(self) -> None:
        gguf.grid(self.name)

    def __str__(self) -> str:
        return f"gguf:{self.name}"

    @property
    def block(self) -> int:
        return gguf.grid(self.name).block

    @property
    def row(self) -> int:
        """What the last dimension must be a multiple of."""
        return gguf.grid(self.name).row

    @property
    def bits_per_element(self) -> float:
        grid = gguf.grid(self.name)
        return 8 * grid.row_bytes / grid.row

    @property
    def bits(self) -> int:
        """Bits of a code, the scale's share left out and rounded down."""
        return max(1, int(self.bits_per_element))

    @property
    def stored_bits(self) -> float:
        return self.bits_per_element

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8


Format = IntFormat | FloatFormat | Codebook | GgufFormat

CODEBOOKS = {book.name: book for book in (NF4, FP4, DYNAMIC8, DYNAMIC8_CPU, BINARY)}


def parse_format(name: str) -> Format:
    """The format of that name: 'int8', 'e4m3', 'float(3,4)', 'nf4'. Raises: SchemeError naming the nearest known one."""
    if name.startswith("gguf:"):
        return GgufFormat(name[5:].lower())
    known = CODEBOOKS.get(name) or FloatFormat.parse(name)
    if known is not None:
        return known
    if not name.startswith(("int", "uint")):
        hint = nearest(
            name,
            ["int8", "uint4", "int8n", "e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "float(e,m)", "gguf:q4_0", *CODEBOOKS],
        )
        raise SchemeError(f"unknown number format '{name}'{hint}")
    return IntFormat.parse(name)


__all__ = [
    "BINARY", "CODEBOOKS", "DYNAMIC8", "DYNAMIC8_CPU", "FP4", "NF4", "Codebook", "FloatFormat", "Format",
    "GgufFormat", "IntFormat", "parse_format",
]  # fmt: skip
