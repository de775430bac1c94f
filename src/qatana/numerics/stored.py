"""Weights as an artifact of the free target holds them: codes packed to their width, scales in the narrowest float type that holds
every one of them exactly.

    x_hat = values(codes; scale, offset)        bit for bit what fake quantization gave in training

GGUF types are stored in their own bytes, scales included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.numerics import gguf
from qatana.numerics.by_scheme import _scheme, parameters_of, stack_of
from qatana.numerics.formats import GgufFormat, IntFormat
from qatana.numerics.packing import pack, unpack
from qatana.numerics.scales import Parameters
from qatana.numerics.scheme import Scheme
from qatana.numerics.to_codes import dequantize_by, quantize_by


class Packed(NamedTuple):
    """codes: bytes (n,), uint8;  parameters: [scale, offset], shaped for the scheme's stack; none where the bytes hold them."""

    codes: Tensor
    parameters: list[Tensor]


def store(
    x: Tensor,
    scheme: Scheme,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    held: Sequence[Tensor] | None = None,
) -> Packed:
    """A weight in `scheme`. scale and offset: given ones (static, learned);  held: held parameters;  none of them: from x itself.
    Of a tensor on the meta device: places on that device that a file is loaded into.

    Raises: SchemeError, DataError as `quantize_by`."""
    scheme.check(x.shape)
    if x.is_meta:
        return _places(x, scheme)
    if scale is None:
        codes, p = quantize_by(x, scheme, held)
        if isinstance(scheme.format, GgufFormat):
            return Packed(gguf.grid(scheme.format.name).to_bytes(codes.float(), p).reshape(-1), [])
    else:
        p = parameters_of(scheme, scale, torch.zeros_like(scale) if offset is None else offset)
        codes = scheme.grid.codes(stack_of(x.detach().contiguous(), scheme), p)
    return Packed(pack(codes.reshape(-1), _width(scheme)), [_narrow(p.scale), _narrow(p.offset)])


@torch.library.custom_op("qatana::read_back", mutates_args=())
def read_back(codes: Tensor, parameters: Sequence[Tensor], scheme: str, shape: Sequence[int], name: str) -> Tensor:
    """The float32 weight of `shape` that `store` wrote; `name` is its quantizer's."""
    found = _scheme(scheme)
    if isinstance(found.format, GgufFormat):
        return gguf.dequantize(codes, tuple(shape), found.format.name)
    stack = stack_of(torch.empty(list(shape), device="meta"), found)
    scale, offset = (p.float() for p in parameters)
    unpacked = unpack(codes, stack.numel(), _width(found)).reshape(stack.shape)
    return dequantize_by(unpacked, Parameters(scale, offset, scale), found, tuple(shape)).contiguous()


@read_back.register_fake
def _(codes, parameters, scheme, shape, name):
    return codes.new_empty(list(shape), dtype=torch.float32)


def _places(x: Tensor, scheme: Scheme) -> Packed:
    """What `store` gives for a tensor without data: the codes' length is known, how narrow the parameters are is in the file."""
    if isinstance(scheme.format, GgufFormat):
        grid = gguf.grid(scheme.format.name)
        return Packed(x.new_empty(x.numel() // grid.row * grid.row_bytes, dtype=torch.uint8), [])
    length = -(-stack_of(x, scheme).numel() * _width(scheme).bits // 8)
    places = [x.new_empty((), dtype=torch.float32) for _ in range(2)]
    return Packed(x.new_empty(length, dtype=torch.uint8), places)


def _width(scheme: Scheme) -> IntFormat:
    """How wide a code is stored: 1, 2, 4 or 8 bits. What is no integer has bit patterns and indices for codes."""
    format = scheme.format
    return IntFormat(int(format.stored_bits), signed=isinstance(format, IntFormat) and format.signed)


def _narrow(p: Tensor) -> Tensor:
    """p in two bytes, if they hold every number of it; one number if all are equal."""
    p = p.detach().float().contiguous()
    if p.numel() and bool((p == p.flatten()[0]).all()):
        p = p.flatten()[0]
    narrow = (p.to(dtype) for dtype in (torch.bfloat16, torch.float16))
    return next((n for n in narrow if torch.equal(n.float(), p)), p).clone()
