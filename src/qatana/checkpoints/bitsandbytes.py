"""bitsandbytes: Linear4bit (NF4, FP4, doubly quantized or not) and Linear8bitLt, as transformers or a state_dict saves them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qatana.checkpoints.checkpoint import Checkpoint, Stored
from qatana.checkpoints.layers import explained, parts_of, rest_of
from qatana.errors import SchemeError
from qatana.numerics import Parameters, scheme, storage

STATE = ".quant_state.bitsandbytes__"
NESTED_BLOCK = 256
PARTS_4BIT = (
    *("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"),
    *(STATE + book for book in ("nf4", "fp4")),
)
PARTS_8BIT = ("weight", "SCB", "weight_format")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONV1D = {
    **dict.fromkeys(("gpt2", "decision_transformer", "imagegpt"), ("c_attn", "c_fc", "c_proj", "q_attn")),
    "openai-gpt": ("c_attn", "c_fc", "c_proj"),
}
"""model_type -> layers that are transformers' Conv1D: their weight is (K, N), and transformers quantizes its transpose."""


def read_bitsandbytes(tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    """A weight with `.absmax` or a quant_state is 4-bit, a layer with `SCB` is 8-bit; the rest is float."""
    four = dict.fromkeys(name.partition(STATE)[0] for name in tensors if STATE in name)
    four |= dict.fromkeys(name.removesuffix(".absmax") for name in tensors if name.endswith(".absmax"))
    eight = [name.removesuffix("SCB") for name in tensors if name == "SCB" or name.endswith(".SCB")]
    weights: dict[str, Stored] = {}
    for name in four:
        with explained(name):
            parts = parts_of(tensors, name, PARTS_4BIT)
            weights[name] = _four_bit({"weight" + key: tensor for key, tensor in parts.items()})
    for layer in eight:
        with explained(layer):
            weights[layer + "weight"] = _eight_bit(parts_of(tensors, layer, PARTS_8BIT))
    floats = rest_of(rest_of(tensors, four, PARTS_4BIT), eight, PARTS_8BIT)
    conv1d = CONV1D.get(str(config.get("model_type")), ())
    weights = {name: _turned(stored) if _layer(name) in conv1d else stored for name, stored in weights.items()}
    return Checkpoint("bitsandbytes", weights, floats)


def _four_bit(parts: dict[str, Tensor]) -> Stored:
    codes, absmax, state = storage.unpack_4bit(parts)
    block, dtype = int(state["blocksize"]), DTYPES.get(str(state["dtype"]))
    if dtype is None:
        raise SchemeError(f"dtype '{state['dtype']}' of the quant_state is not one of {', '.join(DTYPES)}")
    double = isinstance(absmax, storage.Nested)
    if isinstance(absmax, storage.Nested):
        if absmax.block != NESTED_BLOCK:
            raise SchemeError(f"absmax is quantized in blocks of {absmax.block}; qatana knows {NESTED_BLOCK}")
        absmax = absmax.decode()
    scale = absmax.float().reshape(-1, 1)
    if len(scale) != -(-codes.numel() // block):
        raise SchemeError(f"{len(scale)} absmax for {codes.numel()} elements in blocks of {block}: truncated")
    found = scheme(f"{state['quant_type']}{'+double' if double else ''}/flat{block}")
    return Stored.of(found, codes, Parameters(scale, torch.zeros_like(scale), scale), dtype)


def _eight_bit(parts: dict[str, Tensor]) -> Stored:
    codes, absmax = storage.unpack_8bit(parts)
    if codes.dtype != torch.int8 or codes.ndim != 2 or absmax.numel() != len(codes):
        raise SchemeError(
            f"weight is {codes.dtype} {tuple(codes.shape)} with {absmax.numel()} SCB; it is int8, one a row"
        )
    scale = absmax.float().reshape(-1, 1)
    scale = scale / torch.full_like(scale, 127)
    # The library dequantizes 8-bit weights to float32, whatever the model's own dtype was.
    return Stored.of(scheme("int8n/channel"), codes, Parameters(scale, torch.zeros_like(scale), scale), torch.float32)


def _layer(name: str) -> str:
    """ "c_attn" of "transformer.h.0.attn.c_attn.weight"."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _turned(stored: Stored) -> Stored:
    return replace(stored, shape=stored.shape[::-1], transposed=True)
