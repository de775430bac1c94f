"""Checkpoint tensors of compressed-tensors (0.20): pack-quantized, int-, float-, mxfp4-, mxfp6-, mxfp8- and nvfp4-quantized linears.

Codes are (N, K); `parameters` broadcast against the block view that their granularity gives. The names are those of one
linear layer; what else a checkpoint needs is the `quantization_config` in config.json. Reference: compressed_tensors/compressors."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.scales import Parameters
from qatana.numerics.storage import bits

Tensors = dict[str, Tensor]


def pack_quantized(
    codes: Tensor, parameters: Parameters, width: int, dtype: torch.dtype, *, symmetric: bool = True
) -> Tensors:
    """ "pack-quantized" (W4A16 and other widths): signed codes of `width` bits in int32 words along K, stored plus 2^(width-1).

    weight_packed (N, ceil(K * width / 32)) int32, weight_scale in `dtype`, weight_shape int64; weight_zero_point
    (ceil(N * width / 32), K/g) int32 where asymmetric, packed along N. Zero points lie in the signed range too.
    Raises: SchemeError for a code or zero point out of range, or a scale that `dtype` does not hold."""
    half = 2 ** (width - 1)
    scale = bits.matrix_of(parameters.scale)
    out = {
        "weight_packed": bits.words(codes.to(torch.int16) + half, width),
        "weight_scale": bits.exact(scale, dtype, "weight_scale"),
        "weight_shape": torch.tensor(codes.shape),
    }
    if not symmetric:
        zero = bits.matrix_of(parameters.offset).to(torch.int16) + half
        out["weight_zero_point"] = bits.words(zero.t(), width).t().clone(memory_format=torch.contiguous_format)
    return out


def unpack_quantized(tensors: Tensors, width: int) -> tuple[Tensor, Parameters]:
    """int8 codes (N, K) and parameters of "pack-quantized" tensors.

    Raises: SchemeError for missing or truncated tensors and for activation ordering (`weight_g_idx`)."""
    packed, stored, shape = _take(tensors, "weight_packed", "weight_scale", "weight_shape")
    if "weight_g_idx" in tensors:
        raise SchemeError(
            "weight_g_idx: groups of reordered columns are not supported; export without activation ordering"
        )
    rows, columns = (int(n) for n in shape)
    half = 2 ** (width - 1)
    codes = (bits.from_words(packed, columns, width).to(torch.int16) - half).to(torch.int8)
    if codes.shape[0] != rows:
        raise SchemeError(f"weight_packed has {codes.shape[0]} rows, weight_shape says {rows}")
    offset = None
    if "weight_zero_point" in tensors:
        zero = tensors["weight_zero_point"]
        if zero.dtype == torch.int32:  # packed, per channel and group; one zero point for the tensor stays int8
            zero = bits.from_words(zero.t(), rows, width).t().to(torch.int16) - half
        offset = bits.view_scale(zero, (rows, columns))
    return codes, bits.parameters(bits.view_scale(stored, (rows, columns)), offset)


def pack_plain(codes: Tensor, parameters: Parameters, dtype: torch.dtype, *, symmetric: bool = True) -> Tensors:
    """ "int-quantized" (codes int8) and "float-quantized" (codes: bit patterns uint8 of E4M3): one byte an element.

    weight int8 or float8_e4m3fn (N, K), weight_scale in `dtype`, weight_zero_point int8 where asymmetric."""
    weight = codes.contiguous().view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes.to(torch.int8)
    out = {"weight": weight, "weight_scale": bits.exact(bits.matrix_of(parameters.scale), dtype, "weight_scale")}
    if not symmetric:
        out["weight_zero_point"] = bits.matrix_of(parameters.offset).to(torch.int8)
    return out


def unpack_plain(tensors: Tensors) -> tuple[Tensor, Parameters]:
    """Codes (int8, or uint8 bit patterns of E4M3) and parameters of "int-quantized" and "float-quantized" tensors."""
    weight, stored = _take(tensors, "weight", "weight_scale")
    if weight.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise SchemeError(f"weight is {weight.dtype}, not int8 or float8_e4m3fn: this layer was not compressed")
    codes = weight if weight.dtype == torch.int8 else weight.view(torch.uint8)
    shape = tuple(weight.shape)
    zero = tensors.get("weight_zero_point")
    offset = None if zero is None else bits.view_scale(zero, shape)
    return codes, bits.parameters(bits.view_scale(stored, shape), offset)


def pack_nvfp4(codes: Tensor, local: Tensor, whole: Tensor) -> Tensors:
    """ "nvfp4-pack-quantized": value = e2m1(code) * (local / whole).

    codes (N, K) uint8 bit patterns, two to a byte, the first in the low nibble; local (N, K/16, 1) holds E4M3 numbers; whole
    (1) float32 is the *inverse* of a scale, 448 * 6 / max|x|. weight_packed, weight_scale float8_e4m3fn, weight_global_scale."""
    return {
        "weight_packed": bits.fields(codes, 4),
        "weight_scale": bits.exact(bits.matrix_of(local), torch.float8_e4m3fn, "weight_scale"),
        "weight_global_scale": whole.float().reshape(1),
    }


def unpack_nvfp4(tensors: Tensors) -> tuple[Tensor, Parameters]:
    """E2M1 bit patterns (uint8) and parameters, scale = local / whole, of "nvfp4-pack-quantized" tensors."""
    packed, local, whole = _take(tensors, "weight_packed", "weight_scale", "weight_global_scale")
    codes = bits.from_fields(packed, 2 * packed.shape[-1], 4)
    return codes, bits.parameters((local.float() / whole.float().reshape(1, 1)).unsqueeze(-1))


def pack_mxfp4(codes: Tensor, parameters: Parameters) -> Tensors:
    """ "mxfp4-pack-quantized": E2M1 patterns two to a byte as in NVFP4; weight_scale (N, K/32) uint8, exponent plus 127."""
    return {"weight_packed": bits.fields(codes, 4), "weight_scale": _e8m0(parameters.scale)}


def unpack_mxfp4(tensors: Tensors) -> tuple[Tensor, Parameters]:
    """E2M1 bit patterns (uint8) and parameters of "mxfp4-pack-quantized" tensors."""
    packed, stored = _take(tensors, "weight_packed", "weight_scale")
    return bits.from_fields(packed, 2 * packed.shape[-1], 4), bits.parameters(_from_e8m0(stored))


def pack_mxfp6(codes: Tensor, parameters: Parameters) -> Tensors:
    """ "mxfp6-pack-quantized": E2M3 patterns, four in three bytes, lowest bits first; weight_scale as in MXFP4."""
    return {"weight_packed": bits.fields(codes, 6), "weight_scale": _e8m0(parameters.scale)}


def unpack_mxfp6(tensors: Tensors) -> tuple[Tensor, Parameters]:
    """E2M3 bit patterns (uint8) and parameters of "mxfp6-pack-quantized" tensors."""
    packed, stored = _take(tensors, "weight_packed", "weight_scale")
    return bits.from_fields(packed, packed.shape[-1] * 4 // 3, 6), bits.parameters(_from_e8m0(stored))


def pack_mxfp8(codes: Tensor, parameters: Parameters) -> Tensors:
    """ "mxfp8-quantized": weight float8_e4m3fn, weight_scale (N, K/32) uint8, exponent plus 127."""
    return {"weight": codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": _e8m0(parameters.scale)}


def unpack_mxfp8(tensors: Tensors) -> tuple[Tensor, Parameters]:
    """E4M3 bit patterns (uint8) and parameters of "mxfp8-quantized" tensors."""
    weight, stored = _take(tensors, "weight", "weight_scale")
    return weight.view(torch.uint8), bits.parameters(_from_e8m0(stored))


def _e8m0(scale: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(bits.matrix_of(scale))
    if bool((mantissa != 0.5).any()):
        raise SchemeError("an MX scale is a power of two; quantize with scale_type='e8m0'")
    return (exponent + 126).to(torch.uint8)


def _from_e8m0(stored: Tensor) -> Tensor:
    return stored.contiguous().view(torch.float8_e8m0fnu).float().unsqueeze(-1)


def _take(tensors: Tensors, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in tensors]
    if missing:
        raise SchemeError(f"{', '.join(missing)} is missing: the checkpoint is of another format or truncated")
    return [tensors[name] for name in names]
