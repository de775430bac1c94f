"""QAT from a checkpoint that another library quantized: on its grid, not on a new one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qatana.checkpoints import Checkpoint
from qatana.errors import ModelError
from qatana.ptq import ptq
from qatana.quantizer import Quantizer
from qatana.recipe import Recipe


def recipe_of(checkpoint: Checkpoint) -> Recipe:
    """Weights as the checkpoint holds them, everything else float: a recipe for the target "torch"."""
    found = Recipe(target="torch").rule(weight=None)
    for name, stored in checkpoint.weights.items():
        scheme = stored.scheme.with_(scale="static")
        found = found.rule(name.removesuffix(".weight"), weight=str(scheme))
    return found


def start_from(
    checkpoint: Checkpoint,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    recipe: Recipe | None = None,
    batches: int | None = 16,
) -> nn.Module:
    """The QAT model of a checkpoint: its weights, quantized by its own scales, so that they read back as its library reads them.

    model    the float architecture under the checkpoint's names; its parameters are overwritten, and it is changed in place
    loader   yields batches as the model takes them; the first one is the plan's example
    recipe   default: `recipe_of(checkpoint)`. Another one starts from the checkpoint's values; its weights take the checkpoint's scales
             where their scheme has the same format and granularity, and a scale that is static or learned
    Raises: ModelError if the checkpoint holds a weight that the model lacks, in that shape; else as `plan`, `prepare`, `calibrate`."""
    _load(checkpoint, model)
    prepared = ptq(model, recipe_of(checkpoint) if recipe is None else recipe, loader, batches=batches)
    for name, layer in prepared.named_modules():
        stored, quantizer = checkpoint.weights.get(f"{name}.weight"), getattr(layer, "weight_quantizer", None)
        if stored is None or stored.transposed or not isinstance(quantizer, Quantizer):
            continue
        ours, theirs = quantizer.scheme, stored.scheme
        if (ours.format, ours.granularity) == (theirs.format, theirs.granularity) and ours.scale != "dynamic":
            quantizer.take(stored.parameters)
    return prepared


def _load(checkpoint: Checkpoint, model: nn.Module) -> None:
    found, own = checkpoint.state_dict(torch.float32), model.state_dict()
    for name in checkpoint.weights:
        if name not in own or own[name].shape != found[name].shape:
            shape = tuple(own[name].shape) if name in own else None
            raise ModelError(
                f"the checkpoint holds '{name}' of shape {tuple(found[name].shape)}, the model has "
                + (f"it in shape {shape}" if shape else "no such parameter")
                + "; make the model from the checkpoint's own config"
            )
    model.load_state_dict({name: found[name] for name in found if name in own}, strict=False)
