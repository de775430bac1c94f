"""run, ptq, demo, report: whole jobs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from qatana.cli.options import JobFile, Out, RecipeName, Restart, Seeds, load, progress
from qatana.jobs import Job, demo_job, run_job


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(epilog="Example: [bold]qatana run examples/ner.yaml --out runs/ner --seed 0[/]")(run)
    app.command(
        epilog="Example: [bold]qatana ptq examples/ner.yaml -r int8[/]   files runs/ner/int8-ptq.onnx, runs/ner/ptq/report.html"
    )(ptq)
    app.command(epilog="Example: [bold]qatana demo[/]   writes runs/demo/")(demo)
    app.command(epilog="Example: [bold]qatana report examples/ner.yaml[/]   after `qatana run`, or instead of it")(
        report
    )


def run(job: JobFile, out: Out = None, seed: Seeds = None, restart: Restart = False) -> None:
    """Do a whole job: float model, PTQ, QAT, files, proof, report. Goes on where it was interrupted."""
    _whole(load(job, seed), out, restart)


def ptq(job: JobFile, recipe: RecipeName = None, out: Out = None, seed: Seeds = None, restart: Restart = False) -> None:
    """Quantize without training, every recipe of a job (static, dynamic or in blocks, as its target says): calibrate, files, proof, table.

    A later `qatana run` starts from these calibrated models."""
    found = load(job, seed)
    if recipe:
        found = found.model_copy(update={"recipes": (found.section(recipe),)})
    _whole(found, out, restart, ptq=True)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder.")] = Path("runs/demo"), restart: Restart = False
) -> None:
    """From a float BERT to proven int8, int4 and int2 files that tag names, in minutes on two cores."""
    _whole(demo_job(), out, restart)


def report(job: JobFile, out: Out = None, seed: Seeds = None) -> None:
    """Write summary.json, certificate.json and report.html of a run; stages that are not done yet are run first."""
    _whole(load(job, seed), out, restart=False)


def _whole(job: Job, out: Path | None, restart: bool, ptq: bool = False) -> None:
    shown, begin = progress(), time.perf_counter()
    outcome = run_job(job, out, progress=shown, restart=restart, ptq=ptq)
    shown.show("")
    shown.show(outcome.table)
    shown.show("")
    onnx = sorted(outcome.folder.glob("*.onnx"))
    for path in (*onnx, *outcome.files):
        shown.show(f"  {path}")
    minutes, seconds = divmod(round(time.perf_counter() - begin), 60)
    shown.say(f"done in {minutes} min {seconds} s")
    for failure in outcome.failures:
        typer.echo(f"error: {' '.join(failure.split())}", err=True)
    if outcome.failures:
        raise typer.Exit(1)
