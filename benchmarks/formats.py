"""Fake quantization of a 4096 x 4096 float32 weight, forward and backward, against a plain copy of it.

    python -m benchmarks.formats [--threads 1] [--rounds 7] [--json FILE] [NAME ...]

Each round times `x.clone()` and then every scheme, so that a noisy machine hurts both; medians over the rounds. `torch` is
torch's own fused operator, given its scales; `memory` is the largest growth of the process, in copies of the weight."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qatana.numerics import fake_quantize_by, fake_quantize_held, hold, scheme

SCHEMES = {
    "int8 per channel": scheme("int8", "channel", scale="dynamic"),
    "uint8 per channel": scheme("uint8", "channel", scale="dynamic", symmetric=False),
    "int8 per tensor": scheme("int8", scale="dynamic"),
    "int8 learned": scheme("int8", "channel", scale="learned"),
    "int4 group 128": scheme("int4", group=128, scale="dynamic"),
    "int4 group 128 asymmetric": scheme("int4", group=128, scale="dynamic", symmetric=False),
    "int4 group 32": scheme("int4", group=32, scale="dynamic"),
    "int4 group 128 learned": scheme("int4", group=128, scale="learned"),
    "fp8 e4m3 per channel": scheme("fp8:e4m3/channel", scale="dynamic"),
    "fp8 e5m2 per tensor": scheme("fp8:e5m2", scale="dynamic"),
    "mxfp8": scheme("mxfp8"),
    "mxfp6": scheme("mxfp6"),
    "mxfp4": scheme("mxfp4"),
    "mxfp4 rceil": scheme("mxfp4", rule="rceil"),
    "nvfp4": scheme("nvfp4"),
    "nf4": scheme("nf4"),
    "nf4+double": scheme("nf4+double"),
    "fp4": scheme("fp4"),
    "bitnet": scheme("bitnet"),
    "binary": scheme("binary"),
    **{
        f"gguf:{n}": scheme(f"gguf:{n}")
        for n in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "q4_k", "q6_k")
    },
}


def step(x: torch.Tensor, grad: torch.Tensor, quantize: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The gradient is handed out, not added into `x.grad`: that would time a copy of `grad`, which a training step does not make."""
    torch.autograd.grad(quantize(x), x, grad)


def torch_channel(x: torch.Tensor) -> torch.Tensor:
    scale = x.detach().abs().amax(1) / 127
    return torch.fake_quantize_per_channel_affine(x, scale, torch.zeros(len(x), dtype=torch.int32), 0, -127, 127)


def cases(weight: torch.Tensor) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What a training step does to a weight by each scheme; searches were done before it, and their parameters are held."""
    out: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"torch int8 per channel": torch_channel}
    for name, s in SCHEMES.items():
        if s.scale == "learned":
            start = 0.02 if "8" in name[:5] else 0.3
            scale = torch.full(s.granularity.scale_shape(weight.shape), start, requires_grad=True)
            out[name] = lambda x, s=s, scale=scale: fake_quantize_by(x, s, scale)
        elif s.holds:
            held = hold(weight, s)
            out[name] = lambda x, s=s, held=held: fake_quantize_held(x, s, held)
        else:
            out[name] = lambda x, s=s: fake_quantize_by(x, s)
    return out


def measure(names: list[str], rounds: int) -> dict[str, float]:
    torch.manual_seed(0)
    x, grad = torch.randn(4096, 4096, requires_grad=True), torch.randn(4096, 4096)
    found = {name: f for name, f in cases(x.detach()).items() if not names or name in names}
    times: dict[str, list[float]] = {name: [] for name in ["clone", *found]}
    for _ in range(rounds):
        for name, f in found.items():
            start = time.perf_counter()
            copy = x.detach().clone()
            times["clone"].append(time.perf_counter() - start)
            del copy
            start = time.perf_counter()
            step(x, grad, f)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measure(options.names, options.rounds)
    clone = found.pop("clone")
    print(f"x.clone() {clone * 1e3:.1f} ms, {options.threads} thread(s), torch {torch.__version__}", file=sys.stderr)
    for name, seconds in found.items():
        print(f"{name:28} {seconds * 1e3:8.1f} ms {seconds / clone:6.2f} x clone")
    if options.json:
        rows = {name: {"seconds": seconds, "times_clone": seconds / clone} for name, seconds in found.items()}
        options.json.write_text(
            json.dumps({"clone": clone, "threads": options.threads, "schemes": rows}, indent=2) + "\n"
        )
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB", file=sys.stderr)


if __name__ == "__main__":
    main()
