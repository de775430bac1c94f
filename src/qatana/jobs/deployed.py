"""How fast deployed files are: each beside its float original, in every installed engine; and what the engines made of their integers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qatana as qt
from qatana.errors import ArtifactError, MissingExtra, require
from qatana.hardware import describe, processor
from qatana.jobs import bench
from qatana.jobs.evaluate import FileRunner, Runner
from qatana.jobs.job import ENGINES
from qatana.jobs.progress import Progress
from qatana.jobs.stages import versions

_FLOAT_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64}
"""ONNX element types of float inputs"""


def deployed(
    files: Sequence[Path], original: Path | None, batch: int, sequence: int, rounds: int, progress: Progress
) -> dict[str, Any]:
    """Latency of each file and of its float original in each installed engine, all in one run; and how many of the integer products that a
    file asks for the engine computes in integers.

    original  the float file; None: float.onnx beside each file, where there is one
    Returns {"rows": [{"file", "engine", "milliseconds", "speedup", "asked", "integer"} or with "reason"], "machine", "versions"}
    Raises: ArtifactError for a file that does not exist, MissingExtra without any engine."""
    engines = [engine for engine in ENGINES if find_spec(engine) is not None]
    if not engines:
        raise MissingExtra("no engine is installed; install qatana[onnx] or qatana[openvino]")
    floats = {path: found for path in files if (found := _original(path, original)) is not None}
    everything = list(dict.fromkeys([*floats.values(), *files]))
    calls: dict[tuple[Path, str], Runner] = {}
    reasons: dict[tuple[Path, str], str] = {}
    for path in everything:
        for engine in engines:
            try:
                calls[path, engine] = FileRunner(path, engine, bench.threads())
                calls[path, engine](feeds(path, batch, sequence))
            except qt.QatanaError as error:
                if not path.is_file():
                    raise
                calls.pop((path, engine), None)
                reasons[path, engine] = str(error)
    times = _times(calls, batch, sequence, rounds, progress)
    rows = [_row(path, engine, calls, times, reasons, floats) for path in everything for engine in engines]
    place = describe() | {"processor": processor(), "threads": bench.threads()}
    return {"batch": batch, "sequence": sequence, "rows": rows, "machine": place, "versions": versions()}


def _times(
    calls: Mapping[tuple[Path, str], Runner], batch: int, sequence: int, rounds: int, progress: Progress
) -> dict[tuple[Path, str], list[float]]:  # fmt: skip
    """Milliseconds of each round. Files may name their inputs differently, so each has feeds of its own."""
    inputs = {path: feeds(path, batch, sequence) for path, _ in calls}
    named = {str(i): (lambda _, key=key: calls[key](inputs[key[0]])) for i, key in enumerate(calls)}
    found = bench.times(named, None, rounds, progress)
    return {key: found[str(i)] for i, key in enumerate(calls)}


def _row(
    path: Path, engine: str, calls: Mapping[tuple[Path, str], Any], times: Mapping[tuple[Path, str], list[float]],
    reasons: Mapping[tuple[Path, str], str], floats: Mapping[Path, Path],
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {"file": str(path), "engine": engine, "bytes": path.stat().st_size}
    if (path, engine) in reasons:
        return row | {"reason": reasons[path, engine]}
    ours, base = times[path, engine], times.get((floats.get(path, path), engine))
    row["milliseconds"] = {"median": statistics.median(ours), "min": min(ours), "max": max(ours)}
    row["speedup"] = (
        statistics.median(b / a for a, b in zip(ours, base, strict=True)) if base and path in floats else None
    )
    row["asked"], row["integer"] = calls[path, engine].session.integer_products()
    return row


def _original(path: Path, given: Path | None) -> Path | None:
    beside = given or path.with_name("float.onnx")
    return beside if beside != path and (given is not None or beside.is_file()) else None


def feeds(path: Path, batch: int, sequence: int) -> dict[str, Tensor]:
    """Inputs of a file: ones where it takes integers (tokens, masks), else normal values. The first free dimension is the batch, any other
    the sequence.   Raises: ArtifactError."""
    onnx = require("onnx", "onnx")
    if not path.is_file():
        raise ArtifactError(f"{path} does not exist; qatana.export(artifact, path) writes it")
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's exception classes differ from version to version
        raise ArtifactError(f"{path} is no ONNX file or is truncated; export it again") from error
    weights = {tensor.name for tensor in graph.initializer}
    found: dict[str, Tensor] = {}
    for value in graph.input:
        if value.name in weights:
            continue
        tensor = value.type.tensor_type
        free = iter((batch,))
        shape = [dim.dim_value or next(free, sequence) for dim in tensor.shape.dim]
        kind = _FLOAT_TYPES.get(tensor.elem_type)
        numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found[value.name] = torch.ones(shape, dtype=torch.int64) if kind is None else numbers.to(kind)
    return found
