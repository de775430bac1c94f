"""Buffers that are used again: on a CPU the first touch of a large new buffer costs more than the arithmetic done in it.

Each thread has its own. A buffer keeps its largest size until `clear`; what it holds is only good until the next call that asks for
that name, so it never leaves the operator that asked."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_local = threading.local()


def buffer(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized memory of `shape`: the thread's own of that name on a CPU, fresh elsewhere (CUDA's allocator keeps blocks itself)."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    kept: dict[str, Tensor] = _local.__dict__.setdefault("kept", {})
    size = math.prod(shape) * dtype.itemsize
    if name not in kept or kept[name].numel() < size:
        kept.pop(name, None)  # the old one is freed before the new one is made
        kept[name] = torch.empty(size, dtype=torch.uint8)
    return kept[name][:size].view(dtype).view(shape)


def clear() -> None:
    """Free this thread's buffers."""
    _local.__dict__.pop("kept", None)
