"""The price of training with quantization: one step against one float step, in time and in memory that the backward pass keeps."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import Tensor, nn

import qatana as qt
from benchmarks.inference import spread
from benchmarks.models import Shape
from qatana.batch import split_inputs
from qatana.jobs.bench import times
from qatana.jobs.progress import Progress

FLOAT, QAT = "float step", "QAT step"


def measure(shape: Shape, target: str, rounds: int, threads: int, progress: Progress) -> dict[str, Any]:
    """Time and saved activations of a step (forward, backward, AdamW) of the float model and of the prepared one."""
    progress.say(f"{shape.title}: float step and {target} step, {rounds} rounds, {threads} threads")
    before = shape.make()
    model = copy.deepcopy(before)
    model = qt.prepare(model, qt.plan(model, qt.recipe(target).skip("classifier"), shape.batch(0)))
    qt.calibrate(model, [shape.batch(1)])
    steps = {FLOAT: Step(before), QAT: Step(model)}
    found = times(steps, shape.batch(0), rounds, progress, threads)
    kept = {name: step.saved_bytes(shape.batch(0)) for name, step in steps.items()}
    ratios = [qat / plain for plain, qat in zip(found[FLOAT], found[QAT], strict=True)]
    return {
        "title": shape.title,
        "target": target,
        "milliseconds": {name: spread(values) for name, values in found.items()},
        "saved_bytes": kept,
        "time_ratio": statistics.median(ratios),
        "memory_ratio": kept[QAT] / kept[FLOAT],
    }


class Step:
    """One training step on a batch; the loss is the mean square of the logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(qt.parameter_groups(model, lr=1e-5, weight_decay=0.01))

    def __call__(self, batch: Any) -> None:
        self.optimizer.zero_grad()
        self._loss(batch).backward()
        self.optimizer.step()

    def _loss(self, batch: Any) -> Tensor:
        args, kwargs = split_inputs(batch, self.model)
        out = self.model(*args, **kwargs)
        return (out["logits"] if hasattr(out, "items") else out).square().mean()

    def saved_bytes(self, batch: Any) -> int:
        """Bytes that autograd keeps for the backward pass, each storage once, parameters and buffers left out."""
        own = {t.untyped_storage().data_ptr() for t in (*self.model.parameters(), *self.model.buffers())}
        kept: dict[int, Tensor] = {}  # tensors are held, so that no address is used twice

        def pack(x: Tensor) -> Tensor:
            if x.untyped_storage().data_ptr() not in own:
                kept.setdefault(x.untyped_storage().data_ptr(), x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self._loss(batch)
        del loss
        return sum(x.untyped_storage().nbytes() for x in kept.values())
