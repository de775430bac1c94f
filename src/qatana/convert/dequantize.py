"""Back to a float model: the weights read back from their codes, in the layers that the model had before it was quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qatana.errors import ModelError
from qatana.nn.attention import AttentionProducts
from qatana.nn.embedding import Embedding
from qatana.nn.integer import IntegerLinear
from qatana.nn.linear import Linear
from qatana.nn.stored import StoredEmbedding, StoredLinear, StoredWeight
from qatana.quantizer import Quantizer

Weights = dict[tuple[int, int], nn.Parameter]


@torch.no_grad()
def dequantize(model: nn.Module) -> nn.Module:
    """The float model with x_hat for every weight; its activations are not quantized any more. Changed in place, returned.

    model   a QAT model reached by module names, or the integer model of the target "torch". Weights of a model that was not calibrated
            come back as they are; tied weights stay tied
    Raises: ModelError if nothing is quantized, or a layer has no float form here (convolutions, integer layers of engines)."""
    found = {name: layer for name, layer in model.named_modules() if _is_quantized(layer)}
    if not found:
        raise ModelError(f"{type(model).__name__} is not quantized; there is nothing to dequantize")
    for name, layer in found.items():
        if type(layer) not in LAYERS:
            raise ModelError(
                f"{name}: {type(layer).__name__} has no way back to float; dequantize the QAT model of linear layers and embeddings, "
                f"or load the float model again"
            )
    weights: Weights = {}
    for name, layer in found.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, leaf, LAYERS[type(layer)](layer, weights))
    if hasattr(model, "qatana_plan"):
        del model.qatana_plan
    return model


def _is_quantized(layer: nn.Module) -> bool:
    """Whether a layer stands for a float one: it has slots, or codes."""
    if any(isinstance(value, Quantizer) for value in (*layer._modules.values(), *layer.__dict__.values())):
        return True
    files = (StoredLinear.__module__, IntegerLinear.__module__)
    return type(layer).__module__ in files and not isinstance(layer, StoredWeight)


def _weight(layer: Any, weights: Weights) -> nn.Parameter:
    """x_hat of a layer's weight, one parameter for layers that have it in common."""
    stored, quantizer = layer.weight, getattr(layer, "weight_quantizer", None)
    key = (id(stored), id(quantizer))
    if key not in weights:
        read: Tensor = (
            stored() if isinstance(stored, StoredWeight) else stored if quantizer is None else quantizer(stored)
        )
        weights[key] = read if isinstance(read, nn.Parameter) else nn.Parameter(read.detach().clone())
    return weights[key]


def _linear(layer: Any, weights: Weights) -> nn.Module:
    weight = _weight(layer, weights)
    new = nn.Linear(weight.shape[1], weight.shape[0], layer.bias is not None, device="meta").train(layer.training)
    new.weight = weight
    if layer.bias is not None:
        new.bias = layer.bias if isinstance(layer.bias, nn.Parameter) else nn.Parameter(layer.bias)
    return new


def _embedding(layer: Any, weights: Weights) -> nn.Module:
    weight = _weight(layer, weights)
    padding = getattr(layer, "padding_idx", None)
    new = nn.Embedding(*weight.shape, padding_idx=padding, device="meta").train(layer.training)
    new.weight = weight
    return new


def _products(layer: Any, weights: Weights) -> nn.Module:
    return AttentionProducts(layer.engine.name)


LAYERS: dict[type[nn.Module], Callable[[Any, Weights], nn.Module]] = {
    Linear: _linear,
    StoredLinear: _linear,
    Embedding: _embedding,
    StoredEmbedding: _embedding,
    AttentionProducts: _products,
}
"""What stands for a layer afterwards. Products of attention without quantizers compute plain attention."""
