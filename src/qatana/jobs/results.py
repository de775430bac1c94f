"""From stages to rows: every model of a run in every engine, judged and timed together.

row = {"name", "engine", "f1" | "accuracy" (points), "file_bytes", "latency_ms",
       "speedup_vs_float_same_engine", "speedup_vs_torch_float"}"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any, TypeVar

from qatana.jobs.evaluate import Runner
from qatana.jobs.job import RecipeSection
from qatana.jobs.models import WEIGHTS
from qatana.jobs.run import PTQ, QAT, Run
from qatana.jobs.stages import Record

TORCH = "torch"
INTEGERS = "integers"
"""PyTorch running an artifact: the integer model, where no file of another engine is deployed"""
Row = dict[str, Any]
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Candidate:
    """One row to be: a model in an engine. times_as: name of the row whose latency it shares (the same operators)."""

    name: str
    engine: str
    source: Record
    bytes: int
    runner: Callable[[], Runner]
    times_as: str


@dataclass
class Results:
    """Everything that a run found.

    scores     "name engine" -> Score;  certificates: {verdict, text, parity, drift, certificate} per deployed file and engine
    parity     codes layer by layer, labels of the QAT models against their files in their own engine;  drift  codes end to end
    labels     "name engine" -> {compared, different}: labels of a file in an engine against those of its QAT model
    seconds    of all stages of a kind;   made  of the calibration (NAME-ptq) and the training (NAME-qat) of each recipe alone"""

    metric: str
    key: str
    rows: list[Row]
    scores: dict[str, Any]
    curves: dict[str, Any]
    plans: dict[str, Any]
    certificates: list[dict[str, Any]]
    parity: dict[str, int]
    drift: dict[str, int]
    labels: dict[str, dict[str, int]]
    seconds: dict[str, float]
    made: dict[str, float]
    versions: dict[str, str] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """What the certificates that failed say."""
        return [entry["text"] for entry in self.certificates if not entry["verdict"]]

    def summary(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            "rows": self.rows, "parity": self.parity, "drift": self.drift, "labels": self.labels,
            **{key: {k: round(v, 2) for k, v in getattr(self, key).items()} for key in ("seconds", "made")},
        }  # fmt: skip


def collect(run: Run) -> Results:
    """Run every stage of a job that is not done yet, and gather the results."""
    sections = run.job.recipes
    candidates = _float_candidates(run)
    certificates = []
    for section in sections:
        for phase in run.phases(section):
            candidates += _quantized_candidates(run, section, phase)
        certificates += _certificates(run, section)
    scores = {f"{c.name} {c.engine}": run.evaluate(c.name, c.engine, c.source, c.runner).result for c in candidates}
    timed = {f"{c.name} {c.engine}": c for c in candidates if c.name == c.times_as}
    times = run.benchmark({k: c.runner for k, c in timed.items()}, {k: c.source for k, c in timed.items()}).result
    rows = [_row(c, run.task.key, scores[f"{c.name} {c.engine}"]["value"], times) for c in candidates]
    labels = _labels(run, candidates)
    return Results(
        run.task.metric, run.task.key, rows, scores, _curves(run), _plans(run), certificates,
        _parity(run, certificates, labels), total(entry["drift"] for entry in certificates), labels,
        _seconds(run), _made(run), run.stages.versions, run.task.shown,
    )  # fmt: skip


def _float_candidates(run: Run) -> list[Candidate]:
    record = run.float_()
    size = (run.folder / "float" / WEIGHTS).stat().st_size
    found = [Candidate("float", TORCH, record, size, lambda: run.torch_runner(run.float_model()), "float")]
    for engine in run.job.engines:
        file = run.float_file()
        found.append(
            Candidate(
                "float", engine, file, file.result["bytes"], lambda e=engine: run.file_runner("float.onnx", e), "float"
            )
        )
    if run.job.float_.longer is not None and not run.ptq_only:
        longer = run.float_longer()
        found.append(
            Candidate(
                "float-longer", TORCH, longer, size, lambda: run.torch_runner(run.float_model("float-longer")), "float"
            )
        )
    return found


def _quantized_candidates(run: Run, section: RecipeSection, phase: str) -> list[Candidate]:
    """The model in PyTorch, and its file in every engine where this phase is deployed."""
    final = run.phases(section)[-1]
    name, times_as = f"{section.name}-{phase}", f"{section.name}-{final}"
    trained = run.trained(section, phase)
    deployed = phase == final or run.job.evaluation.deploy_ptq
    size = run.convert(section, phase if deployed else final).result["bytes"]
    found = [Candidate(name, TORCH, trained, size, lambda: run.torch_runner(run.model(section, phase)), times_as)]
    if deployed and run.is_free(section):
        record, stem = run.convert(section, phase), run.stem(section, phase)
        found.append(Candidate(name, INTEGERS, record, size, lambda: run.artifact_runner(stem), times_as))
    elif deployed:
        file = run.export(section, phase)
        stem = run.stem(section, phase)
        for engine in run.file_engines(section):
            found.append(
                Candidate(
                    name,
                    engine,
                    file,
                    file.result["bytes"],
                    lambda e=engine: run.file_runner(f"{stem}.onnx", e),
                    times_as,
                )
            )
    return found


def _certificates(run: Run, section: RecipeSection) -> list[dict[str, Any]]:
    final = run.phases(section)[-1]
    if run.is_free(section):
        return [run.verify(section, final, TORCH).result]
    engines = run.job.evaluation.verify_engines or run.file_engines(section)[:1]
    return [run.verify(section, final, engine).result for engine in engines if engine in run.file_engines(section)]


def _row(candidate: Candidate, key: str, value: float, times: dict[str, float]) -> Row:
    own = times[f"{candidate.times_as} {candidate.engine}"]
    same = TORCH if candidate.engine == INTEGERS else candidate.engine
    return {
        "name": candidate.name,
        "engine": candidate.engine,
        key: round(value, 4),
        "file_bytes": candidate.bytes,
        "latency_ms": round(own, 4),
        "speedup_vs_float_same_engine": round(times[f"float {same}"] / own, 4),
        "speedup_vs_torch_float": round(times[f"float {TORCH}"] / own, 4),
    }


def _labels(run: Run, candidates: list[Candidate]) -> dict[str, dict[str, int]]:
    """Labels of each file against those of its QAT model in PyTorch, on all test rows that are judged."""
    found = {}
    for c in candidates:
        if c.engine != TORCH and not c.name.startswith("float"):
            ours, theirs = run.labels(c.name, TORCH), run.labels(c.name, c.engine)
            found[f"{c.name} {c.engine}"] = {"compared": len(ours), "different": int((ours != theirs).sum())}
    return found


def _parity(run: Run, certificates: list[dict[str, Any]], labels: dict[str, dict[str, int]]) -> dict[str, int]:
    """Sums over the certificates' codes, and over the labels of each trained file in the engine that its target is made for; artifacts
    that PyTorch runs have those labels that their certificates compared."""
    own = [
        labels[f"{section.name}-{run.phases(section)[-1]} {engine}"]
        for section in run.job.recipes
        for engine in run.file_engines(section)[:1]
    ]
    parts = [entry["parity"] for entry in certificates if entry["certificate"]["engine"] == TORCH]
    own += [{"compared": part["labels_compared"], "different": part["labels_different"]} for part in parts]
    codes = {"codes_compared": 0, "codes_different": 0} | total([entry["parity"] for entry in certificates])
    return codes | {
        "labels_compared": sum(entry["compared"] for entry in own),
        "labels_different": sum(entry["different"] for entry in own),
    }


def total(counts: Iterable[dict[str, Number]]) -> dict[str, Number]:
    """Sums key by key."""
    entries = list(counts)
    return {key: sum(entry[key] for entry in entries[1:]) + entries[0][key] for key in entries[0]} if entries else {}


def _curves(run: Run) -> dict[str, Any]:
    found = {"float": run.float_().result["curve"]}
    for section in run.job.recipes:
        if QAT in run.phases(section):
            found[f"{section.name}-{QAT}"] = run.qat(section).result["curve"]
    return {name: curve for name, curve in found.items() if curve}


def _plans(run: Run) -> dict[str, Any]:
    return {section.name: run.ptq(section).result["plan"] for section in run.job.recipes}


def _seconds(run: Run) -> dict[str, float]:
    """How long the stages took when they ran (not now, where they were skipped)."""
    parts = {
        "float": ("float", "float-longer"),
        "ptq": (f".{PTQ}",),
        "qat": (f".{QAT}",),
        "export": (".convert", ".export", "float-file"),
    }
    found = dict.fromkeys((*parts, "verify"), 0.0)
    for name, record in run.stages.records.items():
        key = next(
            (part for part, ends in parts.items() if name.endswith(ends)), "verify" if ".verify-" in name else ""
        )
        if key:
            found[key] += record.seconds
    return found


def _made(run: Run) -> dict[str, float]:
    """As `_seconds`, of each recipe's models: what a training costs behind its calibration."""
    records, names = run.stages.records, [section.name for section in run.job.recipes]
    kinds = [(f"{name}-{phase}", f"{name}.{phase}") for name in names for phase in (PTQ, QAT)]
    return {shown: records[stage].seconds for shown, stage in kinds if stage in records}


def averaged(results: list[Results]) -> tuple[list[Row], dict[str, float]]:
    """Rows with the mean over the seeds, and the standard deviation of each row's score by "name engine"."""
    if len(results) == 1:
        return results[0].rows, {}
    rows, spread = [], {}
    for group in zip(*(result.rows for result in results), strict=True):
        first = group[0]
        numbers = {k: mean(row[k] for row in group) for k, v in first.items() if isinstance(v, (int, float))}
        numbers["file_bytes"] = round(numbers["file_bytes"])
        rows.append(first | numbers)
        spread[f"{first['name']} {first['engine']}"] = stdev(row[results[0].key] for row in group)
    return rows, spread
