"""Post-training quantization in one call: plan, prepare, calibrate."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import nn

from qatana.calibrate import calibrate
from qatana.errors import DataError
from qatana.prepare import plan, prepare
from qatana.recipe import Recipe


def ptq(model: nn.Module, recipe: Recipe | str, loader: Iterable[Any], *, batches: int | None = 16) -> nn.Module:
    """Quantize a trained model without training it. What comes back is also where QAT starts; `convert` and `export` take it.

    recipe   a Recipe or the name of a target: static ("ort:int8"), dynamic ("ort:int8-dynamic"), in blocks ("ort:int4")
    loader   yields batches as the model takes them, labels are ignored; the first one is the plan's example
    batches  how many calibrate; None: all
    The model is changed in place; use the returned one.   Raises: as `plan`, `prepare` and `calibrate`; DataError for no batch."""
    rest = iter(loader)
    first = next(rest, None)
    if first is None:
        raise DataError("calibration got no batch; check the data path, the split and the batch size")
    prepared = prepare(model, plan(model, recipe, first))
    return calibrate(prepared, itertools.chain([first], rest), batches=batches)
