"""bench: what training steps cost, and how fast files are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import qatana as qt
from qatana.cli.options import RecipeName, chosen, console, open_runs, progress
from qatana.files import write_json
from qatana.jobs import Progress
from qatana.jobs.deployed import deployed
from qatana.jobs.steps import steps

Rounds = Annotated[int, typer.Option(min=1, help="Counted rounds; every contestant runs once in each.")]
Result = dict[str, Any]


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command(
        epilog="Examples: [bold]qatana bench examples/ner.yaml -r int8[/] and "
        "[bold]qatana bench --engine runs/ner/int8.onnx runs/ner/int4.onnx[/]   on a quiet machine, please"
    )(bench)


def bench(
    source: Annotated[list[Path], typer.Argument(metavar="JOB.yaml|FILE.onnx...", help="A job file; with --engine, files.")],
    engine: Annotated[bool, typer.Option("--engine", help="Latency of files beside their float original, in each engine.")] = False,
    original: Annotated[
        Path | None,
        typer.Option("--float", help="With --engine: the float file; default: float.onnx beside each.", show_default=False),
    ] = None,
    recipe: RecipeName = None,
    rounds: Rounds = 10,
    batch: Annotated[int, typer.Option(min=1, help="With --engine: rows of a batch.")] = 8,
    sequence: Annotated[int, typer.Option(min=1, help="With --engine: tokens of a row.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON here.", show_default=False)] = None,
) -> None:  # fmt: skip
    """Measure what a training step of a job costs (float32, bfloat16 autocast, each recipe) or how fast files are; rounds interleave."""
    shown = Progress() if as_json else progress()
    found = (
        deployed(source, original, batch, sequence, rounds, shown) if engine else _steps(source, recipe, rounds, shown)
    )
    if out is not None:
        write_json(out, found)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console.print(_deployed_table(found) if engine else _steps_table(found))
    for row in found["rows"]:
        if "reason" in row:
            console.print(f"{row['file']} in {row['engine']}: {row['reason']}", markup=False, highlight=False)
    where = ", ".join(f"{key} {value}" for key, value in {**found["machine"], **found["versions"]}.items())
    console.print(where, style="dim", highlight=False)


def _steps(source: list[Path], recipe: str | None, rounds: int, shown: Progress) -> Result:
    if len(source) != 1 or source[0].suffix == ".onnx":
        raise qt.RecipeError("give one job file; for files of engines: qatana bench --engine FILE.onnx...")
    run = open_runs(source[0], None, None)[0]
    return steps(run, chosen(run, recipe), rounds, shown)


def _steps_table(found: Result) -> Table:
    heads = ("step", "ms", "of float32", "spread", "forward", "backward", "optimizer", "saved", "of float32", "peak")
    table = _table(heads)
    for row in found["rows"]:
        ms, ratio, peak = row["milliseconds"], row["ratio"], row["peak_bytes"]
        table.add_row(
            row["name"], f"{ms['step']:.1f}", f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}",
            *(f"{ms[part]:.1f}" for part in ("forward", "backward", "optimizer")),
            f"{row['saved_bytes'] / 2**20:.1f} MiB", f"{row['saved_ratio']:.2f}",
            "–" if peak is None else f"{peak / 2**20:.1f} MiB",
        )  # fmt: skip
    return table


def _deployed_table(found: Result) -> Table:
    table = _table(("file", "engine", "ms", "spread", "of its float", "integer products", "bytes"))
    for row in found["rows"]:
        ms = row.get("milliseconds")
        measured = ("–", "", "", "")
        if ms is not None:
            speedup = "–" if row["speedup"] is None else f"{row['speedup']:.2f}×"
            counts = f"{row['integer']} of {row['asked']}" if row["asked"] else "–"
            measured = (f"{ms['median']:.2f}", f"{ms['min']:.2f} to {ms['max']:.2f}", speedup, counts)
        table.add_row(row["file"], row["engine"], *measured, f"{row['bytes']:,}")
    return table


def _table(heads: tuple[str, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head in ("step", "file", "engine") else "right", overflow="fold")
    return table
