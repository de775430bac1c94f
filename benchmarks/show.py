"""Results on the terminal: tables, then bars, then what was measured where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
SPREAD = ("median", "min", "max")


def speed(result: Result, console: Console) -> None:
    """Milliseconds of files in engines."""
    for part in result["inference"]:
        table = Table("contestant", "file", "median ms", "min", "max", title=part["title"], title_justify="left")
        for who, ms in part["milliseconds"].items():
            table.add_row(who, part["files"].get(who, ""), *(f"{ms[key]:.1f}" for key in SPREAD))
        console.print(table)
        for bar in part["bars"]:
            ratio = (
                "not measured" if bar["ratio"] is None else f"{bar['ratio']:.2f} ({bar['min']:.2f} to {bar['max']:.2f})"
            )
            console.print(
                f"{_verdict(bar)}  {bar['fast']} over {bar['slow']}: {ratio}, bar {bar['bar']}", highlight=False
            )
        for note in part["notes"]:
            console.print(f"no file for {note}", highlight=False)
    _where(result, console)


def step(result: Result, console: Console) -> None:
    """Milliseconds and memory of training steps; ratios are to float32."""
    for part in result["models"]:
        head = ("contestant", "step ms", "ratio", "spread", "no optimizer", "forward", "saved MiB", "ratio", "peak MiB")
        table = Table(*head, title=part["title"], title_justify="left")
        for row in part["contestants"]:
            table.add_row(row["title"], *(_step_cells(row) if "milliseconds" in row else ()))
        console.print(table)
        for row in part["contestants"]:
            if "reason" in row:
                console.print(f"{row['title']}: {row['reason']}", highlight=False, markup=False)
        for bar in part["bars"]:
            ratio = "not measured" if bar["ratio"] is None else f"{bar['ratio']:.2f}"
            text = f"{_verdict(bar)}  {bar['who']} over {bar['against']}, {bar['quantity']}: {ratio}, bar {bar['bar']}"
            console.print(text, highlight=False)
    _where(result, console)


def _step_cells(row: Result) -> list[str]:
    ms, memory, ratio = row["milliseconds"], row["memory"], row.get("ratio")
    saved, peak = (f"{memory[key] / 2**20:.1f}" if memory[key] is not None else "–" for key in ("saved", "peak"))
    if ratio is None:
        return [f"{ms['step']['median']:.1f}", "", "", "", "", saved, "", peak]
    return [
        f"{ms['step']['median']:.1f}", f"{ratio['step']['median']:.2f}",
        f"{ratio['step']['min']:.2f} to {ratio['step']['max']:.2f}", f"{ratio['without optimizer']['median']:.2f}",
        f"{ratio['forward']['median']:.2f}", saved, f"{row['memory_ratio']['saved']:.2f}", peak,
    ]  # fmt: skip


def quantizers(result: Result, console: Console) -> None:
    """Milliseconds, and times a copy."""
    size = result["size"]
    table = Table("case", "median ms", "copies", "min", "max", "bar", title=f"{size} x {size} float32", title_justify="left")  # fmt: skip
    for row in result["cases"]:
        bar = f"{row['bar']} {_verdict(row)}" if "bar" in row else ""
        table.add_row(
            row["name"],
            f"{row['milliseconds']['median']:.2f}",
            *(f"{row[key]:.2f}" for key in ("ratio", "min", "max")),
            bar,
        )
    console.print(table)
    console.print(f"x.clone(): {result['copy']['median']:.2f} ms", highlight=False)
    _where(result, console)


def _verdict(bar: Result) -> str:
    return {True: "pass", False: "FAIL", None: "open"}[bar["pass"]]


def _where(result: Result, console: Console) -> None:
    for key in ("machine", "versions"):
        console.print(f"{key}: " + ", ".join(f"{k} {v}" for k, v in result[key].items()), highlight=False)
    console.print(f"command: {result['command']}", highlight=False)


SHOW: dict[str, Callable[[Result, Console], None]] = {"speed": speed, "step": step, "quantizers": quantizers}
