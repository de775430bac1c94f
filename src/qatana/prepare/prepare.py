"""plan and prepare: the two verbs before training."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qatana.batch import split_inputs
from qatana.errors import ModelError
from qatana.prepare.graph import plan_graph, prepare_graph
from qatana.prepare.modules import is_finite, plan_modules, prepare_modules
from qatana.recipe import Plan, Recipe

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def plan(model: nn.Module, recipe: Recipe | str, example_inputs: Any, *, mode: str | None = None) -> Plan:
    """Decide how each tensor of a model is quantized; the model is not touched.

    example_inputs  one batch: a tensor, a tuple of tensors, or a dict of keyword tensors. Dimension 0 is the batch
    mode            "graph" (captures the forward: folds BatchNorm, quantizes residual adds and pools) or "modules" (by names);
                    by default "graph" for networks with convolutions, other than Hugging Face models with attention
    Raises: ModelError if a weight is NaN or infinite, or no layer can be quantized; SchemeError if a group does not divide."""
    recipe = Recipe.from_dict(recipe) if isinstance(recipe, (str, dict)) else recipe
    args, kwargs = split_inputs(example_inputs, model)
    bad = is_finite(model)
    if bad:
        raise ModelError(
            f"parameter '{bad}' holds NaN or infinite values; load or train the float model again before quantizing"
        )
    if mode is None:
        has_convolutions = any(isinstance(m, CONVOLUTIONS) for m in model.modules())
        mode = (
            "graph"
            if has_convolutions and not hasattr(getattr(model, "config", None), "num_attention_heads")
            else "modules"
        )
    made = (plan_graph if mode == "graph" else plan_modules)(model, recipe, args, kwargs)
    if not made.quantized:
        raise ModelError(
            f"no layer of {type(model).__name__} can be quantized for {recipe.target}: "
            f"{made.rows[0].reason if made.rows else 'it has no Linear, Conv or Embedding layer'}; check the rules and the target"
        )
    return made


def prepare(model: nn.Module, plan: Plan) -> nn.Module:
    """The QAT model of a plan: layers with quantizers in their slots, sharing the float model's parameters.

    The model is changed in place (graph mode returns a new module around the same parameters); use the returned one. Quantizers are off
    until `calibrate`. Parameters keep their state_dict keys."""
    prepared = (prepare_graph if plan.mode == "graph" else prepare_modules)(model, plan)
    prepared.qatana_plan = plan  # type: ignore[assignment]
    if isinstance(prepared, fx.GraphModule):
        prepared.meta["qatana_plan"] = plan  # what a deep copy of a GraphModule keeps
    return prepared
