"""Planning by module names alone, and weights that several layers have in common."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from qatana.prepare.modules import Flow
from qatana.recipe import Plan


def everything(model: nn.Module) -> Flow:
    """The flow of a model that was not run: every layer is taken to run, on an input of its own."""
    flow = Flow()
    flow.inputs = {name: -1 - i for i, (name, _) in enumerate(model.named_modules())}
    return flow


def share_tied(plan: Plan, model: nn.Module) -> None:
    """Layers with one weight and one scheme for it get one quantizer: their codes are equal after training too, and stored once."""
    first: dict[int, Any] = {}
    modules = dict(model.named_modules())
    for i, row in enumerate(plan.rows):
        weight: Any = getattr(modules.get(row.module), "weight", None) if row.role == "weight" else None
        if row.scheme is None or not isinstance(weight, nn.Parameter):
            continue
        owner = first.setdefault(id(weight), row)
        if owner is not row and owner.scheme == row.scheme and not row.shares:
            plan.rows[i] = replace(row, shares=owner.name)
