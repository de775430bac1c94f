"""torch's own narrow storage: float8 dtypes, float4_e2m1fn_x2, and the prepacked int4 weights of its CPU matmul."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.scales import Parameters
from qatana.numerics.storage import bits

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "e8m0": torch.float8_e8m0fnu}


def pack_float8(codes: Tensor, format: str) -> Tensor:
    """Bit patterns (uint8) as the torch dtype of "e4m3", "e5m2" or "e8m0"; no byte changes."""
    if format not in FLOAT8:
        raise SchemeError(f"torch has no float8 '{format}'; it has {', '.join(FLOAT8)}")
    return codes.to(torch.uint8).contiguous().view(FLOAT8[format])


def unpack_float8(tensor: Tensor) -> tuple[Tensor, str]:
    """Bit patterns (uint8) and the format's name of a float8 tensor."""
    for name, dtype in FLOAT8.items():
        if tensor.dtype == dtype:
            return tensor.view(torch.uint8), name
    raise SchemeError(f"{tensor.dtype} is not one of torch's float8 dtypes that qatana reads: {', '.join(FLOAT8)}")


def pack_float4(codes: Tensor) -> Tensor:
    """E2M1 bit patterns (*lead, n), n even, as float4_e2m1fn_x2 (*lead, n / 2): the first of two in the low nibble."""
    if codes.shape[-1] % 2:
        raise SchemeError(f"float4_e2m1fn_x2 holds two numbers: the last dimension {codes.shape[-1]} must be even")
    return bits.fields(codes, 4).view(torch.float4_e2m1fn_x2)


def unpack_float4(tensor: Tensor) -> Tensor:
    """E2M1 bit patterns (*lead, 2n) uint8 of a float4_e2m1fn_x2 tensor (*lead, n)."""
    return bits.from_fields(tensor.view(torch.uint8), 2 * tensor.shape[-1], 4)


def pack_int4_matmul(codes: Tensor, parameters: Parameters) -> dict[str, Tensor]:
    """What torch.ops.aten._weight_int4pack_mm_for_cpu takes: value = (code - 8) * scale + zero, bfloat16.

    codes (N, K) 0..15, N a multiple of 16, K even; parameters per group (N, K/g, 1), g 32, 64, 128 or 256, offset the zero
    point in codes. weight (N, K/2) uint8, in an order that depends on the processor: a file must not hold it.
    scales_and_zeros (K/g, N, 2) bfloat16, zero = (8 - offset) * scale.
    Raises: SchemeError for shapes that the operator does not take, or scales and zeros that bfloat16 does not hold."""
    rows, columns = codes.shape
    if (
        rows % 16
        or columns % 2
        or parameters.scale.ndim != 3
        or columns // parameters.scale.shape[1] not in (32, 64, 128, 256)
    ):
        raise SchemeError(
            f"torch's int4 matmul takes N % 16 = 0 and groups of 32, 64, 128 or 256, not shape {tuple(codes.shape)}"
        )
    scale = bits.matrix_of(parameters.scale)
    zero = (8 - bits.matrix_of(parameters.offset)) * scale
    pairs = bits.exact(torch.stack([scale, zero], dim=-1), torch.bfloat16, "scales_and_zeros")
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return {"weight": packed, "scales_and_zeros": pairs.transpose(0, 1).contiguous()}


def unpack_int4_matmul(tensors: dict[str, Tensor]) -> tuple[Tensor, Parameters]:
    """Codes (N, K) uint8 and parameters, on the kind of processor that packed them: the identity times the weight."""
    packed, pairs = tensors["weight"], tensors["scales_and_zeros"]
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    group = columns // pairs.shape[0]
    ones = torch.stack([torch.ones(pairs.shape[:2]), torch.zeros(pairs.shape[:2])], dim=-1).bfloat16()
    identity = torch.eye(columns, dtype=torch.bfloat16)
    levels = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, packed, group, ones)
    scale, zero = (part.float().t().unsqueeze(-1) for part in pairs.unbind(-1))
    offset = torch.where(scale != 0, 8 - zero / scale, torch.full_like(scale, 8))
    return (levels.t().float() + 8).to(torch.uint8).reshape(rows, columns), bits.parameters(scale, offset)
