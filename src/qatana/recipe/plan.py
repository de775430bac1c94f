"""A plan: one row per tensor, with its scheme and the rule that won, or why it stays float."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qatana.errors import RecipeError
from qatana.numerics import Scheme
from qatana.recipe.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One tensor of the model.

    name      full name: module name + role ("layer1.0.conv1.weight")
    module    the module's name in the model; kind, type: its layer kind and class
    role      weight, input, output, query, key, value, probability, context
    scheme    how it is quantized; None: it stays float, for `reason`
    shares    name of the row whose quantizer serves this tensor too (it is the same tensor), or ""
    elements  number of stored elements (0 for activations);  scales: of their scales
    dense     stored as narrow as the format allows, whatever the layer (the free target)"""

    name: str
    module: str
    kind: str
    type: str
    role: str
    scheme: Scheme | None
    rule: str
    reason: str = ""
    shares: str = ""
    elements: int = 0
    scales: int = 0
    dense: bool = False

    @property
    def packed(self) -> bool:
        """Whether a file holds several codes of this tensor in a byte: of blocks and of tables; a layer whose scales are per
        tensor or channel runs on bytes, however narrow its codes are."""
        return self.scheme is not None and (
            self.dense or self.scheme.granularity.kind == "group" or self.kind == "embedding"
        )

    @property
    def bytes(self) -> float:
        """Stored bytes: codes and scales, or float32."""
        if self.scheme is None:
            return 4.0 * self.elements
        if self.shares:
            return 0.0
        bits = self.scheme.format.stored_bits if self.packed else max(8, self.scheme.format.stored_bits)
        return self.elements * bits / 8 + self._scale_bytes * self.scales if self.elements else 0.0

    @property
    def _scale_bytes(self) -> float:
        """Of one scale, and of its zero point where the free target stores one: as `numerics.stored` writes them."""
        if self.scheme is None or not self.dense:
            return 4.0
        if self.scheme.is_gguf:  # the bits of its elements count them
            return 0.0
        narrow = self.scheme.scale_type.name in ("float16", "bfloat16", "e8m0")
        zero_point = 0 if self.scheme.symmetric else 4 if self.scheme.rule.startswith("hqq") else 2
        return (2 if narrow else 4) + zero_point

    def to_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in asdict(self).items() if k != "dense" or v}
        return kept | {"scheme": str(self.scheme) if self.scheme else "float32", "bytes": round(self.bytes)}


@dataclass
class Plan:
    """What `prepare` will do to a model: rows, the recipe behind them, and how the model is reached ("modules" or
    "graph")."""

    recipe: Recipe
    mode: str
    rows: list[Row] = field(default_factory=list)
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    float_bytes: int = 0
    rest_bytes: int = 0
    folds: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def of_module(self, module: str) -> dict[str, Row]:
        return {row.role: row for row in self.rows if row.module == module}

    @property
    def predicted_bytes(self) -> int:
        """File size: codes, scales, and what stays float (biases, norms); graph overhead not counted."""
        return round(sum(row.bytes for row in self.rows if row.role == "weight") + self.rest_bytes)

    @property
    def quantized(self) -> list[Row]:
        return [row for row in self.rows if row.scheme is not None]

    def compact(self) -> dict[str, Any]:
        """What `prepare` needs to know, for a model's own configuration file: {"mode", "schemes": [scheme, ...], "tensors": ["module kind
        role number-of-scheme", with the name that it shares a quantizer with behind it, ...]}. Tensors that stay float are left out."""
        schemes = list(dict.fromkeys(str(row.scheme) for row in self.quantized))
        number = {text: str(i) for i, text in enumerate(schemes)}
        tensors = [
            " ".join((row.module or ".", row.kind, row.role, number[str(row.scheme)], row.shares)).rstrip()
            for row in self.quantized
        ]
        return {"mode": self.mode, "schemes": schemes, "tensors": tensors}

    @classmethod
    def from_compact(cls, recipe: Recipe, data: Any) -> Plan:
        """Read what `compact` wrote. Raises: RecipeError if it is damaged."""
        try:
            schemes, rows, free = [Scheme.parse(text) for text in data["schemes"]], [], recipe.resolved.free
            for line in data["tensors"]:
                module, kind, role, number, *shares = line.split(" ")
                module = "" if module == "." else module
                name, scheme = f"{module}.{role}" if module else role, schemes[int(number)]
                rows.append(Row(name, module, kind, "", role, scheme, "file", shares="".join(shares), dense=free))
            return cls(recipe, str(data["mode"]), rows)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise RecipeError(
                f"the plan in the model's configuration is damaged ({error!r}); save the model again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.to_dict(),
            "mode": self.mode,
            "float_bytes": self.float_bytes,
            "predicted_bytes": self.predicted_bytes,
            "rows": [row.to_dict() for row in self.rows],
        }

    def __str__(self) -> str:
        head = ("tensor", "type", "scheme", "rule", "note", "bytes")
        lines = [head] + [
            (
                row.name,
                row.type,
                str(row.scheme) if row.scheme else "float32",
                row.rule,
                row.reason or (f"= {row.shares}" if row.shares else ""),
                f"{row.bytes:,.0f}" if row.elements else "",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        table = "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )
        share = self.predicted_bytes / max(1, self.float_bytes)
        counts = f"{len(self.quantized)} of {len(self.rows)} tensors quantized"
        return f"{table}\n{counts}; file {self.predicted_bytes:,} bytes, {share:.3f} of float"
