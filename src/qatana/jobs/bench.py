"""Latency of several models in one run, round by round, so that a busy or throttled machine slows all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from qatana.jobs.evaluate import Runner
from qatana.jobs.progress import Progress

WARMUP = 1


def threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def latencies(runners: Mapping[str, Runner], batch: Any, rounds: int, progress: Progress) -> dict[str, float]:
    """Median milliseconds of one call of each runner, over `rounds` rounds in which each is called twice and the second
    call counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads())
    times: dict[str, list[float]] = {name: [] for name in runners}
    try:
        with progress.bar("rounds", WARMUP + rounds) as advance:
            for number in range(WARMUP + rounds):
                for name, runner in runners.items():
                    runner(
                        batch
                    )  # uncounted: caches are its own then, and threads of the one before have stopped spinning
                    begin = time.perf_counter()
                    runner(batch)
                    if number >= WARMUP:
                        times[name].append(1e3 * (time.perf_counter() - begin))
                advance()
    finally:
        torch.set_num_threads(before)
    return {name: statistics.median(values) for name, values in times.items()}
