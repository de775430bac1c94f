"""Hugging Face BitNet: ternary weights, four to a byte, or as float -1, 0, 1 where transformers unpacked them before it saved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qatana.checkpoints.checkpoint import Checkpoint, Stored
from qatana.checkpoints.layers import explained, parts_of, rest_of, section
from qatana.errors import SchemeError
from qatana.numerics import Parameters, scheme, storage

NAMES = ("weight", "weight_scale")


def read_bitnet(tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    """`quantization_config.linear_class` says whether weight_scale multiplies or divides; transformers' default: it divides."""
    layers = [name.removesuffix("weight_scale") for name in tensors if name.endswith("weight_scale")]
    about = section(config)
    if layers and about.get("quant_method") != "bitnet":
        raise SchemeError(
            "a BitNet file without quantization_config: its linear_class says whether weight_scale multiplies or divides; "
            "put config.json beside the tensors"
        )
    linear_class = str(about.get("linear_class", "bitlinear"))
    weights: dict[str, Stored] = {}
    for layer in layers:
        with explained(layer):
            weights[layer + "weight"] = _stored(parts_of(tensors, layer, NAMES), linear_class)
    return Checkpoint("bitnet", weights, rest_of(tensors, layers, NAMES))


def _stored(parts: dict[str, Tensor], linear_class: str) -> Stored:
    weight, scale = parts.get("weight"), parts["weight_scale"]
    if weight is not None and weight.is_floating_point():
        codes, parameters = _unpacked(weight), Parameters(scale.float().reshape(()), torch.zeros(()), torch.ones(()))
        if linear_class != "autobitlinear":
            raise SchemeError(f"weight is {weight.dtype}: a layer of linear_class '{linear_class}' holds packed bytes")
    else:
        codes, parameters = storage.unpack_bitnet(parts, linear_class)
    return Stored.of(scheme("bitnet"), codes, parameters, scale.dtype)


def _unpacked(weight: Tensor) -> Tensor:
    codes = weight.to(torch.int8)
    if not torch.equal(codes.to(weight.dtype), weight) or (codes.numel() and int(codes.abs().max()) > 1):
        raise SchemeError("weight has a weight_scale and holds other numbers than -1, 0 and 1: no BitNet layer")
    return codes
