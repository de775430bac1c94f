"""The numbers behind the charts, small enough to travel inside the page.

A long run is thinned to the least and the greatest value of each stretch, so that a spike stays a spike; a
fine histogram is coarsened by adding whole bins, so that no value is lost. Numbers keep six significant
digits: a pixel shows three.
"""

from __future__ import annotations

import math
from typing import Any

from qatana.report.data import Curve, Grid, LayerHistogram, ReportData, Series, StageHistogram
from qatana.report.results import variants

MAX_POINTS = 600
MAX_BINS = 256
_PANELS = (
    ("loss", "Loss", "number"),
    ("metric", "", "number"),
    ("lr", "Learning rate", "number"),
    ("saturation", "Saturation (share of values clipped)", "share"),
    ("scale_drift", "Scale drift (mean relative change)", "share"),
)


def payload(data: ReportData) -> dict[str, Any]:
    """What the page's script draws: JSON-able, finite numbers or None."""
    return {
        "results": _results(data),
        "curves": {"runs": [_run(curve) for curve in data.curves], "panels": _panels(data.curves)},
        "histograms": [_histogram(entry) for entry in data.histograms],
    }


def _results(data: ReportData) -> dict[str, Any]:
    """Float, PTQ and QAT metric per variant, for the chart of what was lost and won."""
    rows = []
    for variant in variants(data.results):
        stages = {"float": variant.reference, "ptq": variant.ptq, "qat": variant.qat}
        values = {stage: _finite(row.metric.value) if row else None for stage, row in stages.items()}
        if values["float"] is not None and (values["ptq"] is not None or values["qat"] is not None):
            rows.append({"name": variant.name, **values})
    metric = data.results[0].metric if data.results else None
    return {"metric": metric.name if metric else "", "unit": metric.unit if metric else "", "rows": rows}


def _run(curve: Curve) -> dict[str, Any]:
    return {"name": curve.run, "marks": [{"step": mark.step, "text": mark.text} for mark in curve.marks]}


def _panels(curves: list[Curve]) -> list[dict[str, Any]]:
    """One panel per logged quantity, with one line per run that logged it."""
    panels = []
    for key, title, unit in _PANELS:
        lines = []
        for place, curve in enumerate(curves):
            steps, values = thin(curve.step, getattr(curve, key))
            if steps:
                broken = _first_broken(curve.step, getattr(curve, key))
                lines.append({"run": place, "x": steps, "y": values, "broken": broken})
        if lines:
            names = dict.fromkeys(curves[line["run"]].metric_name for line in lines)
            panels.append({"key": key, "title": title or ", ".join(names), "unit": unit, "lines": lines})
    return panels


def _first_broken(steps: list[int], values: Series) -> int | None:
    """First step with a NaN or infinite value: a run that diverged must not look like one that ended."""
    broken = (
        step for step, value in zip(steps, values, strict=False) if value is not None and not math.isfinite(value)
    )
    return next(broken, None)


def thin(steps: list[int], values: Series, limit: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """At most `limit` of the finite points, in order, with the extremes of every stretch among them."""
    known = [(step, value) for step, value in zip(steps, values, strict=False) if _finite(value) is not None]
    if len(known) > limit:
        known = _extremes(known, limit)
    return [step for step, _ in known], [_digits(value) for _, value in known if value is not None]


def _extremes(points: list[tuple[int, Any]], limit: int) -> list[tuple[int, Any]]:
    stretches = limit // 2 - 1
    kept = {0, len(points) - 1}
    for stretch in range(stretches):
        places = range(len(points) * stretch // stretches, len(points) * (stretch + 1) // stretches)
        kept.add(min(places, key=lambda place: points[place][1]))
        kept.add(max(places, key=lambda place: points[place][1]))
    return [points[place] for place in sorted(kept)]


def _histogram(entry: LayerHistogram) -> dict[str, Any]:
    return {
        "layer": entry.layer,
        "role": entry.role,
        "variant": entry.variant,
        "stages": [_stage(stage) for stage in entry.stages],
    }


def _stage(stage: StageHistogram) -> dict[str, Any]:
    edges, counts = coarsen(stage.edges, stage.counts)
    return {
        "stage": stage.stage,
        "edges": _compact(edges),
        "counts": counts,
        "grid": _grid(stage.grid),
    }


def _grid(grid: Grid | None) -> dict[str, Any] | None:
    if grid is None:
        return None
    return {"scale": grid.scale, "lo": grid.lo, "hi": grid.hi, "zero": grid.zero_point}


def coarsen(edges: list[float], counts: list[int], limit: int = MAX_BINS) -> tuple[list[float], list[int]]:
    """Join neighbouring bins until at most `limit` are left; the total stays."""
    width = math.ceil(len(counts) / limit)
    if width == 1:
        return edges, counts
    starts = range(0, len(counts), width)
    joined = [sum(counts[start : start + width]) for start in starts]
    return [*(edges[start] for start in starts), edges[-1]], joined


def _compact(edges: list[float]) -> list[float] | dict[str, float]:
    """Equal bins as {lo, hi}: their edges would be half of the page."""
    step = (edges[-1] - edges[0]) / (len(edges) - 1)
    # A thousandth of a bin is far below a pixel.
    if all(abs(edge - (edges[0] + place * step)) <= 1e-3 * step for place, edge in enumerate(edges)):
        return {"lo": _digits(edges[0]), "hi": _digits(edges[-1])}
    return [_digits(edge) for edge in edges]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
