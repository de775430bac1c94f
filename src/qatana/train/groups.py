"""Optimizer groups: what decays, what does not, and scales apart.

Weight decay belongs to the matrices and convolution kernels that multiply activations. Without it stay
* biases and norms (fewer than two dimensions): decay shifts or shrinks features and regularizes nothing;
* embedding tables: a batch has gradients for the rows it uses, but decoupled decay shrinks every row at every
  step, and rows that never occur would lose their pretrained codes;
* learned scales: decay pulls them to 0, towards ever more clipping. They have a rate of their own too, since an
  Adam step is about lr in absolute size, whatever the size of the scale.

Weights that are stepped by codes (`CodeUnits`) have a rate of their own, as their unit is another; norms that are stepped by shares of
themselves have the rate of scales, whose unit is the same."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from qatana.errors import ModelError
from qatana.nn.embedding import Embedding
from qatana.quantizer import Quantizer
from qatana.train.code_units import coded_weights, norm_weights
from qatana.train.failure import TrainingError

ORDER = ("weights", "codes", "plain", "tables", "norms", "scales")


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    scale_lr: float | None = None,
    *,
    code_lr: float | None = None,
    factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: {"name", "params", "lr", "weight_decay"}, in a fixed order, none empty.

    "weights"  parameters of two and more dimensions, with `weight_decay`
    "plain"    biases, norms and embedding tables, without
    "codes"    if `code_lr` is given: weights that `CodeUnits` steps by codes, with `weight_decay`, at that rate
    "tables"   if `code_lr` is given: embedding tables among them, without, at that rate
    "norms"    if `code_lr` is given: norms' weights that `CodeUnits` steps by shares of themselves, without, at `scale_lr` (None: lr)
    "scales"   learned scales of quantizers, without, at `scale_lr` (None: lr)
    factors    {name pattern: multiple of the rate}, the first match wins, e.g. {"classifier*": 10}: such parameters
               have groups of their own
    A tied parameter appears once; one that needs no gradient does not appear.
    Raises: TrainingError for negative rates; ModelError if nothing is left to train."""
    for name, value in {
        "lr": lr,
        "weight_decay": weight_decay,
        "scale_lr": lr if scale_lr is None else scale_lr,
        "code_lr": 0.0 if code_lr is None else code_lr,
    }.items():
        if not value >= 0:
            raise TrainingError(f"{name}={value} must be a number of at least 0")
    scales, tables = set(), set()
    for module in model.modules():
        if isinstance(module, Quantizer) and module.learned:
            scales.add(id(module.scale))
        elif isinstance(module, (Embedding, nn.Embedding, nn.EmbeddingBag)):
            tables.add(id(module.weight))
    coded = set() if code_lr is None else {id(one.weight) for one in coded_weights(model)}
    norms = set() if code_lr is None else {id(weight) for weight in norm_weights(model)}
    share_lr = lr if scale_lr is None else scale_lr
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in scales | norms:
            kind, rate, decay = "scales" if id(parameter) in scales else "norms", share_lr, 0.0
        elif id(parameter) in coded:
            assert code_lr is not None
            table = id(parameter) in tables
            kind, rate, decay = "tables" if table else "codes", code_lr, 0.0 if table else weight_decay
        elif parameter.ndim < 2 or id(parameter) in tables:
            kind, rate, decay = "plain", lr, 0.0
        else:
            kind, rate, decay = "weights", lr, weight_decay
        pattern = next((p for p in factors or {} if fnmatchcase(name, p)), None)
        if factors and pattern is not None:
            kind, rate = f"{kind} {pattern}", rate * factors[pattern]
        made = groups.setdefault(kind, {"name": kind, "params": [], "lr": rate, "weight_decay": decay})
        made["params"].append(parameter)
    if not groups:
        raise ModelError(
            "no parameter of the model needs a gradient; call requires_grad_(True) on what is to be trained"
        )
    return [groups[kind] for kind in sorted(groups, key=lambda kind: (ORDER.index(kind.split()[0]), kind))]
