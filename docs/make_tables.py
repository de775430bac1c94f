"""Write the tables of measured figures into the documents, from the files that the commands left.

    python docs/make_tables.py [--check] [--root .]

A fresh result (runs/demo/summary.json ...) is copied to docs/measured/ first, and the tables are made from there, so that every figure
stands in a file of the repository and a command regenerates it. A table stands between the markers <!-- NAME:begin --> and
<!-- NAME:end -->. With --check nothing is written; the exit code is 1 if a table is not that of its file. A damaged file is an error:
no figure is ever typed by hand."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]
ENGINES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


class Section(NamedTuple):
    """One table: its name, the file that a command leaves, that command, the document, keys of the file, and who renders it."""

    name: str
    result: str
    command: str
    document: str
    keys: tuple[str, ...]
    render: Callable[[Result], str]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write the tables of measured figures into the documents.")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parents[1], help="the checkout")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a table is not up to date")
    options = parser.parse_args()
    texts: dict[Path, str] = {}
    for section in SECTIONS:
        document = options.root / section.document
        if not document.is_file():
            continue
        kept = options.root / "docs" / "measured" / f"{section.name}.json"
        fresh = options.root / section.result
        if fresh.is_file() and not options.check:
            write(kept, json.dumps(read(fresh, section), indent=1) + "\n")
        content = (
            section.render(read(kept, section))
            if kept.is_file()
            else f"No figures yet: `{section.command}` measures them."
        )
        texts[document] = replaced(texts.get(document) or document.read_text(encoding="utf-8"), content, section)
    for document, text in texts.items():
        if text == document.read_text(encoding="utf-8"):
            continue
        if options.check:
            raise SystemExit(f"{document.name} does not show docs/measured; run: make docs-tables")
        write(document, text)


def read(path: Path, section: Section) -> Result:
    """A result file, checked for the keys that its table needs."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}); run `{section.command}` again") from error
    missing = [key for key in section.keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise SystemExit(f"{path} has no '{missing[0]}'; run `{section.command}` again")
    return found


def write(path: Path, text: str) -> None:
    """Under a temporary name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def replaced(text: str, content: str, section: Section) -> str:
    """The document with `content` between the section's markers."""
    begin, end = f"<!-- {section.name}:begin -->", f"<!-- {section.name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"{section.document} needs one {begin} and, after it, one {end}")
    return f"{text.split(begin)[0]}{begin}\n{content}\n{end}{text.split(end)[1]}"


# --- jobs ---------------------------------------------------------------------------------------------------------
def job(found: Result) -> str:
    """Rows, parity and times of a summary.json."""
    key, name = ("f1", "entity F1") if "f1" in found["rows"][0] else ("accuracy", "accuracy")
    spread: dict[str, float] = found.get("spread", {})
    head = [
        "model",
        "engine",
        name,
        "won back",
        "file",
        "of float",
        "latency",
        "vs the engine's float",
        "vs PyTorch float",
    ]
    by_name = {(row["name"], row["engine"]): row for row in found["rows"]}
    lines = [head, ["---", "---", *["--:"] * (len(head) - 2)]]
    lines += [_cells(row, key, by_name, spread) for row in found["rows"]]
    parts = [_table(lines), parity(found)]
    if spread:
        parts.append(f"Means over the seeds {', '.join(map(str, found['seeds']))}, ± one standard deviation.")
    parts.append("Seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in found["seconds"].items()) + ".")
    parts += [found["note"]] if "note" in found else []
    return "\n\n".join([*parts, *machine(found)])


def machine(found: Result) -> list[str]:
    """Where a result was measured, and with what."""
    if "machine" not in found:
        return []
    place, versions = found["machine"], found["versions"]
    return [
        f"{place.get('processor', '?')} ({place.get('isa', '?')}), {place.get('threads', '?')} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    ]  # fmt: skip


def _table(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(row: Result, key: str, by_name: dict[tuple[str, str], Result], spread: dict[str, float]) -> list[str]:
    base = by_name.get(("float", "torch"), {}).get("file_bytes")
    size, deviation = row.get("file_bytes"), spread.get(f"{row['name']} {row['engine']}")
    score = f"{row[key]:.2f}" + (f" ± {deviation:.2f}" if deviation is not None else "")
    return [
        row["name"], ENGINES.get(row["engine"], row["engine"]), score, _won_back(row, key, by_name),
        _number(size and size / 1e6, "{:.1f} MB"), _number(size and base and size / base, "{:.3f}"),
        _number(row.get("latency_ms"), "{:.1f} ms"),
        _number(row.get("speedup_vs_float_same_engine"), "{:.2f}×"), _number(row.get("speedup_vs_torch_float"), "{:.2f}×"),
    ]  # fmt: skip


def _won_back(row: Result, key: str, by_name: dict[tuple[str, str], Result]) -> str:
    """Share of what PTQ lost that QAT won back: (qat - ptq) / (float - ptq), where PTQ lost at least a tenth of a point."""
    name = row["name"].removesuffix("-qat")
    calibrated, reference = by_name.get((f"{name}-ptq", "torch")), by_name.get(("float", "torch"))
    if not row["name"].endswith("-qat") or calibrated is None or reference is None:
        return "–"
    lost = reference[key] - calibrated[key]
    return f"{100 * (row[key] - calibrated[key]) / lost:.0f} %" if lost >= 0.1 else "–"


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value else "–"


def parity(found: Result) -> str:
    """What verify compared, in a sentence or two."""
    counts = found["parity"]
    text = (
        f"`verify` compared {counts['codes_compared']:,} outputs of integer operators, of which {counts['codes_different']:,} differ, "
        f"and {counts['labels_compared']:,} labels, of which {counts['labels_different']:,} differ."
    )
    drift = found.get("drift", {})
    if drift.get("codes_compared"):
        share = 100 * drift["codes_different"] / drift["codes_compared"]
        text += f" End to end, {share:.2g} % of the codes differ." if share else " End to end, no code differs."
    return text


# --- speed --------------------------------------------------------------------------------------------------------
def speed(found: Result) -> str:
    """Latencies, bars and the price of a step of a speed.json."""
    parts = []
    for part in found["inference"]:
        lines = [["contestant", "median", "min", "max"], ["---", "--:", "--:", "--:"]]
        for who, ms in part["milliseconds"].items():
            lines.append([who, *(f"{ms[column]:.1f} ms" for column in ("median", "min", "max"))])
        parts += [f"**{part['title']}**", _table(lines)]
        ratios = [
            f"{bar['fast']} is {bar['ratio']:.2f} times as fast as {bar['slow']}"
            for bar in part["bars"]
            if bar["ratio"]
        ]
        parts += ["; ".join(ratios) + "."] if ratios else []
    steps = [
        f"{part['title']}: {part['time_ratio']:.2f} times the time and {part['memory_ratio']:.2f} times the saved activations"
        for part in found["step"]
    ]
    parts += ["A QAT step against a float step. " + "; ".join(steps) + "."] if steps else []
    return "\n\n".join([*parts, f"`{found['command']}` on " + machine(found)[0]])


# --- formats ------------------------------------------------------------------------------------------------------
def formats(found: Result) -> str:
    """Rows of a formats.json."""
    tensors = list(found["tensors"])
    head = [
        "format",
        "bits",
        "block",
        "scale",
        "range",
        *(f"{name}, dB" for name in tensors),
        "ns",
        "copies",
        "search",
        "read by",
        "reference",
    ]
    lines = [head, ["---", "--:", "---", "---", "---", *["--:"] * (len(tensors) + 3), "---", "---"]]
    for row in found["formats"]:
        errors = [f"{row['sqnr'][name]:.1f}" if row["sqnr"][name] is not None else "exact" for name in tensors]
        lines.append([
            f"`{row['name']}`", f"{row['bits']:.4g}", row["block"], row["scale"], row["range"], *errors,
            f"{row['ns_per_element']:.2f}", f"{row['copies']:.1f}", _number(row.get("search_copies"), "{:.0f}"),
            row["engines"], row["reference"],
        ])  # fmt: skip
    return f"{_table(lines)}\n\n{found['elements']:,} elements timed on {machine(found)[0]}"


SECTIONS = (
    Section("demo", "runs/demo/summary.json", "make demo", "README.md", ("rows", "parity", "seconds"), job),
    Section("ner", "runs/ner/summary.json", "qatana run examples/ner.yaml", "README.md", ("rows", "parity", "seconds"), job),
    Section("speed", "benchmarks/results/speed.json", "make bench", "README.md",
            ("inference", "step", "machine", "versions", "command"), speed),
    Section("fashion-mnist", "runs/fashion-mnist/summary.json", "qatana run examples/fashion-mnist.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("trained-formats", "runs/formats/summary.json", "qatana run examples/formats.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("cifar10", "runs/cifar10/summary.json", "qatana run examples/cifar10.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("formats", "runs/formats.json", "qatana formats --out runs/formats.json", "docs/formats.md",
            ("formats", "tensors", "elements", "machine", "versions"), formats),
)  # fmt: skip

if __name__ == "__main__":
    main()
