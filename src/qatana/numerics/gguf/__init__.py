"""GGUF block types as grids, equal to llama.cpp's own quantizers in every byte: blocks of reals to codes, values, bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.errors import SchemeError, nearest
from qatana.numerics.gguf.blocks import Grid, Parameters, check_shape, view_of
from qatana.numerics.gguf.floats import MXFP4, NVFP4
from qatana.numerics.gguf.integers import Q8_0, Minimum, SignedExtreme
from qatana.numerics.gguf.kquants import Q6_K, KMinimum, SuperParameters
from qatana.numerics.gguf.ternary import Q1_0, Q2_0, Ternary

__all__ = [
    "GRIDS",
    "Grid",
    "Parameters",
    "SuperParameters",
    "check_shape",
    "dequantize",
    "fake_quantize",
    "grid",
    "quantize",
    "view_of",
]

_ALL = (
    *(Q8_0(), SignedExtreme(4), Minimum(4), SignedExtreme(5), Minimum(5)),
    *(Ternary("trits"), Ternary("bits"), Q2_0(), Q1_0(), MXFP4(), NVFP4()),
    *(KMinimum(4), KMinimum(5), Q6_K()),
)
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _ALL}
"""Every type by its lower-case name: GRIDS["q4_0"]."""


def grid(name: str) -> Grid:
    """The block type of that name, "q4_0" or "Q4_0". Raises: SchemeError for an unknown one."""
    found = GRIDS.get(name.lower())
    if found is None:
        raise SchemeError(f"unknown GGUF type '{name}'{nearest(name.lower(), GRIDS)}")
    return found


def quantize(x: Tensor, name: str) -> Tensor:
    """The bytes of x (*lead, K), any float dtype: uint8 (*lead, K / row * row_bytes), as the file holds them.

    Raises: SchemeError for an unknown type, a K that its blocks do not divide, NaN or infinity, a scale beyond float16."""
    found = grid(name)
    view = view_of(found, x)
    if not bool(view.isfinite().all()):
        raise SchemeError(
            f"gguf:{found.name}: the tensor holds NaN or infinity, for which no block has a code; look for its cause"
        )
    parameters = found.solve(view)
    if not bool(parameters.scale.isfinite().all() and parameters.offset.isfinite().all()):
        raise SchemeError(
            f"gguf:{found.name} stores scales in float16, at most 65504; max|x| = {float(view.abs().max()):.6g} needs a "
            f"larger one: rescale the tensor or leave it in float"
        )
    return found.to_bytes(found.codes(view, parameters), parameters)


def dequantize(data: Tensor, shape: torch.Size | tuple[int, ...], name: str) -> Tensor:
    """float32 values of `shape` that bytes (uint8, any shape) hold. Raises: SchemeError if their number does not fit."""
    found = grid(name)
    return found.values_(*found.from_bytes(data, shape)).reshape(shape)


def fake_quantize(x: Tensor, name: str) -> Tensor:
    """dequantize(quantize(x)) in x's dtype, without a detour over bytes and without a gradient; not checked for overflow."""
    found = grid(name)
    view = view_of(found, x)
    parameters = found.solve(view)
    return found.fake(view, parameters).reshape(x.shape).to(x.dtype)
