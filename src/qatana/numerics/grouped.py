"""One product with a weight of its own for each row: how the experts of a mixture multiply.

    y[s] = x[s] W[index[s]]^T        x (S, K), W (E, N, K), index (S,) int64 -> y (S, N)

The rows of an expert are multiplied together. It is one operator of torch, so that a graph holds it although how many rows an expert
gets is known at run time only; training and the converted model run the same one. A row whose index is no expert (>= E: it belongs to
another process) is 0."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """y, in the dtype that a linear layer would have: that of autocast where it is on, else the weight's."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return torch.ops.qatana.grouped_linear(x.to(dtype), weight.to(dtype), index)


@torch.library.custom_op("qatana::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    y = x.new_zeros(len(x), weight.shape[1])
    for expert, rows in _groups(index, len(weight)):
        y[rows] = x[rows] @ weight[expert].t()
    return y


@_grouped_linear.register_fake
def _(x, weight, index):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("qatana::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """dL/dx[s] = g[s] W[e];   dL/dW[e] = sum of g[s]^T x[s] over the rows of expert e."""
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for expert, rows in _groups(index, len(weight)):
        grad_x[rows] = grad[rows] @ weight[expert]
        grad_weight[expert] = grad[rows].t() @ x[rows]
    return grad_x, grad_weight


@_grouped_linear_backward.register_fake
def _(grad, x, weight, index):
    return torch.empty_like(x), torch.empty_like(weight)


def _groups(index: Tensor, experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that is hit, and its rows in order."""
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index.clamp(max=experts), minlength=experts + 1)[:experts].tolist()
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, order[start : start + count]
        start += count


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return *torch.ops.qatana.grouped_linear_backward(grad.contiguous(), *ctx.saved_tensors), None


_grouped_linear.register_autograd(_backward, setup_context=_save)
