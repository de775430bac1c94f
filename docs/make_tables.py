"""Write the table of what the demo measured into README.md, from runs/demo/summary.json.

    python docs/make_tables.py [--check] [--summary runs/demo/summary.json] [--readme README.md]

The table stands between the markers <!-- demo:begin --> and <!-- demo:end -->. With --check nothing is written; the exit code is 1 if
the table is not that of the summary. A missing or damaged file is an error: no figure is ever typed by hand."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"
HEAD = ("model", "engine", "entity F1", "file", "of float", "latency", "vs the engine's float", "vs PyTorch float")
ENGINES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the demo's table into README.md.")
    parser.add_argument("--summary", type=Path, default=ROOT / "runs" / "demo" / "summary.json")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the table is not up to date")
    options = parser.parse_args()
    text = options.readme.read_text(encoding="utf-8")
    wanted = replaced(text, section(read(options.summary)))
    if wanted == text:
        return
    if options.check:
        raise SystemExit(f"{options.readme.name} does not show {options.summary}; run: make docs-tables")
    temporary = options.readme.with_name(f".{options.readme.name}.new")
    temporary.write_text(wanted, encoding="utf-8")
    os.replace(temporary, options.readme)


def read(path: Path) -> dict[str, Any]:
    """The summary that the demo wrote."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; run `make demo` first, it writes this file")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}); run `make demo` again") from error
    missing = [key for key in ("rows", "parity", "seconds") if key not in summary]
    if missing:
        raise SystemExit(f"{path} has no '{missing[0]}'; run `make demo` again")
    return summary


def section(summary: dict[str, Any]) -> str:
    """Table, parity line and times, as Markdown."""
    return "\n\n".join((table(summary["rows"]), parity(summary["parity"]), seconds(summary["seconds"])))


def table(rows: list[dict[str, Any]]) -> str:
    """One line per model and engine, in the summary's order."""
    base = next((row["file_bytes"] for row in rows if row["name"] == "float" and row.get("file_bytes")), None)
    lines = [HEAD, ("---", "---", *["--:"] * (len(HEAD) - 2))]
    lines += [_cells(row, base) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: dict[str, Any], float_bytes: int | None) -> tuple[str, ...]:
    size = row.get("file_bytes")
    return (
        row["name"],
        ENGINES.get(row["engine"], row["engine"]),
        _number(row.get("f1"), "{:.2f}"),
        _number(size and size / 1e6, "{:.1f} MB"),
        _number(size and float_bytes and size / float_bytes, "{:.3f}"),
        _number(row.get("latency_ms"), "{:.1f} ms"),
        _number(row.get("speedup_vs_float_same_engine"), "{:.2f}×"),
        _number(row.get("speedup_vs_torch_float"), "{:.2f}×"),
    )


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value else "–"


def parity(found: dict[str, int]) -> str:
    """What verify compared, in one sentence."""
    return (
        f"`verify` compared {found['codes_compared']:,} outputs of integer operators, of which {found['codes_different']:,} differ, and "
        f"{found['labels_compared']:,} labels, of which {found['labels_different']:,} differ."
    )


def seconds(spent: dict[str, float]) -> str:
    """Where the time went."""
    return "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in spent.items()) + "."


def replaced(readme: str, content: str) -> str:
    """The README with `content` between the markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise SystemExit(f"the README needs one {BEGIN} and, after it, one {END}")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
