"""Certificate: what was compared, what differed, what may differ, and the verdict.

ALLOWED is the written table: nothing else decides a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qatana.errors import ParityError
from qatana.files import write_json


class Allowed(NamedTuple):
    """How many of the compared elements (rate), and of the labels, may differ, and why."""

    rate: float
    labels: float
    reason: str

    def covers(self, compared: int, different: int, labels: int, labels_different: int) -> bool:
        """One label is allowed where the rate alone would allow a fraction of one."""
        most = max(1.0, self.labels * labels) if self.labels else 0.0
        return different <= self.rate * compared and labels_different <= most


ALLOWED: dict[str, Allowed] = {
    "constants": Allowed(0, 0, "the file holds the artifact's integers and scales verbatim"),
    "training": Allowed(0, 0, "training computes the integers that ship"),
    "layer by layer": Allowed(0, 0, "given equal inputs, every integer operator of the file equals the reference in every output"),
    "end to end, integers only": Allowed(0, 0, "no float operator stands between the integers"),
    "float operators": Allowed(
        1e-4, 0,
        "softmax, GELU and LayerNorm round differently in torch and in the engine: about 1 code in 100,000 changes at their place",
    ),
    "end to end": Allowed(
        0.1, 5e-4,
        "a code that a float operator moved is carried on to every code of its sequence, most by one step; what counts is that labels "
        "stay (5 in 10,000), that integer operators are exact, and that float operators move few codes at their place",
    ),
    "end to end, ranges at run time": Allowed(
        1, 5e-4,
        "codes of activations follow float ranges at run time: the last bit of one float moves codes all over its sentence, most "
        "by one step; labels and the exactness of each operator are what counts",
    ),
    "another engine": Allowed(
        1, 5e-4,
        "the file is made for another engine, and handing out codes may change what this one fuses: rates tell where codes differ; labels "
        "come from the untouched file",
    ),
}  # fmt: skip


@dataclass
class Tally:
    """Elements of one tensor, over all batches.   left, right of the first element that differs, with its index."""

    name: str
    operator: str
    compared: int = 0
    different: int = 0
    max_difference: float = 0.0
    index: list[int] | None = None
    left: float = 0.0
    right: float = 0.0

    @property
    def rate(self) -> float:
        return self.different / self.compared if self.compared else 0.0

    def compare(self, left: Any, right: Any, tolerance: Any = None) -> None:
        """Count elements that differ (by more than `tolerance`, an array of bounds, if one is given)."""
        a, b = np.asarray(left), np.asarray(right)
        if a.shape != b.shape:
            self.missing(max(a.size, b.size))
            return
        self.compared += a.size
        unequal = (a != b) & ~((a != a) & (b != b))
        if not unequal.any():
            return
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
        if tolerance is not None:
            unequal &= ~(difference <= np.asarray(tolerance))
        self.different += int(unequal.sum())
        if self.index is None and unequal.any():
            where = np.unravel_index(int(np.argmax(unequal)), a.shape)
            self.index = [int(i) for i in where]
            self.left, self.right = float(a[where]), float(b[where])
        self.max_difference = max(self.max_difference, float(difference.max(initial=0, where=~np.isnan(difference))))

    def missing(self, elements: int) -> None:
        """Count elements that one side lacks."""
        self.compared += elements
        self.different += elements
        self.index = [] if self.index is None else self.index
        self.max_difference = float("inf")

    def place(self) -> str:
        """Where the first difference is, and both values."""
        if self.index is None:
            return ""
        if not self.index:
            return ", which one side lacks or has in another shape"
        return f" at index {self.index}: {self.left:.9g} against {self.right:.9g}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "operator": self.operator,
            "codes": self.compared,
            "different": self.different,
            "rate": self.rate,
            "max_difference": _json(self.max_difference),
        }


@dataclass
class Comparison:
    """Two models, tensor by tensor in flow order.

    allowed  a row of ALLOWED, or "" where nothing is judged; `began_at` says which operator made the first difference"""

    left: str
    right: str
    mode: str
    allowed: str = ""
    engine: str = ""
    tallies: dict[str, Tally] = field(default_factory=dict)
    labels_compared: int = 0
    labels_different: int = 0
    began_at: str = ""
    note: str = ""

    def tally(self, name: str, operator: str) -> Tally:
        return self.tallies.setdefault(name, Tally(name, operator))

    @property
    def compared(self) -> int:
        return sum(t.compared for t in self.tallies.values())

    @property
    def different(self) -> int:
        return sum(t.different for t in self.tallies.values())

    @property
    def first(self) -> Tally | None:
        """The first tensor, in flow order, in which something differs."""
        return next((t for t in self.tallies.values() if t.different), None)

    @property
    def passed(self) -> bool:
        if not self.allowed:
            return True
        row = ALLOWED[self.allowed]
        return row.covers(self.compared, self.different, self.labels_compared, self.labels_different)

    def describe(self) -> str:
        """One line: how much differs, where first, and what began it."""
        first = self.first
        limit = ALLOWED[self.allowed].rate if self.allowed else 0.0
        text = f"{self.left} and {self.right} differ in {self.different} of {self.compared} elements ({self.mode}; allowed rate {limit:g})"
        if first is not None:
            text += f"; first in '{first.name}' ({first.operator}){first.place()}"
        if self.began_at:
            text += f"; began at {self.began_at}"
        if self.labels_different:
            text += f"; {self.labels_different} of {self.labels_compared} labels differ"
        return text

    def to_dict(self) -> dict[str, Any]:
        first = self.first
        return {
            "left": self.left,
            "right": self.right,
            "engine": self.engine,
            "mode": self.mode,
            "tensors_compared": len(self.tallies),
            "codes_compared": self.compared,
            "codes_different": self.different,
            "labels_compared": self.labels_compared,
            "labels_different": self.labels_different,
            "first_difference": None if first is None else {
                "tensor": first.name, "index": first.index, "left": _json(first.left), "right": _json(first.right)
            },
            "drift_began_at": self.began_at or None,
            "layers": [t.to_dict() for t in self.tallies.values()],
            "allowed": self.allowed,
            "allowed_rate": ALLOWED[self.allowed].rate if self.allowed else None,
            "allowed_labels": ALLOWED[self.allowed].labels if self.allowed else None,
            "note": self.note,
            "verdict": ("pass" if self.passed else "fail") if self.allowed else None,
        }  # fmt: skip


@dataclass
class Certificate:
    """Result of `verify`. Its dictionary is JSON and fits the report's certificate section.

    problems  what is wrong with the file as a whole (a product that runs in float); any of them fails it"""

    target: str
    engine: str
    machine: dict[str, Any]
    versions: dict[str, str]
    file: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list)
    kernels: dict[str, int] = field(default_factory=dict)
    exposing: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    batches: int = 0

    @property
    def verdict(self) -> bool:
        """True if nothing differs beyond ALLOWED."""
        return not self.problems and all(comparison.passed for comparison in self.comparisons)

    @property
    def parity(self) -> dict[str, int]:
        """The integer model against the file: outputs of every integer operator given the file's own inputs ("layer by layer";
        an engine that is judged end to end only: codes end to end), and labels end to end."""
        ends = self._mode("end to end")
        codes = self._mode("layer by layer") or ends
        return {
            "codes_compared": sum(c.compared for c in codes),
            "codes_different": sum(c.different for c in codes),
            "labels_compared": sum(c.labels_compared for c in ends),
            "labels_different": sum(c.labels_different for c in ends),
        }

    @property
    def drift(self) -> dict[str, int]:
        """End to end, from the same batch: codes at every quantizer. They drift apart behind float operators that round differently."""
        ends = self._mode("end to end")
        return {
            "codes_compared": sum(c.compared for c in ends),
            "codes_different": sum(c.different for c in ends),
        }

    def _mode(self, mode: str) -> list[Comparison]:
        return [c for c in self.comparisons if c.mode == mode]

    def comparison(self, mode: str) -> Comparison:
        """The comparison of that mode. Raises: KeyError."""
        for comparison in self.comparisons:
            if comparison.mode == mode:
                return comparison
        raise KeyError(mode)

    def raise_on_difference(self) -> Certificate:
        """The certificate itself if its verdict is true. Raises: ParityError naming the first tensor that differs."""
        for problem in self.problems:
            raise ParityError(problem)
        for comparison in self.comparisons:
            if not comparison.passed:
                raise ParityError(comparison.describe())
        return self

    def to_dict(self) -> dict[str, Any]:
        used = {c.allowed for c in self.comparisons if c.allowed}
        rows = {name: row._asdict() for name, row in ALLOWED.items() if name in used}
        return {
            "verdict": "pass" if self.verdict else "fail",
            "target": self.target,
            "engine": self.engine,
            "isa": self.machine.get("isa", ""),
            "machine": self.machine,
            "versions": self.versions,
            "files": [self.file],
            "batches": self.batches,
            "parity": self.parity,
            "drift": self.drift,
            "allowed": "; ".join(
                f"{name}: {row['rate']:g} of the elements, {row['labels']:g} of the labels"
                for name, row in rows.items()
            ),
            "allowed_table": rows,
            "problems": self.problems,
            "kernels": self.kernels,
            "exposing": self.exposing,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }

    def save(self, path: str | Path) -> Path:
        """Write certificate.json (under a temporary name, then renamed). A folder as `path` gets a file of that name."""
        path = Path(path)
        path = path / "certificate.json" if path.is_dir() or not path.suffix else path
        write_json(path, self.to_dict())
        return path

    def __str__(self) -> str:
        lines = [
            f"{'pass' if self.verdict else 'FAIL'}: {self.file.get('path', '')} in {self.engine}, {self.batches} batches"
        ]
        lines += [f"  {problem}" for problem in self.problems]
        for c in self.comparisons:
            labels = f", labels {c.labels_different} of {c.labels_compared}" if c.labels_compared else ""
            began = f", began at {c.began_at}" if c.began_at else ""
            lines.append(f"  {c.mode}: {c.different} of {c.compared} different{labels}{began}")
        return "\n".join(lines)


def _json(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become "NaN", "Infinity", "-Infinity"."""
    if math.isnan(value):
        return "NaN"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")
