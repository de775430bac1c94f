"""Ranges of several processes become one: each has seen its part of the data."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn

from qatana.quantizer.quantizer import quantizers
from qatana.quantizer.ranges import Range


def ranks() -> int:
    """How many processes work on this model (1 without torch.distributed)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def merge_ranks(model: nn.Module) -> None:
    """Give every range what all processes have seen, merged in the order of their ranks: the same bits everywhere.

    Every process of the default group has to call it. Without torch.distributed nothing happens."""
    if ranks() == 1:
        return
    for quantizer in quantizers(model).values():
        if quantizer.range is not None:
            _merge(quantizer.range)


def _merge(own: Range) -> None:
    parts = [copy.deepcopy(own) for _ in range(ranks())]
    for name, buffer in own.named_buffers():
        found = [torch.empty_like(buffer) for _ in parts]
        dist.all_gather(found, buffer.contiguous())
        for part, value in zip(parts, found, strict=True):
            part.get_buffer(name).copy_(value)
    first, *rest = parts
    for part in rest:
        first.merge(part)
    own.load_state_dict(first.state_dict())


def total_over_ranks(count: int, device: torch.device) -> int:
    """The sum of a number over all processes."""
    if ranks() == 1:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)
