"""`render`: one self-contained HTML page from `ReportData`.

The page carries its own style and script, and asks for nothing: its content security policy forbids every
request and every script and style but its own, by hash, so that it opens offline and a hostile layer name
stays text.

Tables are written here, by Jinja, with everything escaped; they need no script to be read. Charts are drawn
in the page as SVG by a few hundred lines of plain JavaScript (`templates/*.js`) instead of a charting
library: plotly.js inlines over 4 MB (its basic bundle 1 MB) where a whole report here stays below 1 MB, and
lines, dots and bars with a tooltip are all that is wanted.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from qatana.errors import require
from qatana.files import replacing
from qatana.report import results
from qatana.report.charts import payload
from qatana.report.data import Certificate, ReportData
from qatana.report.readable import FILTERS

_SCRIPTS = ("svg.js", "charts.js", "page.js")


def render(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Write `data` as one HTML file, whole or not at all, and return its path. Missing folders are made.

    Raises: MissingExtra without Jinja2 (extra "report"); ArtifactError if the file cannot be written.
    """
    text, target = page(data), Path(path)
    with replacing(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return target


def page(data: ReportData) -> str:
    """The HTML text of the report. The same data gives the same text."""
    jinja = require("jinja2", "report")
    environment = jinja.Environment(
        # autoescape for every template, whatever its ending: all names in a report are data.
        autoescape=True,
        loader=jinja.FunctionLoader(_template),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja.StrictUndefined,
    )
    environment.filters.update(FILTERS)
    style, script = _template("report.css"), _script()
    return environment.get_template("page.html.j2").render(
        data=data,
        view=_view(data),
        payload=payload(data),
        # Own files, not data: the only text that enters the page unescaped.
        style=style,
        script=script,
        policy=_policy(style, script),
    )


def _template(name: str) -> str:
    return (files("qatana.report") / "templates" / name).read_text(encoding="utf-8")


def _script() -> str:
    body = "\n".join(_template(name) for name in _SCRIPTS)
    return f'"use strict";\n(() => {{\n{body}\n}})();\n'


def _policy(style: str, script: str) -> str:
    """Content security policy: no request at all, this script and this style only, no HTML from strings."""
    return "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"style-src {_hash(style)}",
            f"script-src {_hash(script)}",
            "base-uri 'none'",
            "form-action 'none'",
            "require-trusted-types-for 'script'",
        ]
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _view(data: ReportData) -> dict[str, Any]:
    """What the templates need beyond the data: everything computed, so that they only place it."""
    certificates = {certificate.variant: certificate for certificate in data.certificates}
    variants = [
        {"row": variant, "certificate": certificates.get(variant.name) or certificates.get("")}
        for variant in results.variants(data.results)
    ]
    return {
        "sections": _sections(data, bool(variants)),
        "variants": variants,
        "results": _result_cells(data),
        "proof": _proof(data, [entry["certificate"] for entry in variants]),
        "marks": _marks(data),
        "layer_variants": _distinct(row.variant for row in data.layers),
        "layer_roles": _distinct(row.role for row in data.layers),
        "charted": {(entry.variant, entry.layer, entry.role) for entry in data.histograms},
        "plan": [_plan_part(data, variant) for variant in _distinct(row.variant for row in data.plan)],
    }


def _sections(data: ReportData, has_variants: bool) -> list[tuple[str, str, bool]]:
    """(id, name, whether there is anything to show), in the order of the page: what decides comes first."""
    return [
        ("summary", "In short", has_variants),
        ("results", "Results", bool(data.results)),
        ("certificate", "Certificate", bool(data.certificates)),
        ("tokens", "Per class", bool(data.token_tables)),
        ("curves", "Training", any(curve.step for curve in data.curves)),
        ("layers", "Layers", bool(data.layers)),
        ("histograms", "Before and after", bool(data.histograms)),
        ("plan", "Plan", bool(data.plan)),
        ("origin", "How this was made", True),
    ]


def _marks(data: ReportData) -> list[tuple[int, str, list[str]]]:
    """(step, what happened, in which runs), in the order of the steps."""
    runs: dict[tuple[int, str], list[str]] = {}
    for curve in data.curves:
        for mark in curve.marks:
            runs.setdefault((mark.step, mark.text), []).append(curve.run)
    return sorted((step, text, names) for (step, text), names in runs.items())


def _proof(data: ReportData, of_variants: list[Certificate | None]) -> tuple[str, str, str]:
    """(state, word, explanation) of the page's first badge; no stronger than the weakest certificate."""
    if any(certificate.verdict == "fail" for certificate in data.certificates):
        return "bad", "Not proven", "a file differs from what was trained"
    missing = sum(certificate is None for certificate in of_variants)
    if missing:
        return "open", "Proven in part", f"{missing} of {len(of_variants)} variants not verified"
    return "good", "Proven", "the file holds the trained integers"


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _result_cells(data: ReportData) -> list[dict[str, Any]]:
    """Per result row: difference to float, share recovered, bar lengths (0 to 1), and its best columns."""
    rows = data.results
    best = results.best_cells(rows)
    columns = ("file_bytes", "speedup_vs_float_same_engine", "speedup_vs_torch_float")
    longest = {column: max((getattr(row, column) or 0 for row in rows), default=0) for column in columns}
    highest = max((abs(row.metric.value) for row in rows if math.isfinite(row.metric.value)), default=0)
    cells = []
    for place, row in enumerate(rows):
        bars = {column: _length(getattr(row, column), longest[column]) for column in columns}
        bars["metric"] = _length(abs(row.metric.value), highest)
        ptq = results.reference_of(rows, row, f"{row.name.removesuffix('-qat')}-ptq")
        reference = results.reference_of(rows, row)
        trained = row.name.endswith("-qat")
        cells.append(
            {
                "row": row,
                "gap": None if row.name == "float" else results.gap(reference, row),
                "recovered": results.share_recovered(reference, ptq, row) if trained else row.recovered,
                "bars": bars,
                "best": {column for index, column in best if index == place},
            }
        )
    return cells


def _length(value: float | None, longest: float) -> float:
    return value / longest if value and longest and math.isfinite(value) else 0.0


def _plan_part(data: ReportData, variant: str) -> dict[str, Any]:
    """How many tensors of a variant are quantized, and why others stay float, most frequent reason first."""
    rows = [row for row in data.plan if row.variant == variant]
    floating = [row.reason or "no reason given" for row in rows if row.scheme is None]
    return {
        "variant": variant,
        "quantized": len(rows) - len(floating),
        "floating": len(floating),
        "reasons": Counter(floating).most_common(),
    }
