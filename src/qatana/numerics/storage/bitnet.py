"""Checkpoint tensors of Hugging Face's BitNet (transformers 5.23): ternary weights, 2 bits each, four rows to a byte.

Reference: transformers/integrations/bitnet.py."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.scales import Parameters
from qatana.numerics.storage import bits

Tensors = dict[str, Tensor]
LINEAR_CLASSES = ("bitlinear", "autobitlinear")


def pack_bitnet(codes: Tensor, scale: Tensor, linear_class: str, dtype: torch.dtype = torch.float32) -> Tensors:
    """weight uint8 (N/4, K): row r + i * N/4 at bits 2i of row r, code + 1. weight_scale (1), by `linear_class`:

    "autobitlinear" stores the scale and multiplies by it; "bitlinear" stores 1 / scale and divides. Both names stand in
    `quantization_config.linear_class`; read with the wrong one, a model is off by the square of its scales.
    codes (N, K) in {-1, 0, 1}; scale one number, rounded to `dtype` in the form that is stored.
    Raises: SchemeError for N not a multiple of 4, other codes, more than one scale, or an unknown class."""
    if codes.ndim != 2 or codes.shape[0] % 4:
        raise SchemeError(f"BitNet packs four rows to a byte: shape {tuple(codes.shape)} has no multiple of 4 rows")
    if codes.numel() and not -1 <= int(codes.min()) <= int(codes.max()) <= 1:
        raise SchemeError(f"BitNet codes are -1, 0 and 1, not {int(codes.min())}..{int(codes.max())}")
    if scale.numel() != 1:
        raise SchemeError(f"BitNet has one scale per weight, not {scale.numel()}: use granularity 'tensor'")
    _check(linear_class)
    quarters = (codes.to(torch.int16) + 1).to(torch.uint8).reshape(4, -1, codes.shape[1])
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    stored = scale.float().reshape(1)
    return {
        "weight": packed,
        "weight_scale": (stored.reciprocal() if linear_class == "bitlinear" else stored).to(dtype),
    }


def unpack_bitnet(tensors: Tensors, linear_class: str) -> tuple[Tensor, Parameters]:
    """int8 codes (N, K) and parameters (scale: one number). Raises: SchemeError for other tensors or the fourth code."""
    _check(linear_class)
    weight, stored = tensors.get("weight"), tensors.get("weight_scale")
    if weight is None or stored is None or weight.dtype != torch.uint8:
        raise SchemeError("a packed BitNet linear has weight (uint8) and weight_scale; this layer was not packed")
    codes = torch.cat([weight >> shift & 3 for shift in (0, 2, 4, 6)]).to(torch.int8) - 1
    if codes.numel() and int(codes.max()) > 1:
        raise SchemeError("a 2-bit field holds 3, which is no ternary code: the tensor is damaged or of another format")
    scale = stored.float().reshape(())
    return codes, bits.parameters(scale.reciprocal() if linear_class == "bitlinear" else scale)


def _check(linear_class: str) -> None:
    if linear_class not in LINEAR_CLASSES:
        raise SchemeError(f"unknown BitNet linear_class '{linear_class}'; it is one of {', '.join(LINEAR_CLASSES)}")
