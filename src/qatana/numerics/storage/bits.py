"""Codes as unsigned bit fields, and scales in the shapes and dtypes that files hold them in."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.formats import IntFormat
from qatana.numerics.packing import pack, unpack
from qatana.numerics.scales import Parameters


def fields(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (*lead, n) to bytes (*lead, ceil(n * bits / 8)), the first in the lowest bits.

    Raises: SchemeError if one does not fit."""
    return pack(codes.to(torch.int16), IntFormat(bits, signed=False))


def from_fields(data: Tensor, n: int, bits: int) -> Tensor:
    """Bytes back to n unsigned codes a row (uint8). Raises: SchemeError if their number does not fit."""
    return unpack(data, n, IntFormat(bits, signed=False))


def words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (rows, n) to int32 words (rows, ceil(n * bits / 32)): a dense stream, lowest bits first."""
    data = fields(codes, bits)
    data = torch.nn.functional.pad(data, (0, -data.shape[-1] % 4))
    return data.contiguous().view(torch.int32)


def from_words(data: Tensor, n: int, bits: int) -> Tensor:
    """int32 words back to n unsigned codes a row (uint8)."""
    # A copy: a transposed column is contiguous by name, and still cannot be viewed as bytes.
    stream = data.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    needed = -(-n * bits // 8)
    if stream.shape[-1] != -(-n * bits // 32) * 4:
        raise SchemeError(f"{data.shape[-1]} words a row cannot hold {n} codes of {bits} bits: the tensor is truncated")
    return from_fields(stream[..., :needed].contiguous(), n, bits)


def nibbles_high_first(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 (n) to bytes (ceil(n / 2)): the first of two in the high nibble."""
    padded = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return padded[0::2] << 4 | padded[1::2]


def from_nibbles_high_first(data: Tensor, n: int) -> Tensor:
    """Bytes back to n codes (uint8)."""
    if data.numel() != -(-n // 2):
        raise SchemeError(f"{data.numel()} bytes cannot hold {n} codes of 4 bits: the tensor is truncated")
    return torch.stack([data >> 4, data & 15], dim=-1).flatten()[:n]


def exact(scale: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """scale in `dtype`. Raises: SchemeError if that changes it: codes were then computed with another scale than the reader's."""
    stored = scale.to(dtype)
    if not torch.equal(stored.to(scale.dtype), scale):
        name = str(dtype).removeprefix("torch.")
        raise SchemeError(
            f"{what}: a scale does not fit {name} exactly; quantize with scales of that type (scale_type='{name}') or "
            f"store them in float32"
        )
    return stored


def matrix_of(scale: Tensor) -> Tensor:
    """A scale that broadcasts against the block view of a matrix, as files hold it: () -> (1), (N, 1), (N, K/g, 1) -> (N, K/g),
    (R/r, 1, C/c, 1) -> (R/r, C/c)."""
    if scale.ndim == 0:
        return scale.reshape(1)
    return scale if scale.ndim == 2 else scale.squeeze(-1) if scale.ndim == 3 else scale.squeeze(-1).squeeze(1)


def view_scale(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The opposite of `matrix_of` for a weight of `shape` (N, K)."""
    stored = stored.float()
    if stored.numel() == 1:
        return stored.reshape(())
    if stored.ndim != 2 or not stored.numel():
        raise SchemeError(f"scales of shape {tuple(stored.shape)} do not tile a weight of shape {tuple(shape)}")
    rows, columns = stored.shape
    if columns == 1 and rows == shape[0]:
        return stored
    if shape[0] % rows or shape[1] % columns:
        raise SchemeError(f"scales of shape {tuple(stored.shape)} do not tile a weight of shape {tuple(shape)}")
    return stored.unsqueeze(-1) if rows == shape[0] else stored[:, None, :, None]


def parameters(scale: Tensor, offset: Tensor | None = None) -> Parameters:
    """Parameters as read from a file: what codes are computed with is the stored scale."""
    return Parameters(scale, torch.zeros_like(scale) if offset is None else offset, scale)
