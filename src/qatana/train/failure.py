"""When training cannot go on: the step, what was seen, the likely cause and the remedy, in one line."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from qatana.errors import QatanaError

IGNORE = -100


class TrainingError(QatanaError):
    """A training that cannot start as asked, or whose loss or gradients became NaN or infinite."""


def diverged(step: int, what: str, value: float, model: nn.Module, batch: Any, losses: list[float]) -> TrainingError:
    """The error for a `what` ("loss", "gradient norm") that is not finite at `step`, counted from 1."""
    kind = "NaN" if math.isnan(value) else "infinite"
    return TrainingError(f"step {step}: the {what} is {kind}; {_cause(step, model, batch, losses)}")


def _cause(step: int, model: nn.Module, batch: Any, losses: list[float]) -> str:
    named = dict(batch) if hasattr(batch, "items") else {}
    listed = list(batch) if isinstance(batch, (tuple, list)) else [] if named else [batch]
    for name, value in [*named.items(), *enumerate(listed)]:
        if not _finite(value):
            return f"input {name!r} of the batch holds NaN or infinite values: clean the data"
    labels = named.get("labels")
    if labels is not None and bool((labels == IGNORE).all()):
        return f"every label of the batch is {IGNORE}, so its loss is a mean over nothing: drop such batches"
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return (
                f"parameter '{name}' holds NaN or infinite values: an earlier update was too large, "
                f"lower lr or set clip"
            )
    # Gradients are made from the loss backwards: the last bad parameter is nearest to where it began.
    bad = [name for name, p in model.named_parameters() if not _finite(p.grad)]
    if bad:
        return (
            f"it begins in the gradient of '{bad[-1]}' ({len(bad)} parameters): an outlier there overflows "
            f"its scale; leave that layer float (Recipe.skip), calibrate again with a wider range, or lower lr"
        )
    if len(losses) > 1 and losses[-1] > 2 * min(losses):
        return f"it had grown from {min(losses):.4g} to {losses[-1]:.4g} before: lower lr, lengthen warmup or set clip"
    when = (
        "the model's output is not finite from the first step: check the calibration"
        if step == 1
        else "lower lr or set clip"
    )
    return f"data and parameters are finite, so an activation overflowed: {when}"


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
