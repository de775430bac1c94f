"""Float and integer files of one model, timed against each other in one run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qatana as qt
from benchmarks.models import Shape, fold
from qatana.jobs.bench import times
from qatana.jobs.evaluate import FileRunner, Runner, TorchRunner
from qatana.jobs.progress import Progress

TORCH, ORT, OPENVINO = "PyTorch float32", "ONNX Runtime float32", "OpenVINO float32"
ORT_INT8, OPENVINO_INT8 = "ONNX Runtime int8", "OpenVINO int8"


@dataclass(frozen=True)
class Bar:
    """`fast` has to be `ratio` times as fast as `slow`."""

    model: str
    fast: str
    slow: str
    ratio: float


BARS = (
    Bar("bert", ORT_INT8, ORT, 2.2),
    Bar("bert", OPENVINO_INT8, OPENVINO, 3.2),
    Bar("bert", OPENVINO_INT8, TORCH, 6.0),
    Bar("resnet", ORT_INT8, ORT, 2.4),
    Bar("resnet", OPENVINO_INT8, OPENVINO, 3.7),
)


def measure(
    name: str, shape: Shape, targets: tuple[str, ...], rounds: int, threads: int, out: Path, reuse: bool,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Make the files of a model in `out` (reuse: those that it lacks), time every contestant, judge the bars of `name`."""
    progress.say(f"{shape.title}: float and integer files")
    files, notes = _files(name, shape, targets, out, reuse)
    entries = _entries(files)
    calls: dict[str, Runner] = {TORCH: TorchRunner(_float_model(shape))}
    calls |= {who: FileRunner(path, engine, threads) for who, (path, engine) in entries.items()}
    progress.say(f"{shape.title}: {rounds} rounds of {len(calls)} contestants, {threads} threads each")
    found = times(calls, shape.batch(0), rounds, progress, threads)
    return {
        "title": shape.title,
        "notes": notes,
        "files": {who: path.name for who, (path, _) in entries.items()},
        "milliseconds": {who: spread(values) for who, values in found.items()},
        "bars": [_judge(bar, found) for bar in BARS if bar.model == name and shape.judged],
    }


def _float_model(shape: Shape) -> Any:
    model = shape.make()
    return fold(model) if shape.folded else model


def _files(
    name: str, shape: Shape, targets: tuple[str, ...], out: Path, reuse: bool
) -> tuple[dict[str, Path], list[str]]:
    """The float file and one file per target that works; and which ones do not."""
    out.mkdir(parents=True, exist_ok=True)
    files = {key: out / f"{name}-{key.replace(':', '-')}.onnx" for key in ("float", *targets)}
    notes = []
    if not (reuse and files["float"].exists()):
        qt.export_float(_float_model(shape), shape.batch(0), files["float"])
    for target in targets:
        if reuse and files[target].exists():
            continue
        try:
            integer_file(shape, target, files[target])
        except qt.QatanaError as error:
            notes.append(f"{target}: {error}")
            del files[target]
    return files, notes


def integer_file(shape: Shape, target: str, path: Path) -> Path:
    """The whole flow but training: quantized, calibrated on random batches, converted, written."""
    model, recipe = shape.make(), qt.recipe(target).skip("classifier")
    model = qt.prepare(model, qt.plan(model, recipe, shape.batch(0)))
    qt.calibrate(model, [shape.batch(seed) for seed in (1, 2)])
    return qt.export(qt.convert(model), path)


def _entries(files: Mapping[str, Path]) -> dict[str, tuple[Path, str]]:
    """Contestant -> its file and engine. OpenVINO runs every file; its plain name goes to its own target's where there is one."""
    found = {ORT: (files["float"], "onnxruntime"), OPENVINO: (files["float"], "openvino")}
    own_first = sorted(files.keys() - {"float"}, key=lambda target: not target.startswith("openvino:"))
    for target in own_first:
        if target.startswith("ort:"):
            found[_free(ORT_INT8, target, found)] = (files[target], "onnxruntime")
        found[_free(OPENVINO_INT8, target, found)] = (files[target], "openvino")
    return found


def _free(who: str, target: str, taken: Mapping[str, Any]) -> str:
    return f"{who}, {target}" if who in taken else who


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": values}


def _judge(bar: Bar, found: Mapping[str, list[float]]) -> dict[str, Any]:
    """The ratio is the median of the rounds' ratios: both calls of a round met the same machine."""
    if bar.fast not in found:
        return {"fast": bar.fast, "slow": bar.slow, "bar": bar.ratio, "ratio": None, "pass": False}
    ratios = [slow / fast for fast, slow in zip(found[bar.fast], found[bar.slow], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "fast": bar.fast, "slow": bar.slow, "bar": bar.ratio, "ratio": ratio,
        "min": min(ratios), "max": max(ratios), "pass": ratio >= bar.ratio,
    }  # fmt: skip
