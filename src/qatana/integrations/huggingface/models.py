"""What a user does to a Hugging Face model after training it, or after preparing it by hand."""

from __future__ import annotations

import copy
from typing import Any

import qatana as qt
from qatana.integrations.huggingface.config import QatanaConfig
from qatana.integrations.huggingface.loading import to_integers
from qatana.integrations.huggingface.quantizer import QatanaHfQuantizer


def integer_model(model: Any) -> Any:
    """The integer model of a trained QAT model, as one that `save_pretrained` writes and `from_pretrained` loads. A copy.

    Raises: ModelError if the model is no QAT model or was not calibrated."""
    if not hasattr(model, "config"):
        raise qt.ModelError(f"{type(model).__name__} is no Hugging Face model; use qatana.integer_model(model)")
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, QatanaConfig) and not config.trainable:
        raise qt.ModelError("the model is an integer model already")
    new = copy.deepcopy(attach(model))
    return to_integers(new, new.config.quantization_config)


def attach(model: Any) -> Any:
    """Mark a Hugging Face model that was prepared by hand, so that `save_pretrained` and the `Trainer` know what it is. Returns it.

    Raises: ModelError if `qatana.prepare` did not make it, or captured a graph (convolutional networks), which these files do not hold."""
    if isinstance(getattr(getattr(model, "config", None), "quantization_config", None), QatanaConfig):
        return model
    plan: qt.Plan | None = getattr(model, "qatana_plan", None)
    if plan is None or plan.mode != "modules" or not hasattr(model, "config"):
        raise qt.ModelError(
            "attach takes a Hugging Face model that qatana.prepare quantized by module names (plan(..., mode='modules'))"
        )
    model.hf_quantizer = QatanaHfQuantizer(QatanaConfig(plan.recipe, plan=plan.compact()))
    model.config.quantization_config = config = model.hf_quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, config.quant_method
    return model
