"""One training step, taken apart: milliseconds of forward, backward and optimizer, and the memory that it needs.

This file needs PyTorch alone: benchmarks load it by its path into environments that have other libraries and no qatana."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ENOUGH = 0.05
"""Seconds that a turn lasts at least."""
PARTS = ("step", "forward", "backward", "optimizer")
PEAKS = 5
"""Steps whose peak memory is measured"""
Milliseconds = dict[str, float]
"""By PARTS: the whole step, and the three that it consists of"""


class TrainingStep:
    """Zero the gradients; loss = mean(logits^2); backward; optimizer.

    forward    model -> its logits on the batch; the loss needs no labels, so that every model has the same one
    optimizer  "adamw" or "sgd", fused, with a rate at which thousands of steps change no weight to speak of
    autocast   the forward pass and the loss run under torch.autocast of this dtype; None: as the model is"""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[[nn.Module], Any],
        optimizer: str = "adamw",
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model, self._forward, self._autocast = model.train(), forward, autocast
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(trained, lr=1e-6, momentum=0.9, fused=True)
            if optimizer == "sgd"
            else torch.optim.AdamW(trained, lr=1e-6, fused=True)
        )

    def loss(self) -> Tensor:
        """The forward pass, with its graph."""
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return logits(self._forward(self.model)).float().square().mean()

    def __call__(self) -> Milliseconds:
        """One step."""
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.loss()
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        seconds = (end - begin, forward - begin, backward - forward, end - backward)
        return {part: 1e3 * value for part, value in zip(PARTS, seconds, strict=True)}

    def turn(self, enough: float = ENOUGH) -> Milliseconds:
        """Means over as many steps as fill `enough` seconds, one at least, behind one that is not counted: the caches are the step's own
        then, and the threads of whoever ran before no longer spin."""
        repeats = max(1, int(enough / (1e-3 * self()["step"])))
        found = [self() for _ in range(repeats)]
        return {part: sum(ms[part] for ms in found) / repeats for part in PARTS}

    # -- memory ----------------------------------------------------------------------------------------------------
    def saved_bytes(self) -> int:
        """Bytes that autograd saves for the backward pass, each storage once, parameters and buffers left out."""
        own = {storage for x in (*self.model.parameters(), *self.model.buffers()) for storage, _ in _storages(x)}
        kept: dict[int, int] = {}
        held = []  # so that no address is used twice

        def pack(x: Tensor) -> Tensor:
            held.append(x)
            kept.update((storage, size) for storage, size in _storages(x) if storage not in own)
            return x

        self.optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = self.loss()
        del loss
        return sum(kept.values())

    def kept_bytes(self) -> int:
        """Bytes allocated in the forward pass and not freed at its end, by the allocator's own account: also what an operator keeps
        without telling autograd, and the logits, where the caller of the model still holds them."""
        self.optimizer.zero_grad()
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            loss = self.loss()
        del loss
        return sum(event.self_cpu_memory_usage for event in found.key_averages())

    def peak_bytes(self) -> int | None:
        """How far a step raises the resident memory of the process above what it is before, without gradients and without the buffers that
        qatana keeps from one step for the next: they are part of what a step needs (Linux; else None). The median of a few steps: how much
        the C library's heap keeps of what was freed differs by a quarter from one to the next."""
        found = [peak for peak in (self._peak() for _ in range(PEAKS)) if peak is not None]
        return int(median(found)) if found else None

    def _peak(self) -> int | None:
        self.optimizer.zero_grad()
        buffers = sys.modules.get("qatana.numerics.workspace")
        if buffers is not None:
            buffers.clear()
        gc.collect()
        _trim()
        before = _status("VmRSS")
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
        except OSError:
            return None
        self()
        after = _status("VmHWM")
        return None if before is None or after is None else after - before

    # -- where the time goes ---------------------------------------------------------------------------------------
    def operators(self) -> dict[str, float]:
        """Milliseconds of one step inside each operator, without those that it calls; those under 1 % are "other" together."""
        self()
        with profile(activities=[ProfilerActivity.CPU]) as found:
            self()
        times: defaultdict[str, float] = defaultdict(float)
        for event in found.key_averages():
            times[event.key] += event.self_cpu_time_total / 1e3
        total = sum(times.values())
        large = {name: ms for name, ms in sorted(times.items(), key=lambda item: -item[1]) if ms >= 1e-2 * total}
        return large | {"other": total - sum(large.values())}


def logits(output: Any) -> Tensor:
    """The tensor that a model's output stands for: itself, under "logits", or the first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "items"):
        return output["logits"] if "logits" in output else next(iter(output.values()))
    return output[0]


def _storages(x: Tensor) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the memory behind a tensor; a subclass that wraps tensors has that of each of them."""
    if hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:  # type: ignore[operator]
            yield from _storages(getattr(x, name))
        return
    storage = x.untyped_storage()
    if storage.nbytes():
        yield storage.data_ptr(), storage.nbytes()


def _status(key: str) -> int | None:
    """Bytes of a line of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else 1024 * int(found[1])


def _trim() -> None:
    """Hand freed memory back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
