"""What a training step of a job costs: float32, bfloat16 autocast, and each recipe with either kind of gradients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import qatana as qt
from qatana.batch import split_inputs
from qatana.hardware import describe, processor
from qatana.jobs import bench
from qatana.jobs.job import RecipeSection
from qatana.jobs.progress import Progress
from qatana.jobs.run import Run
from qatana.jobs.stages import versions
from qatana.jobs.training_step import PARTS, TrainingStep

FLOAT = "float32"
Rows = list[dict[str, Any]]


def steps(run: Run, sections: Sequence[RecipeSection], rounds: int, progress: Progress) -> dict[str, Any]:
    """Time and memory of a step of each, in interleaved rounds, and the ratios to the float32 step.

    The weights are those of a finished float stage, else those that the job starts from: speed does not depend on them. The batch
    is a training batch of the first recipe's size; the loss is the mean square of the logits, so that all have the same.
    Returns {"job", "batch", "rows": [{"name", "milliseconds", "ratio", "saved_bytes", "saved_ratio", "peak_bytes"}], "machine",
    "versions"}"""
    batch = next(iter(run.task.train(sections[0].batch_size, run.seed)))
    made: dict[str, TrainingStep] = {}
    for name, autocast in ((FLOAT, None), ("bfloat16 autocast", torch.bfloat16)):
        made[name] = _step(run.untrained(), batch, sections[0], autocast)
    for section in sections:
        progress.say(f"{section.name}: plan, prepare, calibrate")
        made[section.name] = _step(_prepared(run, section), batch, section, None)
        made[f"{section.name}, bfloat16 gradients"] = _step(_prepared(run, section), batch, section, torch.bfloat16)
    progress.say(f"{rounds} rounds of {len(made)} steps")
    before = torch.get_num_threads()
    torch.set_num_threads(bench.threads())
    try:
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        for number in progress.over("rounds", range(bench.WARMUP + rounds), bench.WARMUP + rounds):
            for name, step in made.items():
                turn = step.turn()
                turns[name] += [turn] if number >= bench.WARMUP else []
        rows = [_row(name, step, turns[name], turns[FLOAT]) for name, step in made.items()]
    finally:
        torch.set_num_threads(before)
    for row in rows:
        row["saved_ratio"] = row["saved_bytes"] / rows[0]["saved_bytes"]
    shape = [list(x.shape) for x in _tensors(batch)]
    place = describe() | {"processor": processor(), "threads": bench.threads()}
    return {"job": run.job.name, "batch": shape, "rows": rows, "machine": place, "versions": versions()}


def _prepared(run: Run, section: RecipeSection) -> nn.Module:
    model = run.untrained()
    model = qt.prepare(model, qt.plan(model, run.job.recipe(section), run.task.sample(2, 16)))
    qt.calibrate(model, run.task.calibration(section.calibration.batch_size, run.seed), batches=1)
    return model


def _step(model: nn.Module, batch: Any, section: RecipeSection, autocast: torch.dtype | None) -> TrainingStep:
    args, kwargs = split_inputs(batch, model)
    optimizer = section.training.optimizer if section.training is not None else "adamw"
    return TrainingStep(model, lambda network: network(*args, **kwargs), optimizer, autocast)


def _tensors(batch: Any) -> list[torch.Tensor]:
    args, kwargs = split_inputs(batch)
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def _row(
    name: str, step: TrainingStep, turns: list[dict[str, float]], base: list[dict[str, float]]
) -> dict[str, Any]:  # fmt: skip
    """Ratios round by round: both steps of a round met the same machine."""
    ratios = [ours["step"] / theirs["step"] for ours, theirs in zip(turns, base, strict=True)]
    return {
        "name": name,
        "milliseconds": {part: statistics.median(turn[part] for turn in turns) for part in PARTS},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "saved_bytes": step.saved_bytes(),
        "peak_bytes": step.peak_bytes(),
    }
