"""Rows of a table by their numbers, with a gradient that touches no other row.

    y[s] = table[ids[s]],   d table[i] = sum of dy[s] over ids[s] = i        (torch.nn.functional.embedding)
Rows that a batch does not use have gradient 0, which is not written: see `workspace.zeros`."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.numerics.workspace import LARGE, zeros, zeros_again


@torch.library.custom_op("qatana::table_rows", mutates_args=())
def _rows(table: Tensor, ids: Tensor, padding: int) -> Tensor:
    return torch.embedding(table, ids)


@_rows.register_fake
def _(table, ids, padding):
    return table.new_empty((*ids.shape, table.shape[1]))


@torch.library.custom_op("qatana::table_gradient", mutates_args=())
def _gradient(grad: Tensor, ids: Tensor, rows: int, padding: int) -> Tensor:
    if grad.device.type != "cpu" or grad.dtype != torch.float32:
        return torch.ops.aten.embedding_dense_backward(grad, ids, rows, padding, False)
    used, place = ids.unique(return_inverse=True)
    found = torch.ops.aten.embedding_dense_backward(grad, place, len(used), -1, False)
    if padding >= 0:
        found[used == padding] = 0
    shape = (rows, grad.shape[-1])
    if len(used) * LARGE > rows * grad.shape[-1] * grad.itemsize:
        # About half of the large pages or more would be touched and cleared: memory that was used before is faster.
        return zeros_again(shape, grad.device).index_copy_(0, used.long(), found)
    return zeros(shape, grad.device).index_copy_(0, used.long(), found)


@_gradient.register_fake
def _(grad, ids, rows, padding):
    return grad.new_empty((rows, grad.shape[-1]))


def _save(ctx, inputs, output) -> None:
    table, ids, ctx.padding = inputs
    ctx.rows = table.shape[0]
    ctx.save_for_backward(ids)


def _backward(ctx, grad: Tensor):
    return torch.ops.qatana.table_gradient(grad, ctx.saved_tensors[0], ctx.rows, ctx.padding), None, None


_rows.register_autograd(_backward, setup_context=_save)


def table_rows(table: Tensor, ids: Tensor, padding_idx: int | None = None) -> Tensor:
    """table[ids] (*shape, D).   table (N, D), ids (*shape) int64 or int32. Row `padding_idx` gets no gradient (negative: from the end).

    Raises: IndexError for ids outside the table."""
    return _rows(table, ids, -1 if padding_idx is None else padding_idx % table.shape[0])
