"""Counting, and the written table."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from qatana.errors import ParityError
from qatana.verify import ALLOWED, Certificate, Comparison, Tally


def test_a_tally_finds_the_first_difference() -> None:
    tally = Tally("x", "quantize")
    left, right = np.arange(12, dtype=np.uint8).reshape(3, 4), np.arange(12, dtype=np.uint8).reshape(3, 4)
    right[1, 2], right[2, 3] = 250, 0
    tally.compare(left, left)
    tally.compare(left, right)
    assert (tally.compared, tally.different, tally.index, tally.left, tally.right) == (24, 2, [1, 2], 6, 250)
    assert tally.max_difference == 244  # 250 - 6, not what wraps around in uint8
    assert tally.rate == 2 / 24


def test_nan_equals_nan_and_nothing_else() -> None:
    tally = Tally("x", "linear")
    tally.compare(np.array([np.nan, np.nan, 1.0]), np.array([np.nan, 1.0, 1.0]))
    assert (tally.different, tally.index) == (1, [1])
    json.dumps(tally.to_dict(), allow_nan=False)


def test_another_shape_differs_everywhere() -> None:
    tally = Tally("x", "quantize")
    tally.compare(np.zeros((2, 3)), np.zeros((3, 2)))
    assert (tally.compared, tally.different, tally.index) == (6, 6, [])
    assert json.loads(json.dumps(tally.to_dict(), allow_nan=False))["max_difference"] == "Infinity"


def test_a_tolerance_is_a_bound_per_element() -> None:
    tally = Tally("x", "block_linear")
    tally.compare(np.array([1.0, 1.0]), np.array([1.1, 1.1]), tolerance=np.array([0.2, 0.05]))
    assert (tally.different, tally.index) == (1, [1])


@pytest.mark.parametrize(
    ("row", "codes", "labels", "covered"),
    [
        ("layer by layer", (10**9, 0), (0, 0), True),
        ("layer by layer", (10**9, 1), (0, 0), False),
        ("end to end, integers only", (100, 0), (1000, 1), False),
        ("end to end", (100, 0), (46_435, 23), True),  # 5 in 10,000 of CoNLL-2003's test tokens: 23.2
        ("end to end", (100, 0), (46_435, 24), False),
        ("end to end", (100, 0), (300, 1), True),  # one near tie in a small sample
        ("end to end", (100, 0), (300, 2), False),
        ("float operators", (10**6, 100), (0, 0), True),
        ("float operators", (10**6, 101), (0, 0), False),
    ],
)
def test_the_written_table(row: str, codes: tuple[int, int], labels: tuple[int, int], covered: bool) -> None:
    assert ALLOWED[row].covers(*codes, *labels) is covered
    assert ALLOWED[row].reason


def _certificate(*comparisons: Comparison, problems: list[str] | None = None) -> Certificate:
    return Certificate(
        "ort:int8", "onnxruntime", {"isa": "avx2"}, {}, {"path": "x.onnx"}, list(comparisons), problems=problems or []
    )


def test_parity_counts_layer_by_layer_and_labels_end_to_end() -> None:
    end = Comparison("integer model", "x.onnx", "end to end", "end to end", labels_compared=7, labels_different=1)
    end.tally("a", "quantize").compare(np.zeros(9), np.eye(3).reshape(-1))
    other = Comparison("QAT model", "integer model", "training", "training")
    other.tally("a", "quantize").compare(np.zeros(50), np.zeros(50))
    labels = {"labels_compared": 7, "labels_different": 1}
    alone = _certificate(other, end)
    assert alone.parity == {"codes_compared": 9, "codes_different": 3, **labels}
    layers = Comparison("integer model", "x.onnx", "layer by layer", "layer by layer")
    layers.tally("a", "quantize").compare(np.zeros(20), np.zeros(20))
    both = _certificate(other, layers, end)
    assert both.parity == {"codes_compared": 20, "codes_different": 0, **labels}
    assert both.drift == {"codes_compared": 9, "codes_different": 3}


def test_a_problem_fails_the_certificate() -> None:
    certificate = _certificate(problems=["Conv 'y' runs in float"])
    assert certificate.to_dict()["verdict"] == "fail"
    with pytest.raises(ParityError, match="Conv 'y' runs in float"):
        certificate.raise_on_difference()


def test_the_error_names_tensor_index_and_values() -> None:
    comparison = Comparison("integer model", "x.onnx", "end to end", "end to end, integers only", began_at="gelu")
    comparison.tally("first", "quantize").compare(np.array([1, 2]), np.array([1, 2]))
    comparison.tally("second", "quantize").compare(np.array([1, 2]), np.array([1, 3]))
    with pytest.raises(ParityError, match=r"first in 'second' \(quantize\) at index \[1\]: 2 against 3; began at gelu"):
        _certificate(comparison).raise_on_difference()
    assert math.isclose(comparison.tallies["second"].rate, 0.5)
