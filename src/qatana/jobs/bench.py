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
ENOUGH = 0.05
"""Seconds that a call's turn lasts at least."""

Call = Callable[[Any], Any]


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def times(
    calls: Mapping[str, Call], batch: Any, rounds: int, progress: Progress, torch_threads: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each of `rounds` rounds, by name: in a round every call is made once uncounted, then as often as fills `ENOUGH`
    (one call at least), and the mean of these counts: of a call of a millisecond a single one tells little.

    torch_threads  threads of PyTorch meanwhile; None: all processors. Engines have their own, chosen when a file is opened"""
    before = torch.get_num_threads()
    torch.set_num_threads(torch_threads or threads())
    found: dict[str, list[float]] = {name: [] for name in calls}
    try:
        with progress.bar("rounds", WARMUP + rounds) as advance:
            for number in range(WARMUP + rounds):
                for name, call in calls.items():
                    begin = time.perf_counter()
                    call(batch)  # uncounted: caches are its own then, and threads of the one before no longer spin
                    repeats = max(1, int(ENOUGH / (time.perf_counter() - begin)))
                    begin = time.perf_counter()
                    for _ in range(repeats):
                        call(batch)
                    if number >= WARMUP:
                        found[name].append(1e3 * (time.perf_counter() - begin) / repeats)
                advance()
    finally:
        torch.set_num_threads(before)
    return found


def latencies(calls: Mapping[str, Call], batch: Any, rounds: int, progress: Progress) -> dict[str, float]:
    """Median milliseconds of one call of each, as `times` measures them."""
    return {name: statistics.median(values) for name, values in times(calls, batch, rounds, progress).items()}
