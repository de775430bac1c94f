"""Memory whose first touch costs less: on a CPU that of a large new buffer costs more than the arithmetic done in it.

Buffers that are used again: each thread has its own. One keeps its largest size until `clear`; what it holds is only good until the next
call that asks for that name, so it never leaves the operator that asked. Zeros that nobody has written, and zeros in the memory of a tensor
that is gone."""

from __future__ import annotations

import math
import mmap
import sys
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
    if not _from_system(shape, device):
        return torch.zeros(shape, dtype=torch.float32, device=device)
    return _tensor(_new(shape), shape)


def zeros_again(shape: Sequence[int], device: torch.device) -> Tensor:
    """A new float32 tensor of zeros, cleared by writing them. A large one takes the memory of the last one of its size, if no tensor holds
    that any more: a gradient that is dropped before each step finds its pages where they were, which takes a fifth of fresh ones' time."""
    if not _from_system(shape, device):
        return torch.zeros(shape, dtype=torch.float32, device=device)
    spare: dict[int, tuple[mmap.mmap, int]] = _local.__dict__.setdefault("spare", {})
    size = math.prod(shape) * torch.float32.itemsize
    memory, alone = spare.pop(size, (None, 0))
    if memory is not None and sys.getrefcount(memory) == alone:
        out = _tensor(memory, shape).zero_()
    else:
        memory = _new(shape)
        alone = sys.getrefcount(memory)  # how many references this function has, which a tensor's would add to
        out = _tensor(memory, shape)
    spare[size] = memory, alone
    return out


def _from_system(shape: Sequence[int], device: torch.device) -> bool:
    large = math.prod(shape) * torch.float32.itemsize >= LARGE
    return large and device.type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE")


def _new(shape: Sequence[int]) -> mmap.mmap:
    """Zeros of the system, which are no memory yet."""
    size = math.prod(shape) * torch.float32.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _tensor(memory: mmap.mmap, shape: Sequence[int]) -> Tensor:
    """It keeps the memory as long as it lives."""
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


def clear() -> None:
    """Free this thread's buffers, and memory kept for zeros."""
    _local.__dict__.pop("kept", None)
    _local.__dict__.pop("spare", None)
