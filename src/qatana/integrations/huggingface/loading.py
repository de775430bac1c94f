"""What loading does: a float model is quantized when its weights are there, that of a quantized checkpoint gets its layers first."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

import qatana as qt
from qatana.errors import nearest
from qatana.integrations.huggingface.config import QatanaConfig
from qatana.integrations.huggingface.example import example_inputs

PLACES = "_qatana_places"


def quantize(model: Any, config: QatanaConfig) -> None:
    """Plan, prepare and, where no data are needed for it, settle a float model; `config` gets the plan."""
    check_names(model, config.modules_to_not_convert)
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise qt.ModelError(
            f"the float model is spread over {', '.join(sorted(map(str, devices)))}: quantize it on one device, save it and load "
            f"that with device_map"
        )
    qt.prepare(model, _plan(model, config.full_recipe))
    qt_plan: qt.Plan = model.qatana_plan
    config.plan = qt_plan.compact()
    _to_device(model)
    if not _waiting(model):
        qt.calibrate(model)
    if not config.trainable:
        waiting = _waiting(model)
        if waiting:
            raise qt.ModelError(
                f"{waiting} has a static range, which data decide: load with trainable=True, call qatana.calibrate(model, loader), "
                f"then qatana.integrations.huggingface.integer_model(model)"
            )
        to_integers(model, config)


def lay_out(model: Any, config: QatanaConfig) -> None:
    """Give a model without data (on the meta device) the layers that its checkpoint fills: loading derives nothing."""
    if config.plan is None:
        raise qt.RecipeError(
            "the model's quantization_config has no plan; it was not saved by save_pretrained of a quantized model"
        )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # scales are float32 whatever the model is
    try:
        qt.prepare(model, qt.Plan.from_compact(config.full_recipe, config.plan))
        if not config.trainable:
            _fill_known(model, config.activations or {})
            qt.integer_model(model, inplace=True)
            _untie(model)
        _keep_from_initialization(model)
    finally:
        torch.set_default_dtype(before)


def loaded(model: Any, config: QatanaConfig) -> None:
    """After `lay_out` and the checkpoint's data: quantizers are on if every range is known."""
    found = qt.quantizers(model).values()
    ready = all(bool(quantizer.calibrated) for quantizer in found)
    for quantizer in found:
        quantizer.enabled = ready
    for module in model.modules():
        for name in module.__dict__.pop(PLACES, ()):
            del module.__dict__[name]
    if config.trainable:
        _give_example(model, model.qatana_plan)
    else:
        model.requires_grad_(False)


def to_integers(model: Any, config: QatanaConfig) -> Any:
    """The integer layers of a calibrated QAT model, in place; `config` says so, with the numbers that no tensor of the model holds."""
    config.activations = _activations(model) or None
    qt.integer_model(model, inplace=True)
    config.trainable = False
    _untie(model)
    return model.requires_grad_(False)


def check_names(model: nn.Module, names: list[str]) -> None:
    """Raise ModelError for a name in modules_to_not_convert that no module has."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in names:
        if any(c in name for c in "*?["):
            continue
        if not any(m == name or m.endswith(f".{name}") for m in modules):
            last = {
                part
                for m in modules
                for part in (m, m.rpartition(".")[2])
                if not part.isdigit() and "layers." not in part
            }
            raise qt.ModelError(
                f"modules_to_not_convert: no module of {type(model).__name__} is '{name}'{nearest(name, last)}"
            )


def _plan(model: Any, recipe: qt.Recipe) -> qt.Plan:
    """By names where they suffice, else by a run on an example of our own."""
    roles = {role for rule in recipe.rules for role in rule.schemes}
    by_names = recipe.resolved.free and roles <= {"weight", "input", "output", "gradient"}
    if by_names:
        return _give_example(model, qt.plan(model, recipe))
    batch = example_inputs(model)
    try:
        return qt.plan(model, recipe, batch, mode="modules")
    except qt.QatanaError:
        raise
    except Exception as error:  # whatever a model raises on a batch that its task would not give
        raise qt.ModelError(
            f"{type(model).__name__} does not run on an example made from its configuration ({error}); load the float model, then "
            f"qatana.plan(model, recipe, batch), qatana.prepare(model, plan) and qatana.integrations.huggingface.attach(model)"
        ) from error


def _give_example(model: Any, plan: qt.Plan) -> qt.Plan:
    """An example for `qatana.convert`, where one can be made; else it wants a batch."""
    with suppress(qt.ModelError):
        plan.example_inputs = ((), example_inputs(model))
    return plan


def _waiting(model: nn.Module) -> str:
    """Name of the first quantizer that waits for data, or ""."""
    return next((n for n, q in qt.quantizers(model).items() if q.needs_range and not bool(q.calibrated)), "")


def _to_device(model: Any) -> None:
    device = model.device
    for quantizer in qt.quantizers(model).values():
        quantizer.to(device)


def _activations(model: Any) -> dict[str, list[float]]:
    """Scale and zero point of the static activations that an engine's integer layers have as plain numbers."""
    if model.qatana_plan.recipe.resolved.free:
        return {}
    static = {n: q for n, q in qt.quantizers(model).items() if not q.is_weight and q.scheme.scale != "dynamic"}
    return {name: [float(q.scale), float(q.zero_point)] for name, q in static.items()}


def _fill_known(model: nn.Module, activations: dict[str, list[float]]) -> None:
    """What the conversion reads from quantizers: that they are calibrated, and those plain numbers."""
    for name, quantizer in qt.quantizers(model).items():
        quantizer.calibrated = torch.tensor(True, device="cpu")
        if name in activations:
            scale, zero_point = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in activations[name])
            quantizer.scale = nn.Parameter(scale) if quantizer.learned else scale
            quantizer.zero_point = zero_point


def _untie(model: Any) -> None:
    """Codes are tied by having one place; what transformers would tie are parameters, which these weights are no more. A quantizer that
    several layers share stays a submodule of the first alone: transformers saves no tensor under two names."""
    seen: set[nn.Module] = set()
    for module in list(model.modules()):
        shared = [key for key, child in module._modules.items() if isinstance(child, qt.Quantizer) and child in seen]
        for key in shared:
            module.__dict__[key] = module._modules.pop(key)
        seen.update(child for child in module._modules.values() if child is not None)
    kept = {a: b for a, b in model.all_tied_weights_keys.items() if _is_parameter(model, a) and _is_parameter(model, b)}
    if kept != model.all_tied_weights_keys:
        model.all_tied_weights_keys = kept
        model._tied_weights_keys = kept


def _keep_from_initialization(model: nn.Module) -> None:
    """Weights that are codes now are no parameters that the model's own `_init_weights` could set: the mark of transformers on each, and
    while loading a marked empty tensor in the place of those that are gone."""
    for module in model.modules():
        if "codes" in module._buffers or "weight_scale" in module._buffers:
            module._is_hf_initialized = True  # type: ignore[assignment]
        gone = [name for name, p in module._parameters.items() if p is None] if "slots" in module._modules else []
        for name in gone:
            module.__dict__[name] = place = torch.empty(0, device="meta")
            place._is_hf_initialized = True  # type: ignore[attr-defined]
        if gone:
            module.__dict__[PLACES] = gone


def _is_parameter(model: nn.Module, name: str) -> bool:
    """Codes of engines' layers are buffers, each layer with its own."""
    path, _, leaf = name.rpartition(".")
    return isinstance(getattr(model.get_submodule(path), leaf, None), nn.Parameter)
