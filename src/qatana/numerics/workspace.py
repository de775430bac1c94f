"""Memory whose first touch costs less: on a CPU that of a large new buffer costs more than the arithmetic done in it.

Buffers that are used again: each thread has its own. One keeps its largest size until `clear`; what it holds is only good until the next
call that asks for that name, so it never leaves the operator that asked. And zeros that nobody has written."""

from __future__ import annotations

import math
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress

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


LARGE = 2**22
"""Bytes from which zeros come from the system: 2 of its large pages."""


def zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    """A new float32 tensor of zeros. On Linux the memory of a large one is the system's, which clears it in large pages, and those alone
    that are written: a table's gradient, of which a batch touches a few rows, takes a quarter of torch.zeros' time or less."""
    size = math.prod(shape) * torch.float32.itemsize
    if device.type != "cpu" or size < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(shape, dtype=torch.float32, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)  # keeps the memory as long as it lives


def clear() -> None:
    """Free this thread's buffers."""
    _local.__dict__.pop("kept", None)
