"""compressed-tensors: pack-, int-, float-, naive-, mxfp4-, mxfp6-, mxfp8- and nvfp4-quantized layers, mixed in one file or not.

Which of them a layer is, its own tensors tell: their names, dtypes and shapes. config.json adds the bits of integers and the
size of blocks alone: its groups are chosen by module classes, which a file does not name."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatana.checkpoints.checkpoint import Checkpoint, Stored
from qatana.checkpoints.layers import explained, parts_of, rest_of, section
from qatana.errors import SchemeError, nearest
from qatana.numerics import Parameters, Scheme, scheme, storage

FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"),
    *("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized", "nvfp4-pack-quantized"),
)
PARTS = (
    *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
    "weight_g_idx",
)
ACTIVATIONS = tuple(
    f"{what}_{part}"
    for what in ("input", "output", "q", "k", "v")
    for part in ("scale", "zero_point", "global_scale", "g_idx")
)
_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_RULES = {"mxfp4": "even", "mxfp6": "even", "mxfp8": "rceil", "nvfp4": "compressed-tensors"}
_PLAIN = (torch.int8, torch.float8_e4m3fn)


def read_compressed_tensors(tensors: dict[str, Tensor], config: dict[str, Any]) -> Checkpoint:
    """A layer with `weight_scale` is quantized; the rest is float, or belongs to activations."""
    about = section(config)
    with explained("quantization_config"):
        _refuse(about)
        known = _known(about)
    layers = [name.removesuffix("weight_scale") for name in tensors if name.endswith("weight_scale")]
    layers += [name.removesuffix("weight_packed") for name in tensors if name.endswith("weight_packed")]
    layers = list(dict.fromkeys(layers))
    weights: dict[str, Stored] = {}
    for layer in layers:
        with explained(layer):
            weights[layer + "weight"] = _stored(parts_of(tensors, layer, PARTS), known)
    rest = rest_of(tensors, layers, PARTS)
    activations = {name: tensor for name, tensor in rest.items() if name.rpartition(".")[2] in ACTIVATIONS}
    floats = {name: tensor for name, tensor in rest.items() if name not in activations}
    return Checkpoint("compressed-tensors", weights, floats, activations)


def _refuse(about: dict[str, Any]) -> None:
    """What would be read wrongly: other formats, sparse weights, rotated weights."""
    groups = about.get("config_groups") or {}
    of_groups = [group.get("format") for group in groups.values() if isinstance(group, dict)]
    for format in filter(None, [about.get("format"), *of_groups]):
        if format not in FORMATS:
            raise SchemeError(f"compressed-tensors format '{format}' is not supported{nearest(str(format), FORMATS)}")
    sparsity = about.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise SchemeError(f"sparsity_config '{sparsity['format']}' is not supported: save the model without it")
    if (about.get("transform_config") or {}).get("config_groups"):
        raise SchemeError(
            "transform_config: the weights are rotated, and a model without the rotation computes other numbers; save "
            "the model without it"
        )


class _Known(NamedTuple):
    """What tensors cannot tell, where every group of config.json says the same: bits of integers, (rows, columns) of blocks."""

    bits: int | None
    block: tuple[int, int] | None


def _known(about: dict[str, Any]) -> _Known:
    groups = (about.get("config_groups") or {}).values()
    weights = [group["weights"] for group in groups if isinstance(group, dict) and group.get("weights")]
    bits = {int(w.get("num_bits", 8)) for w in weights if w.get("type", "int") == "int"}
    blocks = {tuple(int(n) for n in w["block_structure"]) for w in weights if w.get("block_structure")}
    block = blocks.pop() if len(blocks) == 1 else ()
    return _Known(bits.pop() if len(bits) == 1 else None, (block[0], block[1]) if block else None)


def _stored(parts: dict[str, Tensor], known: _Known) -> Stored:
    if "weight_g_idx" in parts:
        raise SchemeError(
            "weight_g_idx: groups of reordered columns are not supported; quantize without activation ordering "
            "(actorder=None or 'weight')"
        )
    if "weight_scale" not in parts:
        raise SchemeError("weight_packed without weight_scale: the file is truncated")
    packed, scale = parts.get("weight_packed"), parts["weight_scale"]
    if packed is None:
        return _one_byte(parts, scale, known)
    if packed.ndim != 2 or packed.dtype not in (torch.int32, torch.uint8):
        raise SchemeError(f"weight_packed is {packed.dtype} {tuple(packed.shape)}, not an int32 or uint8 matrix")
    if packed.dtype == torch.int32:
        codes, parameters = storage.unpack_quantized(parts, width := _width(parts, known.bits))
        return Stored.of(_integers(width, parameters, scale, codes, parts), codes, parameters, scale.dtype)
    return _four_or_six(parts, packed, scale)


def _one_byte(parts: dict[str, Tensor], scale: Tensor, known: _Known) -> Stored:
    """int-, float-, naive- and mxfp8-quantized."""
    weight = parts.get("weight")
    if weight is None or weight.dtype not in _PLAIN or weight.ndim != 2:
        what = "missing" if weight is None else f"{weight.dtype} {tuple(weight.shape)}"
        raise SchemeError(f"weight is {what}, not an int8 or float8_e4m3fn matrix: this layer was not compressed")
    if scale.dtype == torch.uint8:
        codes, parameters = storage.unpack_mxfp8(parts)
        return Stored.of(_grouped("mxfp8", codes, parameters), codes, parameters, torch.bfloat16)
    codes, parameters = storage.unpack_plain(parts)
    if parameters.scale.ndim == 4:
        _check_blocks(codes, parameters, known.block)
    if weight.dtype == torch.int8:
        found = _integers(known.bits or 8, parameters, scale, codes, parts)
    else:
        found = scheme(f"fp8:e4m3/{_granularity(parameters, codes)}", scale_type=_scale_type(scale))
    return Stored.of(found, codes, parameters, scale.dtype)


def _check_blocks(codes: Tensor, parameters: Parameters, block: tuple[int, int] | None) -> None:
    """The last blocks may hang over the weight's edges, and then the number of scales alone suggests smaller ones."""
    if block is None:
        raise SchemeError("scales per block, and config.json says no block_structure (or several): its size is unknown")
    if tuple(codes.shape) != (block[0] * parameters.scale.shape[0], block[1] * parameters.scale.shape[2]):
        raise SchemeError(
            f"blocks of {block[0]}x{block[1]} hang over a weight of shape {tuple(codes.shape)}: not supported"
        )


def _four_or_six(parts: dict[str, Tensor], packed: Tensor, scale: Tensor) -> Stored:
    """nvfp4-, mxfp4- and mxfp6-pack-quantized. The library dequantizes all of them to bfloat16."""
    if "weight_global_scale" in parts:
        name, (codes, parameters) = "nvfp4", storage.unpack_nvfp4(parts)
    elif scale.dtype != torch.uint8 or scale.ndim != 2:
        raise SchemeError(f"weight_scale is {scale.dtype} {tuple(scale.shape)}; packed floats have uint8 exponents")
    elif packed.shape[1] == 16 * scale.shape[1]:
        name, (codes, parameters) = "mxfp4", storage.unpack_mxfp4(parts)
    else:
        name, (codes, parameters) = "mxfp6", storage.unpack_mxfp6(parts)
    return Stored.of(_grouped(name, codes, parameters), codes, parameters, torch.bfloat16)


def _width(parts: dict[str, Tensor], bits: int | None) -> int:
    """Bits a code, from the number of words a row and, where rows are too short to tell, config.json."""
    columns = int(parts["weight_shape"][-1]) if "weight_shape" in parts else 0
    words = parts["weight_packed"].shape[-1]
    fitting = [width for width in range(1, 9) if -(-columns * width // 32) == words]
    if bits in fitting or len(fitting) == 1:
        return bits if bits in fitting else fitting[0]
    raise SchemeError(
        f"{words} words a row hold {columns} codes of {' or '.join(map(str, fitting)) or 'no number of'} bits, config.json "
        f"says {bits or 'nothing'}: the file is truncated, lacks its config, or is older than compressed-tensors 0.20 with 3, 5, "
        f"6 or 7 bits"
    )


def _integers(width: int, parameters: Parameters, scale: Tensor, codes: Tensor, parts: dict[str, Tensor]) -> Scheme:
    symmetric = "weight_zero_point" not in parts
    granularity = _granularity(parameters, codes)
    return scheme(f"int{width}/{granularity}", symmetric=symmetric, scale_type=_scale_type(scale))


def _grouped(name: str, codes: Tensor, parameters: Parameters) -> Scheme:
    """The scheme of that name in groups as long as the scales say; scales by the rule that the library's observers have."""
    return scheme(f"{name}/{_granularity(parameters, codes)}", rule=_RULES[name])


def _granularity(parameters: Parameters, codes: Tensor) -> str:
    """The granularity whose block view the parameters broadcast against."""
    scale, (rows, columns) = parameters.scale, codes.shape
    if scale.ndim == 0:
        return "tensor"
    if scale.ndim == 2:
        return "channel"
    if scale.ndim == 3:
        return f"group{columns // scale.shape[1]}"
    return f"block{rows // scale.shape[0]}x{columns // scale.shape[2]}"


def _scale_type(scale: Tensor) -> str:
    if scale.dtype not in _TYPES:
        raise SchemeError(f"weight_scale is {scale.dtype}, not one of {', '.join(_TYPES.values())}")
    return _TYPES[scale.dtype]
