"""gptq: round the weights of a calibrated model so that outputs change least, before training or instead of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qatana.batch import check_finite, evaluating, move, split_inputs
from qatana.errors import DataError, ModelError
from qatana.nn import Embedding, Linear
from qatana.numerics.compensated import compensated, unrounded
from qatana.quantizer import Quantizer, quantizers

MEMORY = 2**31
"""Bytes of sums X X^T that are kept at a time; layers beyond it take another pass over the batches."""


TABLE = 0.1
"""Least damping of an output layer whose weight is the table of an embedding too: looked up, a row is to be near itself in every direction.
SmolLM2 in 4 bits, times the float perplexity: 1.26 with the table rounded to nearest; 1.19, 1.17 and 1.19 with damping 0.01, 0.1 and 1."""


class Compensated(NamedTuple):
    """One layer's weight.   before, after: |(W - W_hat) X|^2 / |W X|^2 by plain rounding, and by GPTQ"""

    layer: str
    before: float
    after: float


def gptq(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    batches: int | None = 16,
    damping: float = 0.01,
    sweeps: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> list[Compensated]:
    """Give the weights of linear layers the codes with which what the layers put out on these batches changes least.

    For a model that `calibrate` has settled; its scales stay as they are. Inputs are those that the layers multiply: quantized, of a model
    whose weights are float. The weights themselves change, so that training and `convert` start from there: each becomes the number that
    would be best while all others have their codes, of which its code is the nearest. So a training changes first what costs least.

    loader    yields batches as the model takes them; labels are ignored. `batches` limits how many are used, None: all
    damping   share of the mean of X X^T's diagonal that is added to it; TABLE at least where the weight is an embedding's too
    sweeps    rounds of coordinate descent after GPTQ: each column again takes the codes that are best while all others stay. 0: GPTQ alone
    progress  called with (done, all) passes of batches and layers
    Left as they are: layers other than linear ones, weights that two linear layers share, schemes that are no plain integer grid with a
    scale that is held or learned, and layers that get no input.
    Returns: the layers, in order of their names in the model.
    Raises: ModelError before calibration, or if no layer is of that kind; DataError for an empty loader, NaN or infinite values;
    ValueError for a damping that is not above 0, or sweeps below 0."""
    layers, tables = _layers(model)
    if not layers:
        raise ModelError(
            "gptq needs linear layers whose weights have an integer scheme with a static or learned scale; the model has none"
        )
    if not 0 < damping < float("inf"):
        raise ValueError(f"damping {damping} is not above 0: without it X X^T may have no inverse")
    if sweeps < 0:
        raise ValueError(f"sweeps {sweeps} is below 0; 0 is GPTQ alone")
    for layer in layers.values():
        assert layer.weight_quantizer is not None
        layer.weight_quantizer.weight_parameters(layer.matrix)  # raises before calibration, and before batches are run
    held = list(itertools.islice(loader, batches))
    if not held:
        raise DataError("gptq got no batch; check the data path, the split and the batch size")
    for i, batch in enumerate(held):
        args, kwargs = split_inputs(batch, model)
        check_finite(kwargs or args, i)
    parts = list(_parts(layers))
    total, found, done = len(parts) * len(held) + len(layers), [], 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for part in parts:
        sums = _sums(model, part, held, tick)
        for name, layer in part.items():
            tick()
            if name in sums and float(sums[name].diagonal().sum()) > 0:
                damped = max(damping, TABLE) if name in tables else damping
                found.append(_compensate(name, layer, sums.pop(name), damped, sweeps))
    return found


def _layers(model: nn.Module) -> tuple[dict[str, Linear], set[str]]:
    """The layers that can be rounded this way, and the names of those whose weights are the tables of embeddings too."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            users.setdefault(id(p), []).append(module)
    layers, tables = {}, set()
    for name, module in model.named_modules():
        if not isinstance(module, Linear) or not _fits(module.weight_quantizer):
            continue
        others = [user for user in users[id(module.weight)] if user is not module]
        if all(isinstance(user, Embedding) and user.weight_quantizer is module.weight_quantizer for user in others):
            layers[name] = module
            tables |= {name} if others else set()
    return layers, tables


def _fits(quantizer: Any) -> bool:
    if not isinstance(quantizer, Quantizer):
        return False
    scheme = quantizer.scheme
    return scheme.is_integer and scheme.scale in ("static", "learned") and not scheme.integer_grid.rule


def _parts(layers: dict[str, Linear]) -> Iterator[dict[str, Linear]]:
    """Layers whose sums fit into memory together, at least one."""
    part, size = {}, 0
    for name, layer in layers.items():
        need = 4 * layer.in_features**2
        if part and size + need > MEMORY:
            yield part
            part, size = {}, 0
        part[name], size = layer, size + need
    yield part


@contextmanager
def _float_weights(model: nn.Module) -> Iterator[None]:
    """Weights' quantizers are off."""
    on = [q for q in quantizers(model).values() if q.is_weight and q.enabled]
    for quantizer in on:
        quantizer.enabled = False
    try:
        yield
    finally:
        for quantizer in on:
            quantizer.enabled = True


def _sums(
    model: nn.Module, layers: dict[str, Linear], held: list[Any], tick: Callable[[], None]
) -> dict[str, Tensor]:  # fmt: skip
    """X X^T (K, K) of each layer, float32."""
    found, device = {}, next(model.parameters()).device

    def listen(name: str) -> Callable[..., None]:
        def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            quantizer = layer.input_quantizer
            x = x if quantizer is None or not quantizer.enabled else quantizer(x)
            x = x.reshape(-1, layer.in_features).float()
            h = found.setdefault(name, torch.zeros(2 * (layer.in_features,), device=x.device))
            h.addmm_(x.t(), x)

        return hook

    handles = [layer.register_forward_pre_hook(listen(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(model), _float_weights(model):
            for batch in held:
                args, kwargs = move(split_inputs(batch, model), device)
                model(*args, **kwargs)
                tick()
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _compensate(name: str, layer: Linear, h: Tensor, damping: float, sweeps: int) -> Compensated:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    w = layer.matrix.detach().float().clone()
    plain = quantizer(w)
    parameters = quantizer.weight_parameters(w)
    best = compensated(w, quantizer.scheme, *parameters, h, damping, sweeps)
    start = unrounded(w, best, quantizer.scheme, *parameters, h, damping)
    layer.weight.copy_(start.t() if layer.swapped else start)

    def size(x: Tensor) -> float:
        return float(((x @ h) * x).sum())

    whole = size(w) or 1.0  # weights that are all 0 stay 0, and lose nothing
    return Compensated(name, size(w - plain) / whole, size(w - best) / whole)
