"""Weight scales as layers see their weights: what calibration and the end of a float phase both set."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qatana.quantizer import Quantizer


@torch.no_grad()
def settle_weights(model: nn.Module) -> None:
    """Set the scale of every `weight_quantizer` from its layer's weight, folded where the layer folds a norm into it."""
    for module in model.modules():
        layer: Any = module
        quantizer = getattr(layer, "weight_quantizer", None)
        if isinstance(quantizer, Quantizer):
            quantizer.settle(layer.folded()[0] if hasattr(layer, "folded") else layer.weight)
