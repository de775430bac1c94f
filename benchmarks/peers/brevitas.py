"""Brevitas: `layerwise_quantize` with its default layers, int8 weights and inputs, calibrated as its examples do."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prepare(model: nn.Module, batch: Any, head: str, kind: str) -> tuple[nn.Module, str]:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import layerwise_quantize

    model = layerwise_quantize(model, name_blacklist=[head])
    with torch.no_grad(), calibration_mode(model):
        model(**batch) if isinstance(batch, dict) else model(batch)
    return model, "layerwise_quantize: inputs with a learned range"
