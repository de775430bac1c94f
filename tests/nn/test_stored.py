"""Stored tables: rows are read alone where their codes lie together, and are those of the whole table."""

from __future__ import annotations

import pytest
import torch

from qatana.nn.stored import StoredEmbedding, StoredWeight
from qatana.numerics import fake_quantize_by, hold, scheme
from qatana.numerics.stored import reads_rows, store

ALONE = [
    scheme("int8", "channel", scale="dynamic"), scheme("int4", group=32, scale="dynamic"), scheme("uint2", group=32, scale="dynamic"),
    scheme("uint4", group=32, symmetric=False, scale="dynamic"), scheme("int8", scale="dynamic"), scheme("nf4"), scheme("nf4+double"),
    scheme("nvfp4"), scheme("mxfp8"), scheme("fp8:e4m3/channel", scale="dynamic"), scheme("gguf:q4_0"), scheme("bitnet"),
    scheme("uint4", group=64, symmetric=False, scale="dynamic", rule="quanto"),
]  # fmt: skip
WHOLE = [
    scheme("int8", "channel1", scale="dynamic"),
    scheme("e4m3", "block5x64", scale="dynamic"),
    scheme("int4", "flat96", scale="dynamic"),
]
IDS = torch.tensor([[3, 0, 39], [3, 7, 21]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", ALONE + WHOLE, ids=str)
def test_rows(s, dtype: torch.dtype) -> None:
    table = torch.randn(40, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = StoredWeight(store(table, s), s, table, "table")
    assert weight.reads_rows == (s in ALONE)
    expected = fake_quantize_by(table, s)
    assert torch.equal(weight(), expected)
    assert torch.equal(StoredEmbedding(weight)(IDS), expected[IDS])
    assert weight.rows(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 2, 256)


def test_held_parameters_and_one_scale_for_all() -> None:
    table = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    s = scheme("hqq4")
    weight = StoredWeight(store(table, s, held=hold(table, s)), s, table, "table")
    assert torch.equal(weight.rows(IDS), weight()[IDS])
    s = scheme("int4", group=32)
    weight = StoredWeight(store(table, s, torch.full((40, 8, 1), 0.25)), s, table, "table")
    assert weight.get_buffer("scale").ndim == 0
    assert torch.equal(weight.rows(IDS), weight()[IDS])


def test_what_is_no_row() -> None:
    """As torch's own embedding: no row stands before the first or behind the last."""
    table = torch.randn(40, 256)
    weight = StoredWeight(store(table, ALONE[0]), ALONE[0], table, "table")
    for wrong in (-1, 40):
        with pytest.raises(IndexError):
            weight.rows(torch.tensor([wrong]))
    assert not reads_rows(scheme("int1", group=3, symmetric=False, scale="dynamic"), (4, 3))  # a row ends within a byte
    assert not reads_rows(ALONE[0], (4, 3, 8))
