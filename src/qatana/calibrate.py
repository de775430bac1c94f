"""calibrate: run batches through the float model, then settle every scale. The result is the PTQ model, where QAT starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from qatana.batch import check_finite, move, split_inputs
from qatana.errors import DataError, ModelError
from qatana.nn.settle import settle_weights
from qatana.quantizer import merge_ranks, quantizers, total_over_ranks


def calibrate(
    model: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    batches: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> nn.Module:
    """Settle all scales of a prepared model and switch its quantizers on. Returns the model, now the PTQ model.

    loader    yields batches as the model takes them; labels are ignored. `batches` limits how many are used. None: for models whose
              scales need no data, those with weights alone or with activations quantized at run time
    progress  called with the number of batches done
    Under torch.distributed every process calibrates on its own batches, and all get the ranges of all.
    Raises: ModelError if the model has no quantizers or one saw no data; DataError for an empty loader or NaN or infinite values."""
    found = quantizers(model)
    if not found:
        raise ModelError("the model has no quantizers; call qatana.prepare(model, plan) first")
    if loader is None:
        waiting = next((name for name, quantizer in found.items() if quantizer.needs_range), None)
        if waiting is not None:
            raise ModelError(
                f"{waiting}: its range comes from data; call qatana.calibrate(model, loader) with some batches"
            )
        settle(model)
        return model
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    for quantizer in found.values():
        quantizer.enabled, quantizer.observing, quantizer.following = False, True, False
    model.eval()
    seen = 0
    try:
        with torch.no_grad():
            for batch in loader:
                if batches is not None and seen >= batches:
                    break
                args, kwargs = split_inputs(batch, model)
                check_finite(kwargs or args, seen)
                args, kwargs = move((args, kwargs), device)
                model(*args, **kwargs)
                seen += 1
                if progress is not None:
                    progress(seen)
    finally:
        for module, training in modes.items():
            module.training = training
        for quantizer in found.values():
            quantizer.observing = False
    merge_ranks(model)
    if total_over_ranks(seen, device) == 0:
        raise DataError("the calibration loader yielded no batch; check the data path, the split and the batch size")
    settle(model)
    return model


def settle(model: nn.Module) -> None:
    """Set all scales from what was observed (activations) and from the weights, and enable the quantizers."""
    settle_weights(model)
    for quantizer in quantizers(model).values():
        if not quantizer.is_weight:
            quantizer.settle()
        quantizer.enabled = True
