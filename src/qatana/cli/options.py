"""Options that several commands share, and what they turn into."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import qatana as qt
from qatana.jobs import Job, Progress, Run, load_job, runs

JobFile = Annotated[
    Path, typer.Argument(metavar="JOB.yaml", help="A job file; examples/ has some.", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Run folder; default: the job's output.", show_default=False)
]
Seeds = Annotated[
    list[int] | None, typer.Option("--seed", help="Instead of the job's seeds; may be repeated.", show_default=False)
]
Restart = Annotated[bool, typer.Option("--restart", help="Do everything again, also what is done.")]
RecipeName = Annotated[
    str | None, typer.Option("--recipe", "-r", help="Only this recipe of the job.", show_default=False)
]

console = Console()


def progress() -> Progress:
    """Bars on a terminal, plain lines elsewhere."""
    return Progress(console)


def load(path: Path, seeds: list[int] | None) -> Job:
    """A job with the seeds of the command line."""
    job = load_job(path)
    return job.model_copy(update={"seeds": tuple(seeds)}) if seeds else job


def open_runs(path: Path, out: Path | None, seeds: list[int] | None, restart: bool = False) -> list[Run]:
    """The runs of a job, one per seed."""
    job = load(path, seeds)
    return runs(job, out or job.output, progress(), restart=restart)


def chosen(run: Run, recipe: str | None) -> list:
    """The recipe sections that a command works on."""
    return [run.job.section(recipe)] if recipe else list(run.job.recipes)


def recipe_of(value: str) -> qt.Recipe:
    """A recipe from the command line: a target, or a file."""
    return qt.Recipe.load(value) if value.endswith((".yaml", ".yml", ".json")) else qt.Recipe.from_dict(value)
