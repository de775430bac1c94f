"""`read_checkpoint`: which library wrote a file, and the reader for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatana.checkpoints.bitnet import read_bitnet
from qatana.checkpoints.bitsandbytes import STATE, read_bitsandbytes
from qatana.checkpoints.checkpoint import Checkpoint
from qatana.checkpoints.compressed_tensors import read_compressed_tensors
from qatana.checkpoints.folder import read_config, read_safetensors, read_tensors
from qatana.checkpoints.gguf_file import read_gguf
from qatana.checkpoints.layers import section
from qatana.checkpoints.onnx_file import read_onnx
from qatana.errors import ArtifactError, SchemeError, nearest

Config = dict[str, Any]
WRITERS: dict[str, Callable[[dict[str, Tensor], Config], Checkpoint]] = {
    "compressed-tensors": read_compressed_tensors,
    "bitsandbytes": read_bitsandbytes,
    "bitnet": read_bitnet,
}
"""Readers by `quant_method` in config.json; GGUF files have one of their own."""
NARROW = (torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)
WEIGHTS = ("weight", "proj", "_packed", ".absmax", ".SCB")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Weights that compressed-tensors, bitsandbytes, Hugging Face BitNet or llama.cpp (GGUF) quantized, or that an ONNX file holds.

    path  a folder with config.json and *.safetensors (also in several files), a .safetensors file, or a .gguf file (the first
          of several: the others are found beside it), or an .onnx file
    The writer is `quantization_config.quant_method`; where a config names none, the tensors' own names tell. Safetensors and
    JSON are all that is read of a folder; of a GGUF file what the `gguf` package (extra `references`) reads, of an ONNX file what
    the `onnx` package (extra `onnx`) does.
    Raises: ArtifactError for truncated, foreign and unknown files, with the tensor's name; MissingExtra without `gguf`."""
    path = Path(path)
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give a folder with *.safetensors or a .gguf file")
    if path.suffix == ".gguf":
        return read_gguf(path)
    if path.suffix == ".onnx":
        try:
            return read_onnx(path)
        except SchemeError as error:
            raise ArtifactError(f"{path}: {error}") from error
    if path.is_dir():
        config, tensors = read_config(path), read_tensors(path)
    elif path.suffix == ".safetensors":
        config, tensors = read_config(path.parent), read_safetensors(path)
    else:
        raise ArtifactError(f"{path} is no folder, .safetensors, .gguf or .onnx file")
    try:
        checkpoint = WRITERS[_writer(config, tensors)](tensors, config)
        _refuse_leftovers(checkpoint)
        return checkpoint
    except SchemeError as error:
        raise ArtifactError(f"{path}: {error}") from error


def _writer(config: Config, tensors: dict[str, Tensor]) -> str:
    """The library that wrote the tensors. Raises: SchemeError if it is unknown or none did."""
    method = str(section(config).get("quant_method") or _by_names(tensors))
    if method in WRITERS:
        return method
    if method:
        raise SchemeError(f"unknown quant_method '{method}' in config.json{nearest(method, WRITERS)}, *.gguf files")
    raise SchemeError(
        "no tensor is quantized in a way that qatana knows, and config.json names no quant_method; a float model needs no "
        "reading: load it as it is"
    )


def _refuse_leftovers(checkpoint: Checkpoint) -> None:
    """A quantized weight in a layout that its writer's reader does not know must not pass for a float one."""
    for name, tensor in checkpoint.floats.items():
        if name.endswith(WEIGHTS) and tensor.dtype in NARROW:
            raise SchemeError(
                f"'{name}' is {tensor.dtype} and part of no layer as {checkpoint.writer} writes them; is quant_method in "
                f"config.json the right one?"
            )


def _by_names(tensors: dict[str, Tensor]) -> str:
    """The writer by what only its tensors are called; "" where none is."""
    for name, tensor in tensors.items():
        if STATE in name or name.endswith((".absmax", ".SCB")):
            return "bitsandbytes"
        if name.endswith("weight_packed"):
            return "compressed-tensors"
        weight = tensors.get(name.removesuffix("_scale")) if name.endswith("weight_scale") else None
        if weight is not None:
            packed = weight.dtype == torch.uint8 and tensor.numel() == 1
            return "bitnet" if packed else "compressed-tensors"
    return ""
