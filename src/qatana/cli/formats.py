"""formats: the table of number formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import qatana as qt
from qatana.cli.options import console, progress
from qatana.files import write_json

WIDE = 150
"""Columns of a terminal from which on blocks, scales, ranges and references fit."""


def add_to(app: typer.Typer) -> None:
    """Register the command of this file."""
    app.command(
        epilog="Examples: [bold]qatana formats --quick[/] and [bold]qatana formats --json > formats.json[/] and "
        "[bold]qatana formats --out runs/formats.json[/]"
    )(formats)


def formats(
    quick: Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes; times are rough.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Also write the JSON here.", show_default=False)] = None,
) -> None:  # fmt: skip
    """Measure every number format: bits per weight with scales, error on Gaussian and real weights, time, who reads it."""
    shown = None if as_json else progress()
    found = qt.format_table(quick=quick, progress=None if shown is None else lambda name: shown.say(name))
    if out is not None:
        write_json(out, found)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console.print(_table(found))
    console.print(
        "bits: per weight, scales of blocks included. Errors in dB. ns: fake quantization and its gradient, per element; "
        "copies: against a copy of the tensor in the same run. HQQ and K-quants by held parameters; search: what finding them "
        "takes, once, in copies. --json, and a wide terminal, show all columns",
        style="dim",
    )


def _table(found: dict[str, Any]) -> Table:
    shown = Table(box=None, header_style="bold", pad_edge=False)
    tensors = list(found["tensors"])
    wide = console.width >= WIDE
    numbers = (*tensors, "ns", "copies", "search")
    for head in ("format", "bits", *(("block", "scale", "range") if wide else ()), *numbers):
        shown.add_column(head, justify="right" if head in ("bits", *numbers) else "left", no_wrap=True)
    for head in ("read by", "reference")[: 1 + wide]:
        shown.add_column(head, overflow="fold")
    for row in found["formats"]:
        errors = [f"{row['sqnr'][name]:.1f}" if row["sqnr"][name] is not None else "exact" for name in tensors]
        what = [row["block"], row["scale"], row["range"]] if wide else []
        search = row["search_copies"]
        times = [f"{row['ns_per_element']:.2f}", f"{row['copies']:.1f}", "" if search is None else f"{search:.0f}"]
        readers = [row["engines"], row["reference"]][: 1 + wide]
        shown.add_row(row["name"], f"{row['bits']:.4g}", *what, *errors, *times, *readers)
    return shown
