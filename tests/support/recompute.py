"""Bytes that autograd keeps for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Each storage once; parameters, buffers and the inputs left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *inputs)}
    kept: dict[int, Tensor] = {}  # tensors are held, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = model(*inputs)
    del out
    return sum(x.untyped_storage().nbytes() for x in kept.values())
