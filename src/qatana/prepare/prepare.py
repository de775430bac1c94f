"""plan and prepare: the two verbs before training."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qatana.batch import split_inputs
from qatana.errors import ModelError
from qatana.nn import recompute
from qatana.prepare.attention import hosts
from qatana.prepare.graph import plan_graph, prepare_graph
from qatana.prepare.modules import is_finite, plan_modules, prepare_modules
from qatana.prepare.names import everything, share_tied
from qatana.recipe import Plan, Recipe

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def plan(model: nn.Module, recipe: Recipe | str, example_inputs: Any = None, *, mode: str | None = None) -> Plan:
    """Decide how each tensor of a model is quantized; the model is not touched.

    example_inputs  one batch: a tensor, a tuple of tensors, or a dict of keyword tensors. Dimension 0 is the batch. None: by module
                    names alone, nothing is run; for the free target, unless a rule quantizes attention
    mode            "graph" (captures the forward: folds BatchNorm, quantizes residual adds and pools) or "modules" (by names);
                    by default "graph" for networks with convolutions (free target: with BatchNorm) and without attention
    Raises: ModelError if a weight is NaN or infinite, or no layer can be quantized; SchemeError if a group does not divide."""
    recipe = Recipe.from_dict(recipe) if isinstance(recipe, (str, dict)) else recipe
    already: Any = getattr(model, "qatana_plan", None)
    if already is not None:
        raise ModelError(
            f"{type(model).__name__} is quantized already, for {already.recipe.target}; take the float model, or "
            f"qatana.dequantize(model)"
        )
    if example_inputs is None:
        _check_names_suffice(recipe)
        args, kwargs, mode = (), {}, "modules"
    else:
        args, kwargs = split_inputs(example_inputs, model)
    bad = is_finite(model)
    if bad:
        raise ModelError(
            f"parameter '{bad}' holds NaN or infinite values; load or train the float model again before quantizing"
        )
    if mode is None:
        mode = "graph" if _wants_graph(model, recipe) else "modules"
    if example_inputs is None:
        made = plan_modules(model, recipe, args, kwargs, everything(model))
    else:
        made = (plan_graph if mode == "graph" else plan_modules)(model, recipe, args, kwargs)
    if recipe.resolved.free and mode == "modules":
        share_tied(made, model)
    if not made.quantized:
        raise ModelError(
            f"no layer of {type(model).__name__} can be quantized for {recipe.target}: "
            f"{made.rows[0].reason if made.rows else 'it has no Linear, Conv or Embedding layer'}; check the rules and the target"
        )
    return made


def _wants_graph(model: nn.Module, recipe: Recipe) -> bool:
    """Whether a graph has something to fold or to share: networks of convolutions; for the free target, those with BatchNorm."""
    kinds = NORMS if recipe.resolved.free else CONVOLUTIONS
    return any(isinstance(m, kinds) for m in model.modules()) and not _has_attention(model)


def _has_attention(model: nn.Module) -> bool:
    """Whether a model is a Hugging Face one with attention, its own or that of a part (a vision tower), or holds torch's."""
    named = hasattr(getattr(model, "config", None), "num_attention_heads")
    return named or bool(hosts(model)) or any(isinstance(m, nn.MultiheadAttention) for m in model.modules())


def _check_names_suffice(recipe: Recipe) -> None:
    """Raise ModelError where names do not tell what is quantized: which tensors engines see as one, what attention multiplies."""
    attended = {"query", "key", "value", "probability", "context"} & {role for r in recipe.rules for role in r.schemes}
    why = f"a rule quantizes '{sorted(attended)[0]}' of attention" if attended else f"{recipe.target} shares ranges"
    if attended or not recipe.resolved.free:
        raise ModelError(f"{why}, which one run of the model shows; give plan(model, recipe, example_inputs) a batch")


def prepare(model: nn.Module, plan: Plan) -> nn.Module:
    """The QAT model of a plan: layers with quantizers in their slots, sharing the float model's parameters.

    The model is changed in place (graph mode returns a new module around the same parameters); use the returned one. Quantizers are off
    until `calibrate`. Parameters keep their state_dict keys."""
    prepared = (prepare_graph if plan.mode == "graph" else prepare_modules)(model, plan)
    prepared.qatana_plan = plan  # type: ignore[assignment]
    if isinstance(prepared, fx.GraphModule):
        prepared.meta["qatana_plan"] = plan  # what a deep copy of a GraphModule keeps
    recompute.install(prepared)
    return prepared
