"""Activations quantized at run time, as ONNX Runtime's kernels do it."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.numerics.affine import round_clamp
from qatana.numerics.scheme import Scheme


def at_run_time(scheme: Scheme) -> bool:
    """Whether kernels quantize an activation so at run time: uint8 per tensor, or int8n per group, by the functions below."""
    how = (scheme.granularity.kind, str(scheme.format), scheme.symmetric)
    known = (("tensor", "uint8", False), ("group", "int8n", True))
    return scheme.scale == "dynamic" and scheme.is_integer and how in known


def dynamic_tensor(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear: uint8 levels of x, with scale and zero point from the whole tensor.

    low = min(0, min x), high = max(0, max x);  scale = (high - low) / 255 (1 if equal);
    zero_point = round(clamp(0 - low / scale, 0, 255));  level = clamp(round(x / scale) + zero_point, 0, 255) - zero_point
    Returns levels (*shape), scale (), zero_point (), float32. The scale has no gradient."""
    scale, zero_point = dynamic_parameters(x)
    return round_clamp(x.float() / scale, 0 - zero_point, 255 - zero_point), scale, zero_point


@torch.no_grad()
def dynamic_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of `dynamic_tensor`, float32 scalars."""
    low, high = torch.aminmax(x.detach().float())
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / torch.full_like(low, 255)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, torch.round((0 - low / scale).clamp(0, 255))


def dynamic_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """MatMulNBits (accuracy level 4): int8 levels per row and block of `size` along the last dimension.

    m = max|x| of the block;  scale = m / 127;  level = round(x * f32(127 / m)), 0 where m = 0 (the reciprocal is rounded first:
    it is not a division by the scale).   Returns levels (*lead, K / size, size) and scale (*lead, K / size, 1), float32."""
    blocks = x.float().reshape(*x.shape[:-1], x.shape[-1] // size, size)
    with torch.no_grad():
        largest = blocks.detach().abs().amax(-1, keepdim=True)
        most = torch.full_like(largest, 127)  # number / tensor would be reciprocal * number: two roundings
        scale = largest / most
        inverse = torch.where(largest > 0, most / largest, torch.zeros_like(largest))
    return round_clamp(blocks * inverse, -127, 127), scale
