"""equalize: take outlier channels out of activations, into the weights that multiply them. The float model computes the same bits.

A channel j of x is divided by s_j where it is made (the weight of a norm, the rows of a linear layer), and the columns of the weights
that multiply it are multiplied by s_j:   (x_j / s_j) * (w_ij * s_j) = x_j * w_ij,   s_j = max|x_j|^strength / max|w_j|^(1 - strength),
as a power of two, so that no bit of a product changes.   Strength 0.5: cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721);
with data and any strength: SmoothQuant (Xiao et al. 2022, arXiv:2211.10438)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qatana.batch import evaluating
from qatana.errors import ModelError
from qatana.prepare.channels import Channels, Producer


class Equalized(NamedTuple):
    """One tensor whose channels were equalized.

    producer   parameter that makes its channels        consumers  parameters that multiply them
    before, after  how far the largest channel lies above the median one (max|x_j| / median), without and with equalization"""

    producer: str
    consumers: tuple[str, ...]
    before: float
    after: float


def equalize(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    strength: float = 0.5,
    batches: int | None = 16,
    progress: Callable[[int], None] | None = None,
) -> list[Equalized]:
    """Equalize the channels of a float model in place, before `plan`; what it computes stays the same, bit for bit.

    loader    yields batches as the model takes them; labels are ignored. `batches` limits how many are used, None: all
    strength  0: weights alone get equal channels, 1: activations alone
    progress  called with the number of batches done
    Found by running the model: LayerNorm and RMSNorm before linear layers, and linear layers before linear layers, with nothing between
    them but ReLU and products of the same shape (the `up` of a gated MLP). A tensor that anything else reads too (a residual add, GELU, a
    tied table, an expert's choice of rows) stays as it is, and is not listed.
    Returns: what was equalized, in the order of the forward pass; nothing for a model that has no such tensor.
    Raises: ModelError if the model is quantized already or would compute something else (then it is as it was); DataError for an empty
    loader, NaN or infinite values; ValueError for a strength outside 0 .. 1."""
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength {strength} is not between 0 and 1")
    if getattr(model, "qatana_plan", None) is not None:
        raise ModelError(f"{type(model).__name__} is quantized already; equalize the float model, before qatana.plan")
    channels = Channels(model)
    with torch.no_grad(), evaluating(model):
        first = channels.follow_all(loader, batches, progress, "equalization")
        made = [(producer, _factors(producer, strength)) for producer in channels.found()]
        for producer, factors in made:
            _move(producer, factors)
        _check(model, *first, made)
    return [_row(producer, factors) for producer, factors in made]


def _factors(producer: Producer, strength: float) -> Tensor:
    """s, float32 [channels]: powers of two around 1; 1 for a channel that is zero in the data or in the weights."""
    x = producer.largest
    w = torch.stack([matrix.detach().float().abs().amax(1) for matrix in producer.consumers.values()]).amax(0)
    log = strength * x.log2() - (1.0 - strength) * w.log2()
    usable = log.isfinite()
    log = torch.where(usable, log - log[usable].mean(), torch.zeros_like(log))
    return torch.exp2(torch.floor(log + 0.5))


def _move(producer: Producer, factors: Tensor) -> None:
    """Divide what makes the channels by the factors, multiply what reads them."""
    for tensor in producer.makers:  # channels are their last dimension
        tensor.div_(factors.to(tensor.dtype))
    for matrix in producer.consumers.values():  # [channels, outputs]
        matrix.mul_(factors.to(matrix.dtype)[:, None])


def _check(
    model: nn.Module, args: Any, kwargs: Any, before: list[Tensor], made: list[tuple[Producer, Tensor]]
) -> None:  # fmt: skip
    """Raise ModelError, with the weights as they were, if the outputs are not those of before."""
    after = [x for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
    if len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True)):
        return
    for producer, factors in made:
        _move(producer, 1.0 / factors)
    raise ModelError(
        f"{type(model).__name__} computes something else with equalized channels, or something else in every run; its weights are as they "
        f"were. Leave equalize out, or make its forward pass deterministic"
    )


def _row(producer: Producer, factors: Tensor) -> Equalized:
    def spread(x: Tensor) -> float:
        return float(x.amax() / x.median().clamp(min=torch.finfo(torch.float32).tiny))

    x = producer.largest
    return Equalized(producer.name, tuple(producer.consumers), spread(x), spread(x / factors))
