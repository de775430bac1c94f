"""Which parameters make the channels of a tensor, and which multiply them: seen by running a model, operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from qatana.batch import check_finite, move, split_inputs
from qatana.errors import DataError

aten = torch.ops.aten
SAME = {
    aten.view, aten._unsafe_view, aten.clone, aten.detach, aten.alias, aten._to_copy, aten.relu, aten.leaky_relu,
    aten.contiguous, aten.unsqueeze, aten.squeeze,
}  # fmt: skip
"""Operators through which a factor of a channel passes: f(s * x) = s * f(x) for s > 0, channels last before and after."""
NORMS = {aten.native_layer_norm: (2, 3), aten._fused_rms_norm: (2,)}
"""Operator -> where its weight and its bias stand."""
LINEAR = {aten.mm: (None, 0, 1), aten.addmm: (0, 1, 2)}
"""Operator -> where bias, input and weight [channels, outputs] stand."""


@dataclass
class Producer:
    """What makes the channels of one tensor.

    makers     its parameters, or views of them, whose last dimension are the channels
    consumers  name -> view [channels, outputs] of a weight that multiplies the channels
    largest    max|x| of each channel over all that was run, float32
    power      sum of x^2 of each channel over all that was run, float32
    free       whether nothing else reads the channels
    others     names of further producers of the same channels, and
    joined     the one that this is one of (`Orders`)"""

    name: str
    makers: list[Tensor]
    consumers: dict[str, Tensor] = field(default_factory=dict)
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))
    power: Tensor = field(default_factory=lambda: torch.zeros(()))
    free: bool = True
    others: list[str] = field(default_factory=list)
    joined: Producer | None = None


class Channels(TorchDispatchMode):
    """Follows channels through the forward passes of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        named = {name: p for name, p in model.named_parameters()}
        self._names = {p.untyped_storage().data_ptr(): name for name, p in reversed(named.items())}
        self._whole = {name: p.numel() * p.element_size() == p.untyped_storage().nbytes() for name, p in named.items()}
        self._producers: dict[str, Producer] = {}
        self._uses: dict[str, int] = {}
        self._spoiled: set[str] = set()
        self._tags = WeakTensorKeyDictionary()

    def follow(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Run the model on one batch; returns its outputs."""
        self._uses.clear()
        with self:
            result = self._model(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in outputs:
            self._spoil(x)
        self._spoiled |= {name for name, uses in self._uses.items() if uses > 1}
        self._tags.clear()
        return outputs

    def follow_all(
        self, loader: Iterable[Any], batches: int | None, progress: Callable[[int], None] | None, what: str
    ) -> tuple[Any, Any, list[Tensor]]:
        """Run the model on some batches; returns the first one's arguments and outputs. Raises: DataError for no batch, NaN, infinity."""
        first, device = None, next(self._model.parameters()).device
        for seen, batch in enumerate(loader):
            if batches is not None and seen >= batches:
                break
            args, kwargs = split_inputs(batch, self._model)
            check_finite(kwargs or args, seen)
            args, kwargs = move((args, kwargs), device)
            outputs = self.follow(args, kwargs)
            first = (args, kwargs, outputs) if first is None else first
            if progress is not None:
                progress(seen + 1)
        if first is None:
            raise DataError(f"{what} got no batch; check the data path, the split and the batch size")
        return first

    def found(self) -> list[Producer]:
        """Those whose channels can take a factor: read by weights alone, every parameter at work in one place only."""
        return [
            p
            for p in self._producers.values()
            if p.free and p.consumers and self._spoiled.isdisjoint((p.name, *p.consumers, *map(self._name, p.makers)))
        ]

    # -- one operator ------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        if packet in LINEAR:
            self._linear(LINEAR[packet], args, tensors, result)
        elif packet in NORMS:
            self._norm([args[i] for i in NORMS[packet] if i < len(args)], tensors, result[0])
        elif packet is aten.mul and func is aten.mul.Tensor:
            self._times(tensors, result)
        elif packet in SAME and tensors[0] in self._tags:
            self._pass(tensors[0], result)
        elif not (packet in (aten.t, aten.view, aten.detach, aten.alias, aten.transpose) and self._name(tensors[0])):
            self._other(tensors)
        return result

    def _linear(self, places: tuple[int | None, int, int], args: Any, tensors: list[Tensor], result: Tensor) -> None:
        x, weight = args[places[1]], args[places[2]]
        bias = None if places[0] is None else args[places[0]]
        name, producer = self._use(weight), self._producer(x)
        known = name and self._whole[name] and (bias is None or (self._use(bias) and bias.ndim == 1))
        if not known:
            self._other(tensors)
            return
        if producer is not None:
            producer.consumers[name] = weight
            rows = x.detach().float().flatten(0, -2)
            producer.largest = torch.maximum(producer.largest, rows.abs().amax(0))
            producer.power = producer.power + rows.square().sum(0)
        self._make(name, [weight] if bias is None else [weight, bias], result)

    def _norm(self, parameters: list[Tensor | None], tensors: list[Tensor], result: Tensor) -> None:
        makers = [p for p in parameters if p is not None]
        names = [self._use(p) for p in makers]
        self._other([x for x in tensors if not any(x is p for p in makers)])
        if makers and all(names) and all(p.ndim == 1 for p in makers):
            self._make(names[0], makers, result)

    def _times(self, tensors: list[Tensor], result: Tensor) -> None:
        """A product with a vector of the model makes channels; one with a tensor of the same shape passes them on."""
        vector = next((x for x in tensors if x.ndim == 1 and self._name(x) and x.shape[-1:] == result.shape[-1:]), None)
        if vector is not None:
            self._other([x for x in tensors if x is not vector])
            self._make(self._use(vector), [vector], result)
            return
        tagged = [x for x in tensors if x in self._tags and x.shape == result.shape]
        if tagged and not any(self._name(x) for x in tensors):
            self._other([x for x in tensors if x is not tagged[-1]])
            self._pass(tagged[-1], result)
        else:
            self._other(tensors)

    # -- what is known about a tensor --------------------------------------------------------------------------------
    def _name(self, x: Tensor) -> str:
        """The parameter that a tensor is, or is a view of."""
        return self._names.get(x.untyped_storage().data_ptr(), "")

    def _producer(self, x: Tensor) -> Producer | None:
        producer = self._tags.get(x)
        while producer is not None and producer.joined is not None:
            producer = producer.joined
        return producer

    def _use(self, x: Tensor) -> str:
        name = self._name(x)
        self._uses[name] = self._uses.get(name, 0) + 1
        return name

    def _make(self, name: str, makers: list[Tensor], result: Tensor) -> None:
        self._tags[result] = self._producers.setdefault(name, Producer(name, makers))

    def _pass(self, x: Tensor, result: Tensor) -> None:
        if result.ndim and result.shape[-1] == x.shape[-1]:
            self._tags[result] = self._tags[x]
        else:
            self._spoil(x)

    def _spoil(self, x: Tensor) -> None:
        producer = self._producer(x)
        if producer is not None:
            producer.free = False

    def _other(self, tensors: list[Tensor]) -> None:
        """These are read by something through which no factor passes."""
        for x in tensors:
            self._spoil(x)
            self._spoiled |= {self._name(x)} - {""}


class Orders(Channels):
    """Follows the order of channels: a function of single elements keeps it, and one of two tensors wants the same order in both."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.pointwise not in func.tags or func.overloadpacket in SAME:
            return super().__torch_dispatch__(func, types, args, kwargs)
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor) and x.ndim]
        self._pointwise(tensors, result)
        return result

    def _norm(self, parameters: list[Tensor | None], tensors: list[Tensor], result: Tensor) -> None:
        """A norm takes its channels as they come, in one order with its weight's."""
        self._other(tensors)

    def _pointwise(self, tensors: list[Tensor], result: Any) -> None:
        """One number for all channels of a row has no order; a tensor whose order is not known keeps the others in theirs."""
        ordered = [x for x in tensors if x.shape[-1] != 1]
        producers = [p for p in map(self._producer, ordered) if p is not None]
        if len(producers) < len(ordered) or not isinstance(result, Tensor):
            self._other(tensors)
        elif producers:
            for producer in producers[1:]:
                self._join(producers[0], producer)
            self._pass(ordered[0], result)

    def found(self) -> list[Producer]:
        return [p for p in super().found() if p.joined is None]

    @staticmethod
    def _join(whole: Producer, part: Producer) -> None:
        if part is not whole:
            part.joined, whole.free = whole, whole.free and part.free
            whole.makers += part.makers
            whole.consumers |= part.consumers
            whole.others += [part.name, *part.others]
