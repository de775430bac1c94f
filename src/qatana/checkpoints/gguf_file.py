"""GGUF files of llama.cpp, one or split into several, by the reader of the `gguf` package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qatana.checkpoints.checkpoint import Checkpoint, Stored
from qatana.errors import ArtifactError, SchemeError, require
from qatana.numerics import Parameters, gguf, scheme

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_PLAIN = ("F64", "F32", "F16", "I8", "I16", "I32", "I64")


def read_gguf(path: Path) -> Checkpoint:
    """Names, and the order of rows, are the file's own: llama.cpp turns rows of some models' attention weights."""
    weights: dict[str, Stored] = {}
    floats: dict[str, Tensor] = {}
    for file in _files(path):
        for tensor in _tensors(file):
            shape, kind = tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name
            try:
                if kind in _PLAIN or kind == "BF16":
                    floats[tensor.name] = _float(tensor.data, kind, shape)
                else:
                    weights[tensor.name] = _stored(tensor.data, kind.lower(), shape)
            except SchemeError as error:
                raise ArtifactError(f"{file}: {tensor.name}: {error}") from error
    return Checkpoint("gguf", weights, floats)


def _files(path: Path) -> list[Path]:
    """The file, or every part of it: name-00001-of-00003.gguf."""
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    return [path.with_name(f"{match[1]}-{part:05d}-of-{match[3]}.gguf") for part in range(1, int(match[3]) + 1)]


def _tensors(file: Path) -> list[Any]:
    """ReaderTensor of each, its data mapped into memory."""
    package = require("gguf", "references")
    if not file.is_file():
        raise ArtifactError(f"{file} does not exist; a split GGUF file is read with all of its parts in one folder")
    try:
        with np.errstate(all="ignore"):
            reader = package.GGUFReader(str(file))
    except Exception as error:  # the package says ValueError, IndexError, KeyError, OverflowError ... of damaged bytes
        raise ArtifactError(f"{file} is truncated or not GGUF ({error}); copy it again") from error
    if reader.byte_order != "I":
        raise ArtifactError(f"{file} has the byte order of another processor; convert it (gguf's convert_endian)")
    return reader.tensors


def _stored(data: Any, kind: str, shape: tuple[int, ...]) -> Stored:
    if kind not in gguf.GRIDS:
        raise SchemeError(
            f"GGUF type '{kind}' is not supported; requantize the file to one of {', '.join(sorted(gguf.GRIDS))}"
        )
    grid, found = gguf.grid(kind), scheme(f"gguf:{kind}")
    gguf.check_shape(grid, shape)
    raw = torch.from_numpy(np.array(data, dtype=np.uint8).reshape(-1))
    # Row by row of the format: the shape of the scheme's stack, which super-blocks need whole.
    codes, parameters = grid.from_bytes(raw, (int(np.prod(shape)) // grid.row, grid.row))
    return Stored(found, codes.to(found.code_dtype), _as_parameters(parameters), shape, torch.float32)


def _as_parameters(parameters: Any) -> Parameters:
    """GGUF's parameters have fields of their own behind the first; grids of its types take them where others take three."""
    return parameters


def _float(data: Any, kind: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.from_numpy(np.array(data))
    return (tensor.view(torch.bfloat16) if kind == "BF16" else tensor).reshape(shape)
