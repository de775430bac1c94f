"""Numbers as people read them: the filters of the report's templates.

A missing value is an en dash, a NaN says so, an exact zero has no decimals. Numbers and units are joined by a
no-break space.
"""

from __future__ import annotations

import math
from datetime import datetime
from typing import Any

from qatana.report.data import Certificate, Comparison
from qatana.report.results import engine_name

NONE = "–"
_NBSP = "\u00a0"


def _known(value: float | None) -> str | None:
    """The text for a value that is no ordinary number, None for one that is."""
    if value is None:
        return NONE
    if math.isnan(value):
        return "not a number"
    return None if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def count(value: int | None) -> str:
    """12345678 -> "12,345,678"."""
    return _known(value) or f"{value:,}"


def size(value: int | None) -> str:
    """Three significant digits and decimal prefixes (1 MB = 1,000,000 bytes), as file managers print."""
    if value is None:
        return NONE
    if value < 1000:
        return f"{value}{_NBSP}bytes"
    scaled, unit = float(value), "bytes"
    for unit in ("kB", "MB", "GB", "TB"):  # noqa: B007 (the unit reached is used below)
        scaled /= 1000
        if scaled < 999.5:
            break
    return f"{_three_digits(scaled)}{_NBSP}{unit}"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:,.{digits}f}"


def share(value: float | None) -> str:
    """0.0123 -> "1.23 %"; exact zero and one without decimals, so that they read as exact."""
    if known := _known(value):
        return known
    percent = 100 * (value or 0.0)
    if percent == 0 or abs(percent) >= 99.95:
        return f"{percent:.0f}{_NBSP}%" if percent in (0, 100) else f"{percent:.2f}{_NBSP}%"
    if abs(percent) < 0.001:
        return f"{percent:.0e}{_NBSP}%"
    return f"{percent:.{3 if abs(percent) < 0.1 else 2 if abs(percent) < 10 else 1}f}{_NBSP}%"


def whole_percent(value: float | None) -> str:
    """0.853 -> "85 %"."""
    return _known(value) or f"{round(100 * (value or 0.0))}{_NBSP}%"


def rate(different: int, compared: int) -> str:
    """How many per million: "0", "0.4 per million"."""
    if compared == 0:
        return NONE
    return "0" if different == 0 else f"{_three_digits(1e6 * different / compared)} per million"


def metric_value(value: float, unit: str = "points") -> str:
    """Points with two decimals, other units with four significant digits."""
    return _known(value) or (f"{value:.2f}" if unit == "points" else f"{value:.4g}")


def signed(value: float | None, unit: str = "points") -> str:
    """A loss as a signed change: a loss of 0.2 is "-0.20" (with a true minus sign)."""
    if known := _known(value):
        return known
    text = metric_value(abs(value or 0.0), unit)
    if float(text) == 0:
        return text
    return ("−" if (value or 0.0) > 0 else "+") + text


def decibel(value: float | None) -> str:
    """One decimal; an infinite ratio has no error at all: "exact"."""
    if value == math.inf:
        return "exact"
    return _known(value) or f"{value:.1f}"


def times(value: float | None) -> str:
    """1.8 -> "1.80×"."""
    return _known(value) or f"{_three_digits(value or 0.0)}×"


def milliseconds(value: float | None) -> str:
    """Three significant digits."""
    return _known(value) or _three_digits(value or 0.0)


def sortable(value: float | None) -> str:
    """A number as the page's script reads it back; empty (sorted last) where there is none."""
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(value)


def number(value: float) -> str:
    """A code or a value: integers without a decimal point."""
    text = _known(value) or (f"{int(value):,}" if value == int(value) else f"{value:.6g}")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def verdict(comparison: Comparison) -> str:
    """verify's own verdict, or read off the counts where it gave none."""
    if comparison.verdict is not None:
        return comparison.verdict
    return "fail" if comparison.codes_different or comparison.labels_different else "pass"


def date(value: datetime) -> str:
    """ "3 November 2026, 14:05 UTC"."""
    return f"{value.day} {value:%B %Y, %H:%M %Z}".rstrip()


def counts_in_words(certificate: Certificate) -> str:
    """Codes over all comparisons, labels of the worst one, what is allowed, and where it was measured."""
    compared = sum(one.codes_compared for one in certificate.comparisons)
    different = sum(one.codes_different for one in certificate.comparisons)
    parts = [f"{count(different)} of {count(compared)} codes differ"]
    labelled = [one for one in certificate.comparisons if one.labels_compared]
    if labelled:
        worst = max(labelled, key=lambda one: one.labels_different / one.labels_compared)
        parts[0] += f", and {count(worst.labels_different)} of {count(worst.labels_compared)} labels"
    if certificate.allowed:
        parts.append(f"Allowed: {certificate.allowed}")
    if certificate.isa:
        parts.append(f"Measured on {certificate.isa}")
    return ". ".join(parts) + "."


def headline(certificate: Certificate) -> str:
    """The verdict in words, no stronger than the counts."""
    if certificate.verdict == "fail":
        return "the models differ; do not ship before the first difference is explained"
    if any(one.codes_different for one in certificate.comparisons):
        return "the file's integers are the trained ones; what differs lies inside the written table"
    return "the file's integers are the trained ones"


def without_name(sentence: str, name: str) -> str:
    """A card has the variant as its heading: its sentence starts after it, with a capital."""
    rest = sentence.removeprefix(f"{name}: ")
    return rest[:1].upper() + rest[1:]


FILTERS: dict[str, Any] = {
    "count": count,
    "size": size,
    "share": share,
    "whole_percent": whole_percent,
    "metric_value": metric_value,
    "signed": signed,
    "decibel": decibel,
    "times": times,
    "milliseconds": milliseconds,
    "sortable": sortable,
    "number": number,
    "rate": lambda pair: rate(*pair),
    "verdict": verdict,
    "date": date,
    "counts_in_words": counts_in_words,
    "headline": headline,
    "without_name": without_name,
    "engine": engine_name,
}
