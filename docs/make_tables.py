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

import step_tables

Result = dict[str, Any]
ENGINES = {"torch": "PyTorch", "integers": "PyTorch, integers", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
METRICS = {"f1": "entity F1", "accuracy": "accuracy", "perplexity": "perplexity"}


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
    pictures: dict[Path, str] = {}
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
        if section.name == "step" and kept.is_file():
            pictures |= {
                kept.with_name(f"step-{model['model']}.svg"): step_tables.picture(model)
                for model in read(kept, section)["models"]
            }
    for document, text in {**texts, **pictures}.items():
        if document.is_file() and text == document.read_text(encoding="utf-8"):
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
    key = next(key for key in METRICS if key in found["rows"][0])
    spread: dict[str, float] = found.get("spread", {})
    head = [
        "model",
        "engine",
        METRICS[key],
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
    parts += _beyond_nearest(key, by_name)
    parts.append("; ".join(_seconds(found[key], title) for key, title in SECONDS.items() if key in found) + ".")
    parts += [found["note"]] if "note" in found else []
    return "\n\n".join([*parts, *machine(found)])


SECONDS = {"seconds": "Seconds", "made": "of these"}


def _seconds(found: dict[str, float], title: str) -> str:
    return f"{title}: " + ", ".join(f"{stage} {value:.0f}" for stage, value in found.items())


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
    better = -1 if key == "perplexity" else 1
    lost, won = better * (reference[key] - calibrated[key]), better * (row[key] - calibrated[key])
    return f"{100 * won / lost:.0f} %" if lost >= 0.1 else "–"


def _beyond_nearest(key: str, by_name: dict[tuple[str, str], Result]) -> list[str]:
    """Where a job has a recipe NAME-nearest, plain rounding without training: how much of what that loses NAME wins back."""
    told = []
    for name, engine in by_name:
        plain = name.removesuffix("-qat") + "-nearest-ptq"
        if engine == "torch" and name.endswith("-qat") and (plain, "torch") in by_name:
            start, end, best = (by_name[n, "torch"][key] for n in (plain, name, "float"))
            told.append(f"{name} wins back {100 * (start - end) / (start - best):.1f} % of what {plain} loses")
    return ["Plain rounding to nearest: " + "; ".join(told) + "."] if told else []


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
    """Latencies and bars of a speed.json."""
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
    return "\n\n".join([*parts, f"`{found['command']}` on " + machine(found)[0]])


# --- training steps -----------------------------------------------------------------------------------------------
def step(found: Result) -> str:
    """Tables of a step.json, where its pictures are, and where it was measured."""
    pictures = "\n".join(f"![{model['title']}](measured/step-{model['model']}.svg)" for model in found["models"])
    return f"{step_tables.steps(found)}\n\n{pictures}\n\n`{found['command']}` on {machine(found)[0]}"


def quantizers(found: Result) -> str:
    """The table of a quantizers.json."""
    return f"{step_tables.quantizers(found)}\n\n`{found['command']}` on {machine(found)[0]}"


def lora(found: Result) -> str:
    """The table of a lora.json."""
    return f"{step_tables.lora(found)}\n\n`{found['command']}` on {machine(found)[0]}"


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


# --- architectures ------------------------------------------------------------------------------------------------
def architectures(found: Result) -> str:
    """Rows of an architectures.json: what passed, how much of it is quantized, what stays float and why."""
    rows = found["architectures"]
    head = ["model type", "family", "class", "matrix weights", "quantized", "file of float", "converted to", "result"]
    lines = [head, ["---", "---", "---", "--:", "--:", "--:", "---", "---"]]
    for row in rows:
        saved = "modules" if row["no_graph"] else "graph"
        size = _number(row["bytes_ratio"] if row["bytes_ratio"] == row["bytes_ratio"] else None, "{:.3f}")
        verdict = "pass" if row["passed"] else row["error"].replace("|", "\\|") or _shortfall(row)
        lines.append([
            f"`{row['model_type']}`", row["family"], row["model"], f"{row['matrix_weights']:,}", f"{100 * row['quantized']:.2f} %", size,
            saved, verdict,
        ])  # fmt: skip
    passed = sum(row["passed"] for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    left = [
        f"| `{row['model_type']}` | {name} | {elements:,} | {reason} |"
        for row in rows
        for name, elements, reason in row["left"]
    ]
    parts = [f"{passed} of {len(rows)} architectures pass ({versions}).", _table(lines)]
    if left:
        parts += [
            "What stays float:",
            "\n".join(["| model type | weight | elements | why |", "|---|---|--:|---|", *left]),
        ]
    unseen = [f"* `{row['model_type']}`: {row['no_graph']}" for row in rows if row["no_graph"]]
    if unseen:
        parts += ["No graph, by torch.export's own words:", "\n".join(unseen)]
    return "\n\n".join(parts)


def _shortfall(row: Result) -> str:
    """Which bar a row misses."""
    if row["without_gradient"]:
        return f"no gradient: {row['without_gradient'][0]}"
    if row["differing"]:
        return f"{100 * row['differing']:.2g} % of the outputs differ"
    return "less than 99 % quantized" if row["quantized"] < 0.99 else f"float model differs by {row['float_error']:.2g}"


SECTIONS = (
    Section("demo", "runs/demo/summary.json", "make demo", "README.md", ("rows", "parity", "seconds"), job),
    Section("ner", "runs/ner/summary.json", "qatana run examples/ner.yaml", "README.md", ("rows", "parity", "seconds"), job),
    Section("speed", "benchmarks/results/speed.json", "make bench", "README.md",
            ("inference", "machine", "versions", "command"), speed),
    Section("step", "benchmarks/results/step.json", "python -m benchmarks --only step", "docs/performance.md",
            ("models", "machine", "versions", "command"), step),
    Section("quantizers", "benchmarks/results/quantizers.json", "python -m benchmarks --only quantizers", "docs/performance.md",
            ("cases", "copy", "size", "machine", "versions", "command"), quantizers),
    Section("lora", "benchmarks/results/lora.json", "python -m benchmarks.lora", "docs/huggingface.md",
            ("rows", "title", "rank", "rounds", "machine", "versions", "command"), lora),
    Section("fashion-mnist", "runs/fashion-mnist/summary.json", "qatana run examples/fashion-mnist.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("trained-formats", "runs/formats/summary.json", "qatana run examples/formats.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("cifar10", "runs/cifar10/summary.json", "qatana run examples/cifar10.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("smollm2", "runs/smollm2/summary.json", "qatana run examples/smollm2.yaml", "docs/jobs.md",
            ("rows", "parity", "seconds"), job),
    Section("formats", "runs/formats.json", "qatana formats --out runs/formats.json", "docs/formats.md",
            ("formats", "tensors", "elements", "machine", "versions"), formats),
    Section("architectures", "runs/architectures.json", "python -m benchmarks.architectures", "docs/architectures.md",
            ("architectures", "versions"), architectures),
)  # fmt: skip

if __name__ == "__main__":
    main()
