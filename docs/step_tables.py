"""Tables of docs/performance.md and docs/huggingface.md: what training steps and quantizers cost. docs/make_tables.py writes them."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]
NAMES = {"step": "step", "saved": "bytes saved", "peak": "peak memory"}
HEADS = ("", "step", "× float32", "spread", "without optimizer", "forward", "saved", "× float32", "peak", "× float32")
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#9498a0")
GROUPS = {
    "products": ("mm", "linear", "conv", "gemm", "attention", "matmul"),
    "copies and conversions": ("copy", "_to_copy", "clone", "cat", "contiguous", "transpose", "fill", "zero"),
    "optimizer": ("adam", "sgd"),
    "quantizers in one operator": ("quantize", "qatana", "round", "clamp"),
}
"""Where the time goes: group -> parts of operators' names, the first group that fits; everything else is "other"."""


def steps(found: Result) -> str:
    """Per model: a row for each contestant, its bars, and what could not be measured."""
    parts = []
    for model in found["models"]:
        parts += [f"### {model['title']}", _rows(model["contestants"])]
        notes = [
            f"* {row['title']}: {row['remark']}."
            for row in model["contestants"]
            if row.get("peer") and row.get("remark")
        ]
        parts += ["\n".join(notes)] if notes else []
        parts += [bars(model["bars"], model["contestants"])] if model["bars"] else []
    return "\n\n".join([*parts, *_versions(found)])


def _rows(rows: list[Result]) -> str:
    lines = [list(HEADS), ["---", *["--:"] * (len(HEADS) - 1)]]
    for row in rows:
        if "reason" in row:
            lines.append([row["title"], f"not measured: {_plain(row['reason'])}", *[""] * (len(HEADS) - 2)])
            continue
        ms, memory, ratio = row["milliseconds"], row["memory"], row.get("ratio")
        relative = row.get("memory_ratio", {})
        times = ["–"] * 4
        if ratio is not None:
            spread = f"{ratio['step']['min']:.2f}–{ratio['step']['max']:.2f}"
            times = [
                f"{ratio['step']['median']:.2f}",
                spread,
                *(f"{ratio[k]['median']:.2f}" for k in ("without optimizer", "forward")),
            ]
        lines.append([
            row["title"], f"{ms['step']['median']:.0f} ms", *times, _mib(memory["saved"]), _ratio(relative.get("saved")),
            _mib(memory["peak"]), _ratio(relative.get("peak")),
        ])  # fmt: skip
    return table(lines)


def bars(judged: list[Result], rows: list[Result]) -> str:
    """What the price has to be, and whether it is: a bar that is missed stands in bold type."""
    titles = {row["name"]: row["title"] for row in rows}
    lines = [["", "measured", "spread", "at most", ""], ["---", "--:", "--:", "--:", "---"]]
    for bar in judged:
        what = f"{titles[bar['who']]} over {titles[bar['against']]}, {NAMES[bar['quantity']]}"
        if bar["ratio"] is None:
            lines.append([what, "–", "", f"{bar['bar']:.2f}", "not measured"])
            continue
        verdict = "reached" if bar["pass"] else "**missed**"
        lines.append([what, f"{bar['ratio']:.2f}", f"{bar['min']:.2f}–{bar['max']:.2f}", f"{bar['bar']:.2f}", verdict])
    return table(lines)


def _versions(found: Result) -> list[str]:
    """Versions of the peers, each once."""
    seen = {
        f"{name} {version}"
        for model in found["models"] for row in model["contestants"] if row["peer"]
        for name, version in row.get("versions", {}).items() if name not in ("python", "torch", "transformers")
    }  # fmt: skip
    return ["Peers: " + ", ".join(sorted(seen)) + "."] if seen else []


def quantizers(found: Result) -> str:
    """Times of a copy that each quantizer takes."""
    lines = [["", "median", "× copy", "spread", "at most", ""], ["---", "--:", "--:", "--:", "--:", "---"]]
    for row in found["cases"]:
        judged = [f"{row['bar']:.2f}", "reached" if row["pass"] else "**missed**"] if "bar" in row else ["", ""]
        spread = f"{row['min']:.2f}–{row['max']:.2f}"
        lines.append([row["name"], f"{row['milliseconds']['median']:.1f} ms", f"{row['ratio']:.2f}", spread, *judged])
    return f"{table(lines)}\n\nThe copy: {found['copy']['median']:.1f} ms, {found['size']} × {found['size']} float32."


def lora(found: Result) -> str:
    """What a training trains, holds and takes, full QAT and LoRA beside float32."""
    times = ("forward", "backward", "optimizer")
    heads = ["", "trained", "step", "× full QAT", "spread", *times, "saved", "peak", "optimizer's state"]
    lines = [heads, ["---", *["--:"] * (len(heads) - 1)]]
    for row in found["rows"]:
        ms, ratio, memory = row["milliseconds"], row["ratio"], row["memory"]
        lines.append([
            row["name"], f"{100 * row['trained'] / row['parameters']:.3g} %", f"{ms['step']['median']:.0f} ms", _ratio(ratio["median"]),
            f"{ratio['min']:.2f}–{ratio['max']:.2f}", *(f"{ms[part]['median']:.0f} ms" for part in times),
            _mib(memory["saved"]), _mib(memory["peak"]), _mib(memory["optimizer"]),
        ])  # fmt: skip
    busy = found["machine"].get("busy_with_others")
    parts = [f"{found['title']}, adapters of rank {found['rank']}, {found['rounds']} rounds:", table(lines)]
    if busy and busy > 0.1:
        parts.append(f"Other programs kept {busy:.1f} processors busy meanwhile: times are long, ratios less so.")
    return "\n\n".join(parts)


# --- where the time goes ------------------------------------------------------------------------------------------
def grouped(operators: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a step by GROUPS."""
    found = dict.fromkeys((*GROUPS, "other"), 0.0)
    for name, ms in operators.items():
        lower = name.lower()
        found[next((group for group, parts in GROUPS.items() if any(part in lower for part in parts)), "other")] += ms
    return found


def picture(model: Result) -> str:
    """Where the time of a step goes, as an SVG that reads in light and dark: one bar per contestant, one colour per group."""
    rows = [(row["title"], grouped(row["operators"])) for row in model["contestants"] if "operators" in row]
    longest = max((sum(groups.values()) for _, groups in rows), default=1.0)
    left, wide, high, top = 250, 600, 26, 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + wide + 90} {top + high * len(rows) + 10}" font-family="sans-serif" '
        'font-size="13"><style>text{fill:#24292f}@media(prefers-color-scheme:dark){text{fill:#d0d7de}}</style>',
        f'<text x="10" y="20" font-weight="bold">{_escaped(model["title"])}: where the time of a step goes, ms</text>',
    ]
    place = 10
    for group, colour in zip((*GROUPS, "other"), COLOURS, strict=True):
        parts.append(
            f'<rect x="{place}" y="32" width="12" height="12" fill="{colour}"/><text x="{place + 17}" y="43">{group}</text>'
        )
        place += 40 + 8 * len(group)
    for number, (title, groups) in enumerate(rows):
        y, x = top + high * number, float(left)
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{_escaped(title)}</text>')
        for colour, ms in zip(COLOURS, groups.values(), strict=True):
            width = wide * ms / longest
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>')
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 15}">{sum(groups.values()):.0f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def table(lines: list[list[str]]) -> str:
    """Lines of cells, the second of dashes, as Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.0f} MiB"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
