"""What the result rows say: loss, share recovered, best values, and one sentence per quantized variant.

With f, p, q the metric of float, PTQ and QAT (signs turned where lower is better):
    lost by quantizing = f - p        recovered = (q - p) / (f - p)
A share is given only where it means something: where the loss shows at all (from 0.05 points on) and exceeds
the spread between seeds. Otherwise the sentence says so instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qatana.report.data import Metric, ResultRow

ENGINES = {"torch": "PyTorch", "integers": "PyTorch, integers", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_ACCURACY_FROM = ("torch", "onnxruntime", "openvino")
_DEPLOYED_FIRST = ("onnxruntime", "openvino", "torch")
# Half a unit in the last digit of a published figure (86.4): a smaller loss is not visible in it.
_VISIBLE = 0.05
_NBSP = "\u00a0"


@dataclass(frozen=True)
class Variant:
    """One quantized variant ("int8") against float. Losses are in the metric's unit, positive where worse."""

    name: str
    reference: ResultRow | None
    ptq: ResultRow | None
    qat: ResultRow | None
    recovered: float | None
    size: ResultRow | None
    smaller: float | None
    speeds: tuple[tuple[str, float], ...]
    sentence: str

    @property
    def final(self) -> ResultRow | None:
        """The row that would be shipped: QAT, or PTQ where nothing was trained."""
        return self.qat or self.ptq

    @property
    def final_loss(self) -> float | None:
        """How far the shipped model is below float."""
        return gap(self.reference, self.final)


def engine_name(engine: str) -> str:
    """The name that people write: "onnxruntime" is "ONNX Runtime"."""
    return ENGINES.get(engine, engine)


def gap(reference: ResultRow | None, row: ResultRow | None) -> float | None:
    """How much worse `row` is than `reference`, in the metric's unit; None where it can't be told."""
    if reference is None or row is None or reference.metric.name != row.metric.name:
        return None
    difference = reference.metric.value - row.metric.value
    if not math.isfinite(difference):
        return None
    return difference if reference.metric.higher_is_better else -difference


def share_recovered(reference: ResultRow | None, ptq: ResultRow | None, qat: ResultRow | None) -> float | None:
    """(qat - ptq) / (float - ptq), the share of the PTQ loss won back; None where the loss is too small."""
    if qat is not None and qat.recovered is not None:
        return qat.recovered
    loss, left = gap(reference, ptq), gap(reference, qat)
    if loss is None or left is None or not _is_visible(loss, reference, ptq):
        return None
    return (loss - left) / loss


def _is_visible(loss: float, *rows: ResultRow | None) -> bool:
    metrics = [row.metric for row in rows if row is not None]
    threshold = _VISIBLE if metrics[0].unit == "points" else 0.0
    return loss > max([threshold, *(metric.spread or 0.0 for metric in metrics)])


def row_of(rows: list[ResultRow], name: str, engines: tuple[str, ...] = _ACCURACY_FROM) -> ResultRow | None:
    """The row of that name, from the first of `engines` that has one, else from any engine."""
    found = [row for row in rows if row.name == name]
    order = {engine: place for place, engine in enumerate(engines)}
    return min(found, key=lambda row: order.get(row.engine, len(order)), default=None)


def reference_of(rows: list[ResultRow], row: ResultRow, name: str = "float") -> ResultRow | None:
    """The row `name` to compare `row` with: of its own engine where there is one."""
    return row_of(rows, name, (row.engine, *_ACCURACY_FROM))


def variants(rows: list[ResultRow]) -> list[Variant]:
    """One per "<variant>-ptq" / "<variant>-qat" name, in the order of the rows."""
    names = dict.fromkeys(row.name.rpartition("-")[0] for row in rows if row.name.endswith(("-ptq", "-qat")))
    return [_variant(rows, name) for name in names if name]


def _variant(rows: list[ResultRow], name: str) -> Variant:
    reference = row_of(rows, "float")
    ptq, qat = row_of(rows, f"{name}-ptq"), row_of(rows, f"{name}-qat")
    recovered = share_recovered(reference, ptq, qat)
    size, smaller = _size(rows, name)
    speeds = _speeds(rows, name)
    parts = [*_accuracy_words(reference, ptq, qat, recovered), *_size_words(smaller), *_speed_words(speeds)]
    sentence = f"{name}: {', '.join(parts)}." if parts else f"{name}: nothing to compare with."
    return Variant(name, reference, ptq, qat, recovered, size, smaller, speeds, sentence)


def _size(rows: list[ResultRow], name: str) -> tuple[ResultRow | None, float | None]:
    sized = [row for row in rows if row.file_bytes]
    row = row_of(sized, f"{name}-qat", _DEPLOYED_FIRST) or row_of(sized, f"{name}-ptq", _DEPLOYED_FIRST)
    reference = reference_of(sized, row) if row else None
    if row is None or reference is None or not row.file_bytes or not reference.file_bytes:
        return row, None
    return row, reference.file_bytes / row.file_bytes


def _speeds(rows: list[ResultRow], name: str) -> tuple[tuple[str, float], ...]:
    timed = [row for row in rows if row.speedup_vs_float_same_engine and row.engine != "torch"]
    trained = [row for row in timed if row.name == f"{name}-qat"]
    chosen = trained or [row for row in timed if row.name == f"{name}-ptq"]
    return tuple((row.engine, row.speedup_vs_float_same_engine or 1.0) for row in chosen)


def amount(value: float, metric: Metric) -> str:
    """A difference with its unit: "0.2 points", "0.04 points"; other units with three significant digits."""
    size = abs(value)
    if metric.unit != "points":
        return f"{size:.3g}{_NBSP}{metric.unit}"
    return f"{size:.1f}{_NBSP}points" if size >= 0.095 else f"{size:.2f}{_NBSP}points"


def is_nothing(value: float, metric: Metric) -> bool:
    """Whether a difference would be printed as 0."""
    return abs(value) < (0.005 if metric.unit == "points" else 1e-12)


def _accuracy_words(
    reference: ResultRow | None, ptq: ResultRow | None, qat: ResultRow | None, recovered: float | None
) -> list[str]:
    loss, left = gap(reference, ptq), gap(reference, qat)
    if loss is None or ptq is None:
        return [] if left is None or qat is None else [f"{_distance(left, qat.metric)} after QAT"]
    words = [_loss_words(loss, ptq.metric, _is_visible(abs(loss), reference, ptq))]
    if left is not None and qat is not None:
        words.append(_recovery_words(loss, left, recovered, qat.metric))
    return words


def _loss_words(loss: float, metric: Metric, visible: bool) -> str:
    if is_nothing(loss, metric):
        return "nothing lost by quantizing"
    doubt = " (within the spread of the seeds)" if metric.spread and not visible else ""
    return f"{amount(loss, metric)} {'lost' if loss > 0 else 'gained'} by quantizing{doubt}"


def _recovery_words(loss: float, left: float, recovered: float | None, metric: Metric) -> str:
    if recovered is None or loss <= 0:
        return f"after QAT {_distance(left, metric)}"
    if left > loss:
        return f"QAT lost another {amount(left - loss, metric)}"
    if left <= 0:
        beyond = "" if is_nothing(left, metric) else f" and {amount(left, metric)} more"
        return f"all of it{beyond} won back by QAT"
    # Never "100 %" while something is still missing.
    return f"{min(round(100 * recovered), 99)}{_NBSP}% of it won back by QAT"


def _distance(left: float, metric: Metric) -> str:
    if is_nothing(left, metric):
        return "level with float"
    # "below float" would be wrong for a metric where lower is better.
    return f"{amount(left, metric)} {'worse' if left > 0 else 'better'} than float"


def _size_words(smaller: float | None) -> list[str]:
    if smaller is None:
        return []
    return [f"file {smaller:.1f} times smaller" if smaller >= 1 else f"file {1 / smaller:.1f} times larger"]


def _speed_words(speeds: tuple[tuple[str, float], ...]) -> list[str]:
    return [f"{_pace(ratio)} in {engine_name(engine)}" for engine, ratio in speeds]


def _pace(ratio: float) -> str:
    if 0.95 <= ratio < 1.05:
        return "as fast as float"
    return f"{ratio:.1f} times faster" if ratio > 1 else f"{1 / ratio:.1f} times slower"


def best_cells(rows: list[ResultRow]) -> set[tuple[int, str]]:
    """(row, column) of the best value per column among the quantized rows; float is only the measure."""
    columns: dict[str, Callable[[Iterable[float]], float]] = {
        "file_bytes": min,
        "latency_ms": min,
        "speedup_vs_float_same_engine": max,
        "speedup_vs_torch_float": max,
    }
    cells = {cell for column, pick in columns.items() for cell in _best(rows, column, pick)}
    if len({row.metric.name for row in rows}) > 1:
        return cells
    lower = any(not row.metric.higher_is_better for row in rows)
    return cells | _best(rows, "metric", min if lower else max)


def _best(rows: list[ResultRow], column: str, pick: Callable[[Iterable[float]], float]) -> set[tuple[int, str]]:
    values = {
        place: row.metric.value if column == "metric" else getattr(row, column)
        for place, row in enumerate(rows)
        if row.name != "float"
    }
    known = {place: value for place, value in values.items() if value is not None and math.isfinite(value)}
    if len(known) < 2:
        return set()
    best = pick(known.values())
    return {(place, column) for place, value in known.items() if value == best}
