"""Which parameters of a model are multiplied: seen by running it, whatever its layers are called.

What the registry of layers does not know would stay float without a word; so a plan lists it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {
    aten.mm: (1, 0), aten.addmm: (2, 1), aten.bmm: (1, 0), aten.baddbmm: (2, 1), aten.mv: (0,), aten.addmv: (1,),
    aten.convolution: (1,), aten._grouped_mm: (1,), aten._trilinear: (1,),
}  # fmt: skip
"""Operator -> where its weight stands. Of two parameters the first of these places has the weight, the other is what it multiplies."""


class Products(TorchDispatchMode):
    """While it is entered, notes in `found` the parameters (two dimensions or more) that enter a matrix product or a convolution, as
    they are or as a view: name of the first module that has one -> parameter. Computed weights are no parameters, and not seen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = [(name, p) for name, p in model.named_parameters() if p.ndim > 1]
        self._by_storage = {p.untyped_storage().data_ptr(): (name, p) for name, p in reversed(named)}
        self.found: dict[str, nn.Parameter] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = (args[i] for i in PRODUCTS.get(func.overloadpacket, ()))
        entries = (self._by_storage.get(x.untyped_storage().data_ptr()) for x in operands if isinstance(x, Tensor))
        name, parameter = next((entry for entry in entries if entry is not None), (None, None))
        if name is not None and parameter is not None:
            self.found[name] = parameter
        return func(*args, **(kwargs or {}))
