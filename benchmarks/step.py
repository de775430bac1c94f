"""The price of training with quantization: a step of float32, bfloat16, qatana and its peers, in time and in memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bars import bars, judge, ratios
from benchmarks.contestants import CONTESTANTS, FLOAT
from benchmarks.inference import spread
from benchmarks.models import Shape
from benchmarks.race import race
from qatana.jobs.progress import Progress

Milliseconds = dict[str, float]
PARTS: dict[str, Callable[[Milliseconds], float]] = {
    "step": lambda ms: ms["step"],
    "without optimizer": lambda ms: ms["step"] - ms["optimizer"],
    "forward": lambda ms: ms["forward"],
    "backward": lambda ms: ms["backward"],
    "optimizer": lambda ms: ms["optimizer"],
}


def measure(
    name: str, shape: Shape, names: Sequence[str], rounds: int, threads: int, quick: bool, out: Path, progress: Progress
) -> dict[str, Any]:
    """Time, memory and ratios to float32 of every contestant on a model, and its bars."""
    progress.say(f"{shape.title}: {rounds} rounds of {len(names)} contestants, {threads} threads each")
    found = race(name, names, rounds, threads, quick, out, progress)
    return {
        "model": name,
        "title": shape.title,
        "optimizer": shape.optimizer,
        "contestants": [_row(key, entry, found.get(FLOAT, {})) for key, entry in found.items()],
        "bars": [judge(bar, found) for bar in bars(name) if {bar.who, bar.against} <= {*names}] if shape.judged else [],
    }


def _row(name: str, entry: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    contestant = CONTESTANTS[name]
    row = {"name": name, "title": contestant.title, "peer": contestant.peer}
    if "reason" in entry:
        return row | {"reason": entry["reason"]}
    row |= {"remark": entry["about"]["ready"], "versions": entry["about"]["versions"], "memory": entry["memory"]}
    row["milliseconds"] = {part: spread([of(ms) for ms in entry["rounds"]]) for part, of in PARTS.items()}
    row["operators"] = entry["operators"]
    if "rounds" in base:
        row["ratio"] = {part: _ratio(entry["rounds"], base["rounds"], of) for part, of in PARTS.items()}
        row["memory_ratio"] = {
            key: value / base["memory"][key] if value is not None and base["memory"][key] else None
            for key, value in entry["memory"].items()
        }
    return row


def _ratio(ours: list[Milliseconds], base: list[Milliseconds], of: Callable[[Milliseconds], float]) -> dict[str, float]:
    found = ratios(ours, base, of)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}
