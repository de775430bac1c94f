"""Quantizers on a 4096 x 4096 float32 weight, against a plain copy of it in the same run (bar 4)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.inference import spread
from qatana.jobs.progress import Progress
from qatana.numerics import Scheme, fake_quantize_by, quantize_by, scheme

SIZE, QUICK_SIZE, WARMUP = 4096, 256, 1
CODES, FAKE, LEARNED = "to codes", "fake, forward and backward", "learned scale, forward and backward"
BARS = {CODES: 1.0, FAKE: 2.5, LEARNED: 3.5}
WEIGHTS = {
    "int8 per channel": ("int8", "channel"),
    "int8 per tensor": ("int8", "tensor"),
    "int4 in blocks of 128": ("int4", "group128"),
}


@dataclass(frozen=True)
class Case:
    """What is done to the weight, and how often the time of a copy it may take."""

    name: str
    what: str
    call: Callable[[], Any]


def measure(rounds: int, threads: int, quick: bool, progress: Progress) -> dict[str, Any]:
    """Milliseconds and times the copy of every case. Each round copies before each case, so that a busy machine slows both; what a call
    returns is dropped at once, as in training, where the memory is used again."""
    size = QUICK_SIZE if quick else SIZE
    progress.say(f"quantizers: {size} x {size} float32, {rounds} rounds, {threads} threads")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        x, gradient = torch.randn(size, size), torch.randn(size, size)
        cases = made(x, gradient)
        times: dict[str, list[float]] = {case.name: [] for case in cases}
        copies: dict[str, list[float]] = {case.name: [] for case in cases}
        with progress.bar("rounds", WARMUP + rounds) as advance:
            for number in range(WARMUP + rounds):
                for case in cases:
                    copy, ms = _ms(x.clone), _ms(case.call)
                    if number >= WARMUP:
                        copies[case.name].append(copy)
                        times[case.name].append(ms)
                advance()
    finally:
        torch.set_num_threads(before)
    rows = [_row(case, times[case.name], copies[case.name], size == SIZE) for case in cases]
    return {"size": size, "copy": spread([ms for values in copies.values() for ms in values]), "cases": rows}


def made(x: Tensor, gradient: Tensor) -> list[Case]:
    """Quantize to codes with the search of the range, fake-quantize with its gradient, and the same with a learned scale."""
    weight = x.clone().requires_grad_()
    found = []
    for title, (name, granularity) in WEIGHTS.items():
        plain = scheme(name, granularity, scale="dynamic")
        learned = scheme(name, granularity, scale="learned")
        largest = 7.0 if name == "int4" else 127.0
        scale = torch.full(learned.granularity.scale_shape(x.shape), 4.0 / largest, requires_grad=True)
        found += [
            Case(f"{title}: {CODES}", CODES, lambda s=plain: quantize_by(x, s)),
            Case(f"{title}: {FAKE}", FAKE, lambda s=plain: _step(weight, gradient, s, None)),
            Case(f"{title}: {LEARNED}", LEARNED, lambda s=learned, scale=scale: _step(weight, gradient, s, scale)),
        ]
    return found


def _step(weight: Tensor, gradient: Tensor, scheme: Scheme, scale: Tensor | None) -> Any:
    """Gradients are handed out: adding them into `.grad` would time a copy that a training step does not make."""
    inputs = [weight] if scale is None else [weight, scale]
    return torch.autograd.grad(fake_quantize_by(weight, scheme, scale), inputs, gradient)


def _ms(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def _row(case: Case, times: list[float], copies: list[float], judged: bool) -> dict[str, Any]:
    ratios = [ms / copy for ms, copy in zip(times, copies, strict=True)]
    ratio = statistics.median(ratios)
    row = {"name": case.name, "milliseconds": spread(times), "ratio": ratio, "min": min(ratios), "max": max(ratios)}
    return row | ({"bar": BARS[case.what], "pass": ratio <= BARS[case.what]} if judged else {})
