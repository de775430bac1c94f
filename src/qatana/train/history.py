"""History: what a training recorded, one dict per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatana.files import write_json


@dataclass
class History:
    """records: one dict per step, of plain numbers and text, so that JSON loses nothing.

    "step" (from 1), "loss", "lr", "grad_norm" (before clipping), "phase" (of the Controller); "saturation" and
    "scale_drift" at sampled steps, else None; with distillation also
    "distillation_loss" and, where they count, "hidden_loss" and "task_loss"."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def series(self, key: str) -> list[Any]:
        """The value of a key at each step, None where there is none."""
        return [record.get(key) for record in self.records]

    def marks(self) -> list[dict[str, Any]]:
        """{"step", "text"} wherever the phase changes."""
        phases = self.series("phase")
        changes = [i for i in range(1, len(phases)) if phases[i] != phases[i - 1]]
        return [{"step": self.records[i]["step"], "text": str(phases[i])} for i in changes]

    def curve(self) -> dict[str, Any]:
        """The series that a report draws, by its names."""
        names = ("step", "loss", "lr", "saturation", "scale_drift")
        return {name: self.series(name) for name in names} | {"marks": self.marks()}

    def save(self, path: str | Path) -> None:
        """Write the records as JSON."""
        write_json(path, {"records": self.records})
