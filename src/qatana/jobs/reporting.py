"""Results as files: summary.json, certificate.json, report.html, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

import qatana as qt
from qatana.files import write_json
from qatana.hardware import isa, processor
from qatana.jobs.bench import threads
from qatana.jobs.job import Job
from qatana.jobs.results import Results, Row, averaged, total

_AVERAGES = ("micro", "macro")


def write(job: Job, results: Sequence[Results], folder: Path, layers: dict[str, Any] | None = None) -> list[Path]:
    """Write summary.json, certificate.json and report.html (of the first seed, with means and spreads over all).

    layers  {"layers": [...], "histograms": [...]} as `qatana.measure` gives them"""
    first = results[0]
    rows, spread = averaged(list(results))
    summary = first.summary() | {"rows": rows}
    if spread:
        summary |= {key: total(getattr(r, key) for r in results) for key in ("parity", "drift", "seconds", "made")}
        summary["labels"] = {name: total(r.labels[name] for r in results) for name in first.labels}
        summary |= {"seeds": list(job.seeds), "spread": spread}
    summary["machine"] = {"processor": processor(), "isa": isa(), "threads": threads()}
    summary["versions"] = first.versions
    paths = [folder / name for name in ("summary.json", "certificate.json", "report.html")]
    write_json(paths[0], summary)
    write_json(paths[1], certificate(results))
    qt.render(report_data(job, first, rows, spread, layers or {}), paths[2])
    return paths


def certificate(results: Sequence[Results]) -> dict[str, Any]:
    """All certificates of a job in one: its verdict is "pass" if that of each is."""
    found = [entry["certificate"] for result in results for entry in result.certificates]
    verdicts = {entry["verdict"] for entry in found}
    return {"verdict": "pass" if verdicts == {"pass"} else "fail", "certificates": found}


def report_data(
    job: Job, results: Results, rows: Sequence[Row], spread: dict[str, float], layers: dict[str, Any]
) -> qt.ReportData:
    """What the report shows."""
    return qt.ReportData.model_validate(
        {
            "title": f"{job.name}: {', '.join(section.name for section in job.recipes)}",
            "created": datetime.now(timezone.utc).isoformat(),
            "job": job.name,
            "command": f"qatana run {job.name}.yaml",
            "machine": {"cpu": processor(), "isa": isa(), "threads": threads()},
            "versions": results.versions,
            "results": [_result(row, results, spread) for row in rows],
            "token_tables": _token_tables(results),
            "curves": [{"run": name, **curve} for name, curve in results.curves.items()],
            "plan": [_plan_row(row, name) for name, plan in results.plans.items() for row in plan["rows"]],
            "certificates": [entry["certificate"] for entry in results.certificates],
            **layers,
        }
    )


def _result(row: Row, results: Results, spread: dict[str, float]) -> dict[str, Any]:
    deviation = spread.get(f"{row['name']} {row['engine']}")
    metric = {"name": results.metric, "value": row[results.key], "spread": deviation, **results.shown}
    return {key: value for key, value in row.items() if key != results.key} | {"metric": metric}


def _token_tables(results: Results) -> list[dict[str, Any]]:
    """Tables of the float model and of each deployed file (its first engine), where the task has them."""
    found = []
    for key, score in results.scores.items():
        name, _, engine = key.partition(" ")
        deployed = engine == "onnxruntime" and not name.startswith("float")
        if "tokens" in score and (deployed or key == "float torch"):
            classes = [{"label": label, **row} for label, row in score["tokens"]["classes"].items()]
            averages = [{"label": f"{kind} average", **score["tokens"][kind]} for kind in _AVERAGES]
            found.append({"name": f"{name}, {engine}", "rows": classes + averages})
    return found


def _plan_row(row: dict[str, Any], variant: str) -> dict[str, Any]:
    floating = row["scheme"] == "float32"
    return {
        "tensor": row["name"],
        "module_type": row["type"],
        "role": row["role"],
        "scheme": None if floating else row["scheme"],
        "rule": row["rule"],
        "reason": row["reason"],
        "bytes": row["bytes"] or None,
        "variant": variant,
    }


def table(results: Results, rows: Sequence[Row], spread: dict[str, float]) -> Table:
    """The rows for the terminal."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    shown.add_column("model")
    shown.add_column("engine")
    for head in (results.metric, "MB", "ms", "vs float", "vs torch float"):
        shown.add_column(head, justify="right")
    for row in rows:
        deviation = spread.get(f"{row['name']} {row['engine']}")
        value = f"{row[results.key]:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
        speeds = (row["speedup_vs_float_same_engine"], row["speedup_vs_torch_float"])
        shown.add_row(
            row["name"], row["engine"], value, f"{row['file_bytes'] / 1e6:.1f}", f"{row['latency_ms']:.1f}",
            *(f"{speed:.2f}" for speed in speeds),
            style="bold" if row["name"].endswith("-qat") and row["engine"] != "torch" else None,
        )  # fmt: skip
    return shown
