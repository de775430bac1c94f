"""Checkpoints that other libraries write: of the models given, in a folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of each block, in the shape that the library keeps scales in."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    if args.strategy == "block":
        rows, columns = args.block_structure
        view = weight.unflatten(-1, (-1, columns)).unflatten(0, (-1, rows))
        return view.amin((1, 3)), view.amax((1, 3))
    view = weight.unflatten(-1, (-1, args.group_size))
    return view.amin(-1), view.amax(-1)


def calibrate(module: nn.Module) -> None:
    """What an observer does: ranges to scales, by the library's own arithmetic."""
    args = module.quantization_scheme.weights
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("input_"):
            parameter.data.fill_(2.0 if "scale" in name else 0)
    whole = None
    if args.strategy == "tensor_group":
        whole = (448 * 6 / module.weight.abs().amax()).float().reshape(1)
        module.weight_global_scale.data = whole
    scale, zero = calculate_qparams(*ranges(module.weight, args), args, global_scale=whole)
    module.weight_scale.data = scale
    module.weight_zero_point.data = zero.to(module.weight_zero_point.dtype)


def write_compressed(
    folder: Path, scheme: QuantizationScheme, model: nn.Module, ignore: tuple[str, ...] = ("lm_head",)
) -> dict:
    """Quantize and save `model`; the state_dict that the library itself makes of it again."""
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore)))
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    compressor.decompress_model(model)
    qparams = ("_scale", "_zero_point", "_shape", "_g_idx")
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(qparams)}


def write_bitsandbytes(folder: Path, model: Any, dtype: torch.dtype, **config: Any) -> dict[str, Tensor]:
    """Save, load in bits, save again; the state_dict that the library makes of the second folder."""
    model.save_pretrained(folder / "float")
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "float", quantization_config=BitsAndBytesConfig(**config), dtype=dtype
    )
    quantized.save_pretrained(folder / "bits")
    again = AutoModelForCausalLM.from_pretrained(folder / "bits", dtype=dtype)
    return again.dequantize(dtype=dtype).state_dict()
