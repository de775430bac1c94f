"""Ranges of several processes become one: each has seen its part of the data."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

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


@torch.no_grad()
def agree(ranges: Sequence[Range]) -> None:
    """After a training step that every process began with the same ranges: each becomes that of a step with the batches of all.

    low = min over ranks of low, high = max over ranks of high, histogram = mean over ranks. Of one batch per step this holds for moving
    averages too: low + m (batch - low) grows with batch, so its minimum belongs to the smallest batch minimum. A process in which fewer
    batches reached the layer (experts, skipped layers) does not take part in its range.
    Here, once per step, and not where a batch is observed: there a layer that one process skips would leave the others waiting.
    Every process of the default group has to call it. Without torch.distributed nothing happens."""
    if ranks() == 1 or not ranges:
        return
    place = ranges[0].count.device
    counts = torch.stack([own.count.to(place) for own in ranges])
    most = _reduced(counts, dist.ReduceOp.MAX)
    takes_part = counts == most
    ends = torch.stack([torch.stack([own.low, -own.high]).to(place) for own in ranges], 1)
    low, high = _reduced(ends.where(takes_part, torch.inf), dist.ReduceOp.MIN)
    for index, own in enumerate(ranges):
        own.count.copy_(most[index])
        own.low.copy_(low[index])
        own.high.copy_(-high[index])
    kept = [index for index, own in enumerate(ranges) if own.has_histogram]
    if kept:
        _mean_histograms([ranges[index] for index in kept], takes_part[kept].double())


def _mean_histograms(ranges: Sequence[Range], takes_part: Tensor) -> None:
    """takes_part (ranges,) float64: whether this process has a say, 0 or 1."""
    place = takes_part.device
    extents = _reduced(torch.stack([own.extent.to(place) for own in ranges]), dist.ReduceOp.MAX).tolist()
    for own, extent in zip(ranges, extents, strict=True):
        own.widen(extent)
    parts = torch.stack([own.histogram.to(place) for own in ranges]) * takes_part[:, None]
    means = _reduced(parts, dist.ReduceOp.SUM) / _reduced(takes_part, dist.ReduceOp.SUM)[:, None]
    for own, mean in zip(ranges, means, strict=True):
        own.histogram.copy_(mean)


def _reduced(x: Tensor, by: dist.ReduceOp.RedOpType) -> Tensor:
    """The same on every process: x of all of them, combined element by element."""
    out = x.clone()
    dist.all_reduce(out, by)
    return out


def total_over_ranks(count: int, device: torch.device) -> int:
    """The sum of a number over all processes."""
    if ranks() == 1:
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)
