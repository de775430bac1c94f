"""Rows of a table: torch's embedding, forward and backward, and memory that is not touched."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from qatana.numerics import workspace
from qatana.numerics.table import table_rows


@pytest.mark.parametrize("padding", [None, 3, -1])
@pytest.mark.parametrize("rows", [7, 3000], ids=["small", "from the system"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_embedding(padding: int | None, rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    table = torch.randn(rows, 512, dtype=dtype).requires_grad_()
    ids = torch.randint(0, rows, (2, 9))
    ids[0, :2], ids[1, 0] = 3, rows - 1
    upstream = torch.randn(2, 9, 512, dtype=dtype)
    found, expected = table_rows(table, ids, padding), F.embedding(ids, table, padding)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(y, table, upstream)[0] for y in (found, expected))
    assert torch.equal(ours, theirs)


def test_ids_of_32_bits() -> None:
    table, ids = torch.randn(6, 4, requires_grad=True), torch.tensor([1, 5, 1], dtype=torch.int32)
    ours, theirs = (
        torch.autograd.grad(f(table, ids).sum(), table)[0] for f in (table_rows, lambda t, i: F.embedding(i, t))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("count", [2, 500], ids=["few rows", "most pages"])
def test_gradient_of_a_large_table(count: int) -> None:
    """12 MB: zeros come from the system for a few rows, from memory used before for many; repeated ids add up in both."""
    torch.manual_seed(0)
    table, ids = torch.randn(3000, 1024, requires_grad=True), torch.randint(3000, (count,)).repeat(2)
    ours, theirs = (
        torch.autograd.grad(f(table, ids).sum(), table)[0] for f in (table_rows, lambda t, i: F.embedding(i, t))
    )
    assert torch.equal(ours, theirs)


def test_ids_outside_and_no_ids() -> None:
    table = torch.randn(5, 4, requires_grad=True)
    with pytest.raises(IndexError):
        table_rows(table, torch.tensor([5]))
    table_rows(table, torch.empty(0, dtype=torch.int64)).sum().backward()
    assert table.grad is not None
    assert torch.equal(table.grad, torch.zeros(5, 4))


def test_zeros_are_zeros_of_their_own() -> None:
    """Each call gives new memory, which can be written, added to and saved, and goes when the tensor goes."""
    shape = (1 << 12, 1 << 10)
    a = workspace.zeros(shape, torch.device("cpu"))
    a += 1
    b = workspace.zeros(shape, torch.device("cpu"))
    assert float(a.sum()) == a.numel()
    assert float(b.abs().max()) == 0
    del a
    assert not workspace.zeros(shape, torch.device("cpu")).any()


def test_zeros_again_takes_the_memory_of_a_tensor_that_is_gone() -> None:
    """Never that of one that lives, by whatever view; what was written there before is cleared."""
    shape, device = (1 << 12, 1 << 10), torch.device("cpu")
    workspace.clear()
    a = workspace.zeros_again(shape, device)
    a += 1
    place, row = a.data_ptr(), a[7]
    del a
    b = workspace.zeros_again(shape, device)  # row holds the memory of a
    assert b.data_ptr() != place
    assert float(row.sum()) == row.numel()
    assert not b.any()
    place = b.add_(3).data_ptr()
    del b
    c = workspace.zeros_again(shape, device)
    assert c.data_ptr() == place
    assert not c.any()
    workspace.clear()
    assert not c.any()  # it keeps its memory


def test_the_gradient_of_each_step_lies_where_the_last_one_did() -> None:
    table = torch.nn.Parameter(torch.randn(3000, 1024))
    ids, places = torch.randint(3000, (500,)), set()
    for _ in range(3):
        table_rows(table, ids).sum().backward()
        assert table.grad is not None
        assert torch.equal(table.grad.sum(1), ids.bincount(minlength=3000) * 1024.0)
        places.add(table.grad.data_ptr())
        table.grad = None
    assert len(places) == 1
    table_rows(table, ids).sum().backward()
    table_rows(table, ids).sum().backward()  # added to the gradient that is there
    assert torch.equal(table.grad.sum(1), 2 * ids.bincount(minlength=3000) * 1024.0)


def test_operator_is_proper() -> None:
    table, ids = torch.randn(6, 4, requires_grad=True), torch.tensor([[1, 2], [5, 1]])
    torch.library.opcheck(torch.ops.qatana.table_rows.default, (table, ids, -1))
