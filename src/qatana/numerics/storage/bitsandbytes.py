"""Checkpoint tensors of bitsandbytes (0.50): Linear4bit (NF4, FP4, absmax once more quantized or not) and Linear8bitLt.

Names are those in a state_dict behind the layer's prefix. Reference: bitsandbytes/functional.py (QuantState), nn/modules.py."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.formats import DYNAMIC8, FP4, NF4
from qatana.numerics.scales import Parameters
from qatana.numerics.storage import bits

Tensors = dict[str, Tensor]
_BOOKS = {"nf4": NF4, "fp4": FP4}
_STATE = "weight.quant_state.bitsandbytes__"


class Nested(NamedTuple):
    """absmax in its quantized form: absmax = dynamic8(codes) * absmax2 + offset.

    codes (n_blocks) uint8; absmax2 (ceil(n_blocks / block)) float32; offset () float32."""

    codes: Tensor
    absmax: Tensor
    offset: Tensor
    block: int = 256

    def decode(self) -> Tensor:
        """absmax (n_blocks), float32, two roundings as the reference has them."""
        levels = DYNAMIC8.decode(self.codes)
        return levels * self.absmax.repeat_interleave(self.block)[: len(levels)] + self.offset


def pack_4bit(codes: Tensor, absmax: Tensor | Nested, book: str, dtype: torch.dtype, block: int = 64) -> Tensors:
    """Linear4bit: value = table[code] * absmax of its block; blocks run through the flattened weight.

    codes, of the weight's shape, uint8 0..15; absmax (n_blocks) float32 or `Nested`; book "nf4" or "fp4"; dtype: what the
    reader dequantizes to. weight (ceil(n/2), 1) uint8, first element in the high nibble; weight.absmax, weight.quant_map,
    (weight.nested_absmax, weight.nested_quant_map); the rest as JSON in the bytes of weight.quant_state.bitsandbytes__nf4."""
    if codes.numel() and int(codes.max()) > 15:
        raise SchemeError(f"code {int(codes.max())} does not fit 4 bits")
    once = absmax.codes if isinstance(absmax, Nested) else absmax
    if once.numel() != -(-codes.numel() // block):
        raise SchemeError(f"{once.numel()} absmax for {codes.numel()} elements in blocks of {block}")
    state: dict[str, Any] = {"quant_type": book, "blocksize": block, "dtype": _name(dtype), "shape": list(codes.shape)}
    out = {
        "weight": bits.nibbles_high_first(codes.to(torch.uint8).flatten()).unsqueeze(1),
        "weight.absmax": once.flatten(),
        "weight.quant_map": torch.tensor(_BOOKS[book].table),
    }
    if isinstance(absmax, Nested):
        out |= {"weight.nested_absmax": absmax.absmax, "weight.nested_quant_map": torch.tensor(DYNAMIC8.table)}
        state |= {"nested_blocksize": absmax.block, "nested_dtype": "float32", "nested_offset": float(absmax.offset)}
    out[_STATE + book] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return out


def unpack_4bit(tensors: Tensors) -> tuple[Tensor, Tensor | Nested, dict[str, Any]]:
    """Codes (the weight's shape, uint8), absmax as stored, and the state: quant_type, blocksize, dtype, shape, ...

    Raises: SchemeError for missing, truncated or foreign tensors (a table that is not the type's own among them)."""
    states = [name for name in tensors if name.startswith(_STATE)]
    if len(states) != 1 or "weight" not in tensors or "weight.absmax" not in tensors:
        raise SchemeError(
            f"a Linear4bit has weight, weight.absmax and one {_STATE}*; found: {', '.join(sorted(tensors))}"
        )
    state = json.loads(bytes(tensors[states[0]].tolist()))
    book = _BOOKS.get(state["quant_type"])
    if book is None or not torch.equal(tensors["weight.quant_map"].float().cpu(), torch.tensor(book.table)):
        raise SchemeError(f"the table of quant_type '{state['quant_type']}' is not one of {', '.join(_BOOKS)}")
    shape = tuple(state["shape"])
    data = tensors["weight"].contiguous().view(torch.uint8).flatten()
    codes = bits.from_nibbles_high_first(data, math.prod(shape)).reshape(shape)
    absmax = tensors["weight.absmax"]
    if "weight.nested_absmax" in tensors:
        offset = torch.tensor(float(state["nested_offset"]))
        return codes, Nested(absmax, tensors["weight.nested_absmax"], offset, state["nested_blocksize"]), state
    return codes, absmax, state


def parameters_4bit(absmax: Tensor | Nested, shape: tuple[int, ...], block: int) -> Parameters:
    """Parameters that broadcast against (*lead, K / block, block). Raises: SchemeError where blocks run over the ends of rows."""
    if shape[-1] % block:
        raise SchemeError(f"blocks of {block} run over the rows of shape {shape}: such a weight has no scale per group")
    flat = absmax.decode() if isinstance(absmax, Nested) else absmax.float()
    return bits.parameters(flat.reshape(*shape[:-1], shape[-1] // block, 1))


def pack_8bit(codes: Tensor, absmax: Tensor) -> Tensors:
    """Linear8bitLt: value = (code * SCB) / 127, SCB (N) float32 the largest magnitude of a row; weight_format 0 is row-major."""
    return {
        "weight": codes.to(torch.int8),
        "SCB": absmax.float().flatten(),
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def unpack_8bit(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """int8 codes (N, K) and SCB (N). The library multiplies a code by SCB and then by 1/127, each rounded: `scale = SCB / 127`
    gives the same number up to two last places. Raises: SchemeError for layouts of old graphics cards (weight_format > 0)."""
    if "weight" not in tensors or "SCB" not in tensors:
        raise SchemeError(f"a Linear8bitLt has weight and SCB; found: {', '.join(sorted(tensors))}")
    if "weight_format" in tensors and int(tensors["weight_format"]) != 0:
        raise SchemeError("weight_format is not row-major; save the model again with bitsandbytes 0.45 or newer")
    return tensors["weight"], tensors["SCB"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
