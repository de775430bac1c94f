"""What a batch is: how the tensors that a model takes are found in whatever a loader yields; and how a model is only looked at."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qatana.errors import DataError

LABELS = ("labels", "label", "word_ids")


def split_inputs(batch: Any, model: nn.Module | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) for `model(*args, **kwargs)`.

    A tensor is the only argument; a mapping gives keyword arguments without its labels; of a tuple the model takes as many as its
    forward has parameters, so (images, labels) works.   Raises: DataError for anything else."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if hasattr(batch, "items"):
        return (), {k: v for k, v in batch.items() if k not in LABELS}
    if isinstance(batch, (tuple, list)) and batch:
        taken = tuple(batch)[: _positional(model)] if model is not None else tuple(batch)
        if len(taken) == 1 and hasattr(taken[0], "items"):
            return split_inputs(taken[0], model)
        return taken, {}
    raise DataError(f"a batch is a tensor, a tuple or a dict of tensors, not {type(batch).__name__}")


def _positional(model: nn.Module) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return 1
    return max(1, sum(p.kind in kinds for p in parameters))


def check_finite(batch: Any, index: int) -> None:
    """Raise DataError if a float tensor of batch number `index` holds NaN or infinity, or a tensor is empty."""
    args, kwargs = split_inputs(batch)
    for name, value in [*enumerate(args), *kwargs.items()]:
        if not isinstance(value, torch.Tensor):
            continue
        if value.numel() == 0:
            raise DataError(f"batch {index}: input {name!r} is empty (shape {tuple(value.shape)}); drop empty batches")
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            kind = "NaN" if bool(torch.isnan(value).any()) else "infinite"
            raise DataError(f"batch {index}: input {name!r} holds {kind} values; clean the data before calibration")


def move(batch: tuple[tuple[Any, ...], dict[str, Any]], device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments on a device."""
    args, kwargs = batch
    return (
        tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args),
        {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()},
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
