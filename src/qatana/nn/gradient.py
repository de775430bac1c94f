"""Quantized gradients: an option of a prepared model's linear layers and convolutions."""

from __future__ import annotations

from torch import nn

from qatana.errors import ModelError
from qatana.nn.conv import Conv
from qatana.nn.linear import Linear
from qatana.numerics import Scheme, scheme
from qatana.numerics.stochastic import check_gradient_scheme


def quantize_gradients(model: nn.Module, to: Scheme | str | None) -> nn.Module:
    """Round the gradient of every layer's output stochastically: those of input, weight and bias are computed from it. A recipe says
    it layer by layer: `recipe.rule("encoder.*", gradient="fp8:e5m2")`.

    to   "int8", "fp8:e5m2", "fp8:e4m3/token", a Scheme, or None for gradients as they come
    The expectation of every gradient stays. A training option: it changes no forward pass, no state and no file.
    Raises: SchemeError for a scheme that gradients cannot have; ModelError if the model has no quantized layer."""
    wanted = scheme(to, scale="dynamic") if isinstance(to, str) else to
    if wanted is not None:
        check_gradient_scheme(wanted)
    layers = [module for module in model.modules() if isinstance(module, (Linear, Conv))]
    if not layers:
        raise ModelError(
            "the model has no quantized linear layer or convolution; call qatana.prepare(model, plan) first"
        )
    for layer in layers:
        layer.gradient = wanted
    return model
