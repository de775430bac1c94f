"""reorder: put channels of like size next to each other, so that weights of one group share a scale that suits all of them.

Between two linear layers with nothing but functions of single elements between them (an MLP: gated, GELU, ReLU ...) the order of the
channels is free:   W2 f(W1 x) = W2[:, p] f(W1[p] x)   for any order p. A scale per group of g columns is as large as the group's largest
weight, so rounding costs about
    e(p) = sum over rows i, groups G of   max_{j in G} w_ij^2 * sum_{j in G} E[x_j^2]
(an error uniform over a step, whose size is the scale's), which is least where large columns are with large ones. Of the orders by the
columns' size and by the activations' size, and the one there is, the one with the least e is taken.
Reordering for quantization: Yuan et al. 2023 (RPTQ, arXiv:2304.01089), there for the ranges of activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qatana.batch import evaluating
from qatana.errors import ModelError
from qatana.prepare.channels import Orders, Producer

ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far outputs may move, as a share of their norm: some hundred units of the last place, far above what sums in another order
make in some dozens of layers, and far below what an order that does not fit makes, which is about the norm."""

WORTH = 0.99
"""Orders that gain less than a hundredth are left: among channels of one size any order is the best, by rounding."""


class Reordered(NamedTuple):
    """One tensor whose channels got another order.

    producers  parameters that make its channels        consumers  parameters that multiply them
    error      e(p) over e of the order before"""

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    error: float


def reorder(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    group: int = 32,
    batches: int | None = 4,
    progress: Callable[[int], None] | None = None,
) -> list[Reordered]:
    """Reorder the channels of a float model in place, before `plan` and after `equalize`.

    What it computes stays the same, up to the rounding of sums in another order.

    loader    yields batches as the model takes them; labels are ignored. `batches` limits how many are used, None: all
    group     channels that will share a scale: the 32 of "int4/group32"
    progress  called with the number of batches done
    Found by running the model: linear layers whose outputs other linear layers read, with operators between them that take every element
    by itself (activation functions, products of gates). A tensor that anything else reads too (a residual add, attention's heads, a norm)
    keeps its order, and so does one that is no longer than a group, or would gain nothing; they are not listed.
    Returns: what was reordered, in the order of the forward pass.
    Raises: ModelError if the model is quantized already or would compute something else (then it is as it was); DataError for an empty
    loader, NaN or infinite values; ValueError for a group below 2."""
    if group < 2:
        raise ValueError(f"group {group} is below 2: a scale for each channel suits any order")
    if getattr(model, "qatana_plan", None) is not None:
        raise ModelError(f"{type(model).__name__} is quantized already; reorder the float model, before qatana.plan")
    orders = Orders(model)
    with torch.no_grad(), evaluating(model):
        first = orders.follow_all(loader, batches, progress, "reordering")
        made = [(producer, *_order(producer, group)) for producer in orders.found() if len(producer.power) > group]
        made = [(producer, order, error) for producer, order, error in made if error < WORTH]
        for producer, order, _ in made:
            _move(producer, order)
        if not _same(model(*first[0], **first[1]), first[2]):
            for producer, order, _ in made:
                _move(producer, order.argsort())
            raise ModelError(
                f"{type(model).__name__} computes something else with its channels in another order, or something else in every run; its "
                f"weights are as they were. Leave reorder out, or make its forward pass deterministic"
            )
    return [
        Reordered((producer.name, *producer.others), tuple(producer.consumers), error) for producer, _, error in made
    ]


def _order(producer: Producer, group: int) -> tuple[Tensor, float]:
    """The best order, and its e over that of the order there is."""
    columns = torch.cat([matrix.detach().float() for matrix in producer.consumers.values()], 1)  # [channels, rows]
    power = producer.power.to(columns.device)
    there = torch.arange(len(columns), device=columns.device)
    candidates = [there, columns.square().sum(1).argsort(), power.argsort()]
    errors = [_error(columns[order], power[order], group) for order in candidates]
    best = min(range(len(candidates)), key=errors.__getitem__)
    return candidates[best], errors[best] / errors[0] if errors[0] > 0 else 1.0


def _error(columns: Tensor, power: Tensor, group: int) -> float:
    """e, whose last group may be shorter."""
    parts = zip(columns.split(group), power.split(group), strict=True)
    return float(sum(part.abs().amax(0).square().sum() * size.sum() for part, size in parts))


def _move(producer: Producer, order: Tensor) -> None:
    for tensor in producer.makers:  # channels are their last dimension
        tensor.copy_(tensor[..., order])
    for matrix in producer.consumers.values():  # [channels, outputs]
        matrix.copy_(matrix[order])


def _same(result: Any, before: list[Tensor]) -> bool:
    after = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    return len(after) == len(before) and all(
        a.shape == b.shape
        and float((a.double() - b.double()).norm()) <= ROUNDING.get(b.dtype, 0.0) * float(b.double().norm())
        for a, b in zip(after, before, strict=True)
    )
