"""Number formats as values: the set of numbers that a quantized tensor may hold, and their codes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

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


Values = TypeVar("Values", bound=Codebook | Callable[[], Iterable[float]])


def register_format(values: Values) -> Values:
    """A number format of your own, by the name under which schemes write it from then on: "quarters/group32".

    values  a function that returns the values in the order of their codes, 2 to 256 of them: the format is called like it, and a value
            is what its float32 is. Or a Codebook, which has its own name and rules for ties
    Scales map the largest |value| of a block to the largest of the table. A file that holds the format is read where it is registered.
    Raises: SchemeError for a name that is taken or not a plain word, and for values that make no table."""
    book = values
    if not isinstance(book, Codebook):
        numbers = torch.tensor(list(values()), dtype=torch.float32).tolist()  # type: ignore[operator]
        book = Codebook(getattr(values, "__name__", ""), tuple(numbers))
    if not re.fullmatch(r"[a-z][a-z0-9_-]*", book.name):
        raise SchemeError(f"a format's name is lower-case letters, digits and '_', not '{book.name}'")
    if CODEBOOKS.get(book.name) != book and _is_known(book.name):
        raise SchemeError(f"the number format '{book.name}' exists already; take another name")
    CODEBOOKS[book.name] = book
    return values


def _is_known(name: str) -> bool:
    try:
        parse_format(name)
    except SchemeError:
        return False
    return True


__all__ = [
    "BINARY", "CODEBOOKS", "DYNAMIC8", "DYNAMIC8_CPU", "FP4", "NF4", "Codebook", "FloatFormat", "Format",
    "GgufFormat", "IntFormat", "parse_format", "register_format",
]  # fmt: skip
