"""QatanaConfig: what `from_pretrained(..., quantization_config=)` takes, and what a saved model's config.json holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import zip_longest
from typing import Any

import qatana as qt
from qatana.errors import nearest, require

require("transformers", "hf")

from transformers.quantizers import auto  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

METHOD = "qatana"
_KEYS = ("recipe", "trainable", "modules_to_not_convert", "plan", "activations")


class QatanaConfig(QuantizationConfigMixin):
    """How a model is quantized when it is loaded.

    recipe    a target ("ort:int8"), a `qatana.Recipe`, its dict or its JSON
    trainable True: a QAT model, whose quantizers are on as soon as all ranges are known: at once where activations stay float or are
              quantized at run time, after `qatana.calibrate(model, loader)` where they are static. False: an integer model
    modules_to_not_convert   names of modules that stay float, with all below them: "lm_head", "model.layers.0"; or globs
    plan, activations        written when a model was quantized: which tensor has which scheme; {quantizer: [scale, zero point]} of an
                             engine's integer layers. Not for the user
    Raises: RecipeError for an unknown target, key or value."""

    def __init__(
        self,
        recipe: str | dict[str, Any] | qt.Recipe,
        trainable: bool = True,
        modules_to_not_convert: Iterable[str] | None = None,
        *,
        plan: dict[str, Any] | None = None,
        activations: dict[str, list[float]] | None = None,
        **other: Any,
    ) -> None:
        if other.pop("quant_method", METHOD) != METHOD or other:
            key = next(iter(other), "quant_method")
            raise qt.RecipeError(f"QatanaConfig has no '{key}'{nearest(key, _KEYS)}")
        if not isinstance(trainable, bool):
            raise qt.RecipeError(f"trainable={trainable!r} must be True (a QAT model) or False (an integer model)")
        names = [] if modules_to_not_convert is None else modules_to_not_convert
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise qt.RecipeError(f"modules_to_not_convert={names!r} must be a list of module names")
        self.quant_method: Any = METHOD
        self.recipe = _recipe(recipe)
        self.trainable = trainable
        self.modules_to_not_convert = list(names)
        self.plan, self.activations = plan, activations

    @property
    def full_recipe(self) -> qt.Recipe:
        """The recipe, with the modules that stay float as its last rules."""
        names = self.modules_to_not_convert
        return self.recipe.skip(*names, reason="in modules_to_not_convert") if names else self.recipe

    def get_loading_attributes(self) -> dict[str, Any]:
        """What transformers sets on the configuration of a checkpoint that is quantized already: the one that it was to be loaded with."""
        return {"wanted": self}

    @property
    def wanted(self) -> QatanaConfig:
        """The configuration that a checkpoint with this one was to be loaded with: a checkpoint has its own, so it must be equal.

        Raises: RecipeError when it is set and another."""
        return self

    @wanted.setter
    def wanted(self, given: QatanaConfig) -> None:
        difference = _difference(self.full_recipe.to_dict(), given.full_recipe.to_dict())
        if difference:
            raise qt.RecipeError(
                f"the checkpoint was quantized by another recipe ({difference}): load it without quantization_config, which goes on with "
                f"its own; or quantize its values anew: from_pretrained(folder).dequantize(), save_pretrained, and load that"
            )
        if given.trainable and not self.trainable:
            raise qt.RecipeError(
                "the checkpoint is an integer model, which does not train: load it without quantization_config to run it, or take "
                "its values as the start of another training: from_pretrained(folder).dequantize(), save_pretrained, and load that"
            )
        if self.trainable and not given.trainable:
            raise qt.RecipeError(
                "the checkpoint is a QAT model: load it without quantization_config, then "
                "qatana.integrations.huggingface.integer_model(model), which trainable=False does for float checkpoints"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the inverse of `from_dict`; what has not been set is left out."""
        data: dict[str, Any] = {"quant_method": METHOD, "recipe": self.recipe.to_dict(), "trainable": self.trainable}
        optional = {key: getattr(self, key) for key in ("modules_to_not_convert", "plan", "activations")}
        return data | {key: value for key, value in optional.items() if value}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read what `to_dict` wrote. Raises: RecipeError if it is damaged."""
        if "recipe" not in config_dict:
            raise qt.RecipeError("a quantization_config of qatana needs a 'recipe', such as 'ort:int8'")
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config


def _difference(stored: dict[str, Any], given: dict[str, Any]) -> str:
    """The first thing that two recipes do not have in common, or ""."""
    rules = list(zip_longest(stored.pop("rules", ()), given.pop("rules", ())))
    pairs = [(key, stored.get(key), given.get(key)) for key in dict.fromkeys((*stored, *given))]
    pairs += [(f"rule {i}", a, b) for i, (a, b) in enumerate(rules, 1)]
    return next((f"{what}: {_said(a)} there, {_said(b)} here" for what, a, b in pairs if a != b), "")


def _said(value: Any) -> str:
    return "none" if value is None else json.dumps(value)


def _recipe(given: Any) -> qt.Recipe:
    if isinstance(given, qt.Recipe):
        return given
    if isinstance(given, str) and given.lstrip().startswith("{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise qt.RecipeError(f"the recipe is no valid JSON: {error}") from error
    return qt.Recipe.from_dict(given)


auto.register_quantization_config(METHOD)(QatanaConfig)
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, QatanaConfig)
