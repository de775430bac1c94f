"""Weights as an artifact of the free target holds them: codes packed to their width, scales in the narrowest float type that holds
every one of them exactly.

    x_hat = values(codes; scale, offset)        bit for bit what fake quantization gave in training

GGUF types are stored in their own bytes, scales included."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.numerics import gguf
from qatana.numerics.by_scheme import _scheme, parameters_of, part_of, stack_of, stack_shape
from qatana.numerics.formats import GgufFormat, IntFormat
from qatana.numerics.packing import pack, unpack
from qatana.numerics.pieces import pieces
from qatana.numerics.scales import Parameters
from qatana.numerics.scheme import Scheme
from qatana.numerics.to_codes import quantize_by


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
    return Packed(pack(codes.reshape(-1), stored_width(scheme)), [_narrow(p.scale), _narrow(p.offset)])


@torch.library.custom_op("qatana::read_back", mutates_args=())
def read_back(codes: Tensor, parameters: Sequence[Tensor], scheme: str, shape: Sequence[int], name: str) -> Tensor:
    """The float32 weight of `shape` that `store` wrote; `name` is its quantizer's."""
    found = _scheme(scheme)
    if isinstance(found.format, GgufFormat):
        return gguf.dequantize(codes, tuple(shape), found.format.name)
    scale, offset = (p.float() for p in parameters)
    return _values(codes, Parameters(scale, offset, scale), found, tuple(shape))


@read_back.register_fake
def _(codes, parameters, scheme, shape, name):
    return codes.new_empty(list(shape), dtype=torch.float32)


def reads_rows(scheme: Scheme, shape: Sequence[int]) -> bool:
    """Whether rows of a stored table can be read alone: blocks lie within a row, and a row begins with a byte."""
    if len(shape) != 2:
        return False
    if isinstance(scheme.format, GgufFormat):
        return True
    kind, axis, size = scheme.granularity.kind, scheme.granularity.axis, scheme.granularity.size
    within = (
        kind in ("tensor", "group") or (kind == "channel" and axis == 0) or (kind == "flat" and shape[1] % size == 0)
    )
    return within and shape[1] * stored_width(scheme).bits % 8 == 0


@torch.library.custom_op("qatana::read_back_rows", mutates_args=())
def read_back_rows(
    ids: Tensor, codes: Tensor, parameters: Sequence[Tensor], scheme: str, shape: Sequence[int], name: str
) -> Tensor:
    """Rows of what `read_back` gives, float32 (*ids, D): no others are read. For schemes that `reads_rows` allows."""
    found, (count, size), flat = _scheme(scheme), shape, ids.reshape(-1)
    rows = codes.view(count, -1).index_select(0, flat)
    wanted = (len(flat), size)
    if isinstance(found.format, GgufFormat):
        return gguf.dequantize(rows.reshape(-1), wanted, found.format.name).reshape(*ids.shape, size)
    own = (p.float() for p in parameters)
    scale, offset = (p.view(count, -1).index_select(0, flat).reshape(-1, 1) if p.numel() > 1 else p for p in own)
    return _values(rows.reshape(-1), Parameters(scale, offset, scale), found, wanted).reshape(*ids.shape, size)


@read_back_rows.register_fake
def _(ids, codes, parameters, scheme, shape, name):
    return codes.new_empty([*ids.shape, shape[1]], dtype=torch.float32)


@torch.library.custom_op("qatana::read_levels", mutates_args=())
def read_levels(codes: Tensor, scheme: str, shape: Sequence[int]) -> Tensor:
    """Levels (code - zero point), int8 of `shape`, of a weight stored in a symmetric integer scheme of at most 8 bits."""
    found, (rows, columns) = _scheme(scheme), shape
    out = torch.empty((rows, columns), dtype=torch.int8, device=codes.device)
    width, bits = stored_width(found), columns * stored_width(found).bits
    cuts = list(pieces(out)) if bits % 8 == 0 else [slice(0, rows)]
    for cut in cuts:
        part = out[cut]
        packed = codes[cut.start * bits // 8 : -(-(cut.start + len(part)) * bits // 8)]
        part.copy_(unpack(packed, part.numel(), width).view(part.shape).to(torch.int16) - found.zero_point)
    return out


@read_levels.register_fake
def _(codes, scheme, shape):
    return codes.new_empty(list(shape), dtype=torch.int8)


def _values(codes: Tensor, p: Parameters, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    """What packed codes stand for, in pieces: codes of a whole table, each in a byte, are written to memory by nobody."""
    width, stack = stored_width(scheme), torch.empty(stack_shape(shape, scheme), device="meta")
    out = torch.empty(stack.shape, dtype=torch.float32, device=codes.device)
    bits = math.prod(stack.shape[1:]) * width.bits  # of an element of the first dimension
    cuts = list(pieces(stack))
    if any(cut.start * bits % 8 for cut in cuts):
        cuts = [slice(0, len(stack))]
    for cut in cuts:
        part = out[cut]
        packed = codes[cut.start * bits // 8 : -(-(cut.start + len(part)) * bits // 8)]
        part.copy_(
            scheme.grid.values(unpack(packed, part.numel(), width).view(part.shape), part_of(p, cut, len(stack)))
        )
    return scheme.granularity.unview(out, shape)


def _places(x: Tensor, scheme: Scheme) -> Packed:
    """What `store` gives for a tensor without data: the codes' length is known, how narrow the parameters are is in the file."""
    if isinstance(scheme.format, GgufFormat):
        grid = gguf.grid(scheme.format.name)
        return Packed(x.new_empty(x.numel() // grid.row * grid.row_bytes, dtype=torch.uint8), [])
    length = -(-stack_of(x, scheme).numel() * stored_width(scheme).bits // 8)
    places = [x.new_empty((), dtype=torch.float32) for _ in range(2)]
    return Packed(x.new_empty(length, dtype=torch.uint8), places)


def stored_width(scheme: Scheme) -> IntFormat:
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
