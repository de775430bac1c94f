"""One converter per QAT layer: the integer layer that computes the same codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qatana.errors import ExportError
from qatana.nn.attention import AttentionProducts
from qatana.nn.conv import Conv
from qatana.nn.elementwise import Add, GlobalAveragePool
from qatana.nn.embedding import Embedding
from qatana.nn.foreign import Foreign
from qatana.nn.integer import (
    BlockLinear,
    Codes,
    DynamicLinear,
    IntegerAdd,
    IntegerAttention,
    IntegerConv,
    IntegerEmbedding,
    IntegerGlobalAveragePool,
    IntegerLinear,
)  # fmt: skip
from qatana.nn.linear import Linear, is_static_tensor
from qatana.nn.stored import StoredConv, StoredEmbedding, StoredLinear, StoredWeight
from qatana.numerics import IntFormat, pack
from qatana.numerics.stored import store
from qatana.quantizer import Quantizer


def weight_codes(quantizer: Quantizer, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Signed codes (block view) and scale of a weight as it ships. A weight on the meta device gives places for them."""
    scale, zero = quantizer.weight_parameters(weight)
    if not zero.is_meta and bool((zero != 0).any()):
        raise ExportError(f"{quantizer.name}: weights with a zero point cannot ship in this target; use symmetric=True")
    levels, scale = quantizer.weight_levels(weight)
    return levels.to(torch.int8), scale.float()


def convert_linear(layer: Linear) -> nn.Module:
    """The integer form by the scheme of the input: static, dynamic per tensor, or per block."""
    w, x = layer.weight_quantizer, layer.input_quantizer
    if w is None or x is None:
        raise ExportError(
            f"{w.name if w else x.name if x else 'a linear layer'}: a linear layer ships with both weight and input quantized, or float"
        )
    codes, scale = weight_codes(w, layer.matrix)
    bias = None if layer.bias is None else layer.bias.detach().float().clone()
    if w.scheme.granularity.kind == "group":
        if x.scheme.granularity != w.scheme.granularity:
            raise ExportError(f"{x.name}: MatMulNBits quantizes inputs in the weight's groups ({w.scheme.granularity})")
        bits, size = w.scheme.integer.stored_bits, w.scheme.granularity.size
        packed = pack_unsigned(codes, bits)
        return BlockLinear(packed, scale.squeeze(-1), bias, bits, size)
    scale = scale.reshape(-1).expand(codes.shape[0]).contiguous()
    if not is_static_tensor(x):
        return DynamicLinear(codes, scale, bias)
    term = None if bias is None else _bias(layer.engine, bias, x.affine().scale * scale)
    y = None if layer.output_quantizer is None else Codes(layer.output_quantizer)
    return IntegerLinear(codes, scale, term, Codes(x), y)


def pack_unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as unsigned ones with zero point 2^(bits-1), packed low bits first along the last dimension."""
    unsigned = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    return pack(unsigned, IntFormat(bits, signed=False))


def _bias(engine: Any, bias: Tensor, s32: Tensor) -> Tensor:
    term = engine.bias_term(bias, s32)
    return term.to(torch.int32) if engine.integer_bias else term


def convert_conv(layer: Conv) -> nn.Module:
    """The folded weight and bias on integers."""
    w, x, y = layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer
    if w is None or x is None or y is None:
        raise ExportError(
            "a convolution ships with weight, input and output quantized, or float: check the recipe's rules"
        )
    if layer.relu and int(y.zero_point) != y.scheme.integer.lo:
        raise ExportError(
            f"{y.name}: the output of a ReLU needs its zero point at the lowest code {y.scheme.integer.lo}"
        )
    weight, bias, _ = layer.folded()
    codes, scale = weight_codes(w, weight.detach())
    scale = scale.reshape(-1).expand(codes.shape[0]).contiguous()
    term = None if bias is None else _bias(layer.engine, bias.detach(), x.affine().scale * scale)
    other = None if layer.other_quantizer is None else Codes(layer.other_quantizer)
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return IntegerConv(codes, scale, term, Codes(x), other, Codes(y), geometry)


def convert_embedding(layer: Embedding) -> nn.Module:
    """The table as codes, packed below 8 bits."""
    assert layer.weight_quantizer is not None
    codes, scale = weight_codes(layer.weight_quantizer, layer.weight.detach())
    bits = layer.weight_quantizer.scheme.integer.stored_bits
    size = layer.weight_quantizer.scheme.granularity.size or layer.embedding_dim
    codes = codes.reshape(layer.num_embeddings, -1)
    stored = codes if bits == 8 else pack_unsigned(codes, bits)
    return IntegerEmbedding(stored.contiguous(), scale.reshape(layer.num_embeddings, -1).contiguous(), bits, size)


def convert_add(layer: Add) -> nn.Module:
    """A sum on codes."""
    return IntegerAdd(*_slots(layer, "input", "other", "output"))


def convert_pool(layer: GlobalAveragePool) -> nn.Module:
    """A mean on codes."""
    return IntegerGlobalAveragePool(*_slots(layer, "input", "output"))


def convert_attention(layer: AttentionProducts) -> nn.Module:
    """Both products of attention on codes."""
    return IntegerAttention(*_slots(layer, "query", "key", "probability", "value", "context"))


def _slots(layer: nn.Module, *roles: str) -> list[Codes]:
    found = {role: getattr(layer, f"{role}_quantizer") for role in roles}
    missing = [role for role, quantizer in found.items() if quantizer is None]
    if missing:
        raise ExportError(
            f"{type(layer).__name__}: {', '.join(missing)} not quantized; an integer operator needs all of {', '.join(roles)}"
        )
    return [Codes(quantizer) for quantizer in found.values()]


def stored_weight(quantizer: Quantizer, weight: Tensor) -> StoredWeight:
    """A weight of the free target as it ships."""
    scheme = quantizer.scheme
    return StoredWeight(store(weight, scheme, **quantizer.given(weight)), scheme, weight, quantizer.name)


def store_linear(layer: Linear) -> nn.Module:
    """The weight as codes, whatever its format; inputs and outputs as in training."""
    if layer.weight_quantizer is None:
        return layer
    bias = None if layer.bias is None else layer.bias.detach().clone()
    weight = stored_weight(layer.weight_quantizer, layer.matrix)
    return StoredLinear(weight, bias, layer.input_quantizer, layer.output_quantizer)


def store_conv(layer: Conv) -> nn.Module:
    """The weight as codes, folded with its norm's running statistics."""
    if layer.weight_quantizer is None:
        return layer
    weight, bias, _ = layer.folded()
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    stored = stored_weight(layer.weight_quantizer, weight.detach())
    bias = None if bias is None else bias.detach().clone()
    return StoredConv(stored, bias, layer.input_quantizer, layer.output_quantizer, layer.relu, geometry)


def store_embedding(layer: Embedding) -> nn.Module:
    """The table as codes."""
    assert layer.weight_quantizer is not None
    return StoredEmbedding(stored_weight(layer.weight_quantizer, layer.weight.detach()))


def store_foreign(layer: Foreign) -> nn.Module:
    """The layer with its own forward, its weights as codes; inputs as in training."""
    for slot in layer.slots.values():
        place: Any = slot
        if place.weight_quantizer is None:
            continue
        place.stored = stored_weight(place.weight_quantizer, place.weight.detach().contiguous())
        place.weight_quantizer = None
        layer.drop(place.parameter)
    return layer


STORERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Linear: store_linear,
    Conv: store_conv,
    Embedding: store_embedding,
    Foreign: store_foreign,
}
"""What the free target makes of a layer. Sums, pools and attention keep their quantizers as they are."""

CONVERTERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Linear: convert_linear,
    Conv: convert_conv,
    Embedding: convert_embedding,
    Add: convert_add,
    GlobalAveragePool: convert_pool,
    AttentionProducts: convert_attention,
}
