"""Latency of several models in one run, round by round, so that a busy or throttled machine slows all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from qatana.jobs.progress import Progress

WARMUP = 1

Call = Callable[[Any], Any]


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def times(
    calls: Mapping[str, Call], batch: Any, rounds: int, progress: Progress, torch_threads: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each of `rounds` rounds, by name: in a round every call is made twice, and the second one counts.

    torch_threads  threads of PyTorch meanwhile; None: all processors. Engines have their own, chosen when a file is opened"""
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads or threads())
    found: dict[str, list[float]] = {name: [] for name in calls}
    try:
        with progress.bar("rounds", WARMUP + rounds) as advance:
            for number in range(WARMUP + rounds):
                for name, call in calls.items():
                    call(batch)  # uncounted: caches are its own then, and threads of the one before no longer spin
                    begin = time.perf_counter()
                    call(batch)
                    if number >= WARMUP:
                        found[name].append(1e3 * (time.perf_counter() - begin))
                advance()
    finally:
        torch.set_num_threads(before)
    return found


def latencies(calls: Mapping[str, Call], batch: Any, rounds: int, progress: Progress) -> dict[str, float]:
    """Median milliseconds of one call of each, as `times` measures them."""
    return {name: statistics.median(values) for name, values in times(calls, batch, rounds, progress).items()}
