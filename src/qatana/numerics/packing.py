"""Packing of codes into bytes: element i occupies bits i*b .. i*b+b-1 of its row, least significant bit first.

For 4 bits: low nibble first; for 2 bits: the element of index 4k + j at bits 2j of byte k. It is the layout of ONNX
int4/int2 and of MatMulNBits. Rows (the last dimension) are padded to whole bytes with zero bits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.formats import IntFormat


def pack(codes: Tensor, format: IntFormat) -> Tensor:
    """Codes (*lead, n), one per byte, to bytes (*lead, ceil(n * bits / 8)); signed codes in two's complement.

    Raises: SchemeError if a code lies outside the format."""
    if codes.numel() and not codes.is_meta and (int(codes.min()) < format.lo or int(codes.max()) > format.hi):
        raise SchemeError(f"codes {int(codes.min())}..{int(codes.max())} do not fit {format}")
    raw = (codes.detach().to(torch.int16) & (2**format.bits - 1)).to(torch.uint8)
    if 8 % format.bits == 0:
        return _whole(raw, format.bits)
    bits = np.unpackbits(raw.cpu().numpy()[..., None], axis=-1, bitorder="little")[..., : format.bits]
    stream = bits.reshape(*raw.shape[:-1], raw.shape[-1] * format.bits)
    return torch.from_numpy(np.packbits(stream, axis=-1, bitorder="little"))


def unpack(packed: Tensor, n: int, format: IntFormat) -> Tensor:
    """Bytes (*lead, ceil(n * bits / 8)) back to codes (*lead, n) in the format's storage dtype."""
    if packed.shape[-1] != -(-n * format.bits // 8):
        raise SchemeError(f"{packed.shape[-1]} bytes a row cannot hold {n} codes of {format.bits} bits")
    if 8 % format.bits == 0:
        return _parts(packed, format)[..., :n]
    stream = np.unpackbits(packed.cpu().numpy(), axis=-1, bitorder="little")[..., : n * format.bits]
    bits = stream.reshape(*packed.shape[:-1], n, format.bits)
    weights = 1 << np.arange(format.bits, dtype=np.int16)
    if format.signed:
        weights[-1] = -weights[-1]
    codes = (bits.astype(np.int16) * weights).sum(-1, dtype=np.int16)
    return torch.from_numpy(codes).to(format.dtype)


def _whole(raw: Tensor, bits: int) -> Tensor:
    """uint8 codes whose width divides a byte (1, 2, 4, 8), to bytes: no code crosses the end of one."""
    per_byte = 8 // bits
    raw = torch.nn.functional.pad(raw, (0, -raw.shape[-1] % per_byte)).unflatten(-1, (-1, per_byte))
    out = raw[..., 0].clone()
    for i in range(1, per_byte):
        out |= raw[..., i] << (bits * i)
    return out


def _parts(packed: Tensor, format: IntFormat) -> Tensor:
    """The inverse of `_whole`: shifts by numbers are many times faster than by a tensor of them."""
    bits, unused = format.bits, 8 - format.bits
    codes = packed.new_empty([*packed.shape, 8 // bits], dtype=format.dtype)
    for i in range(8 // bits):
        if format.signed:  # the sign comes down with the arithmetic shift
            codes[..., i] = (packed << (unused - bits * i)).view(torch.int8) >> unused
        else:
            codes[..., i] = (packed >> (bits * i)) & (2**bits - 1)
    return codes.flatten(-2)
