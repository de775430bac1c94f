"""The table of number formats: each scheme once, errors by the definition, bits as in the files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support.tensors import minilm

import qatana as qt
from qatana.numerics.gguf import GRIDS
from qatana.report.formats import entries, sqnr


def test_sqnr_is_that_of_the_definition() -> None:
    """binary: x_hat = mean |x| * sign; of (1, 3) that is (2, 2): 10 log10((1 + 9) / (1 + 1))."""
    assert sqnr(torch.tensor([[1.0, 3.0]]), qt.scheme("binary")) == round(10 * math.log10(5), 2)
    assert sqnr(torch.tensor([[2.0, -2.0]]), qt.scheme("binary")) is None


def test_every_format_is_there_once() -> None:
    names = [entry.name for entry in entries()]
    assert len(set(names)) == len(names)
    assert {f"gguf:{name}" for name in GRIDS} <= set(names)
    for entry in entries():
        minilm_like = torch.zeros(2, 1536)
        entry.scheme.check(minilm_like.shape)


@pytest.mark.parametrize(
    ("name", "bits"),
    # Bytes of a block in the file formats themselves: 18 of 32 elements, 54 of 256, 4 bits and an E8M0 byte per 32, E4M3 per 16.
    [
        ("gguf:q4_0", 4.5),
        ("gguf:tq1_0", 54 * 8 / 256),
        ("mxfp4", 4.25),
        ("nvfp4", 4.5),
        ("uint4/group128", 4 + 36 / 128),
    ],
)
def test_bits_count_scales_and_zero_points(name: str, bits: float) -> None:
    (entry,) = (entry for entry in entries() if entry.name == name)
    assert entry.scheme.bits_per_element == bits


@pytest.mark.slow
def test_the_quick_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(json.dumps(qt.format_table(quick=True), allow_nan=False))
    assert [row["name"] for row in found["formats"]] == [entry.name for entry in entries()]
    assert found["tensors"]["MiniLM"] == minilm().numel()
    for row in found["formats"]:
        assert set(row["sqnr"]) == set(found["tensors"])
        assert row["ns_per_element"] > 0
        assert row["copies"] > 0
        assert (row["search_copies"] is not None) == row["name"].startswith(
            ("hqq", "gguf:q4_k", "gguf:q5_k", "gguf:q6_k")
        )
