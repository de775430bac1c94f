"""The price of a training step on a GPU: a Llama-like block, hidden size 4,096, 8,192 tokens, compiled, under bfloat16 autocast.

    python -m benchmarks.gpu.step [--rounds 20] [--quick] [--device cuda] [--out benchmarks/gpu/results.json]

Contestants take turns in one process: the float block, W8A8 (int8 codes forward: weights per channel, inputs per token) and W4 (weights
alone, 4 bits in blocks of 128). Of each: the median and the spread of a step (forward, backward, AdamW), and the bytes that live between
its forward and its backward pass beyond those before. Needs torch alone besides qatana; --quick is a small block, for a CPU too."""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatana as qt
from qatana.files import write_json

FLOAT = "bfloat16"
RECIPES: dict[str, dict[str, str]] = {
    "qatana W8A8": {"weight": "int8/channel", "input": "int8/token"},
    "qatana W4": {"weight": "int4/group128"},
}
BARS = {"qatana W8A8": 0.95, "qatana W4": 1.05}
SAVED_BAR = 0.6


class Block(nn.Module):
    """RMSNorm, causal attention, RMSNorm, gated MLP: a decoder layer of Llama, without positions (they cost nothing here)."""

    def __init__(self, hidden: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        context = F.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        x = x + self.o(context.transpose(1, 2).flatten(2))
        h = self.between(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@dataclass
class Contestant:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    run: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, model: nn.Module, compiled: bool) -> Contestant:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        return cls(model, optimizer, torch.compile(model) if compiled else model)  # type: ignore[arg-type]

    def step(self, x: Tensor) -> tuple[float, int]:
        """Seconds, and bytes kept between the passes (0 on a CPU)."""
        _wait(x)
        before, start = _allocated(x), time.perf_counter()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = self.run(x).float().square().mean()
        kept = _allocated(x) - before
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        _wait(x)
        return time.perf_counter() - start, kept


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _allocated(x: Tensor) -> int:
    return torch.cuda.memory_allocated() if x.is_cuda else 0


def _prepared(block: Block, schemes: dict[str, str], x: Tensor) -> nn.Module:
    recipe = qt.Recipe.from_dict({"target": "torch", "rules": [{"schemes": schemes}]})
    model = copy.deepcopy(block)
    model = qt.prepare(model, qt.plan(model, recipe, x))
    qt.calibrate(model, [x])
    return model.train()


def measure(device: str, rounds: int, quick: bool) -> dict[str, Any]:
    hidden, heads, inner, batch = (256, 4, 512, (2, 64)) if quick else (4096, 32, 11008, (4, 2048))
    torch.manual_seed(0)
    block = Block(hidden, heads, inner).to(device)
    x = torch.randn(*batch, hidden, device=device, requires_grad=True)
    sample = x.detach()[:1, :128]
    made = {FLOAT: Contestant.of(copy.deepcopy(block), True)}
    for name, schemes in RECIPES.items():
        made[name] = Contestant.of(_prepared(block, schemes, sample), True)
    times: dict[str, list[tuple[float, int]]] = {name: [] for name in made}
    for turn in range(rounds + 3):  # three uncounted: compilation, the optimizer's state, the allocator
        for name, contestant in made.items():
            found = contestant.step(x)
            times[name] += [found] if turn >= 3 else []
    rows = [_row(name, times[name], times[FLOAT]) for name in made]
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    shape = {"hidden": hidden, "heads": heads, "inner": inner, "batch": list(batch)}
    return {
        "rows": rows,
        "shape": shape,
        "rounds": rounds,
        "device": machine,
        "torch": torch.__version__,
        "qatana": qt.__version__,
    }


def _row(name: str, turns: list[tuple[float, int]], base: list[tuple[float, int]]) -> dict[str, Any]:
    ratios = sorted(a[0] / b[0] for a, b in zip(turns, base, strict=True))
    kept, float_kept = turns[0][1], base[0][1]
    return {
        "name": name, "milliseconds": 1e3 * statistics.median(t for t, _ in turns),
        "ratio": statistics.median(ratios), "spread": [ratios[0], ratios[-1]], "bar": BARS.get(name),
        "kept_bytes": kept, "kept_ratio": kept / float_kept if float_kept else None, "kept_bar": SAVED_BAR if name in BARS else None,
    }  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="a small block: whether it works, not how fast it is")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/gpu/results.json"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --quick tries the script")
    found = measure(given.device, given.rounds, given.quick)
    write_json(given.out, {"command": shlex.join(["python", "-m", "benchmarks.gpu.step", *arguments]), **found})
    print(json.dumps(found["rows"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
