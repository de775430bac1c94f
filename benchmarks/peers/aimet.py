"""AIMET: `QuantizationSimModel` on a dummy input, `compute_encodings`, training of `sim.model` (docs, "Quantization-aware training")."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prepare(model: nn.Module, batch: Any, head: str, kind: str) -> tuple[nn.Module, str]:
    from aimet_torch import QuantizationSimModel

    inputs = tuple(batch.values()) if isinstance(batch, dict) else batch
    sim = QuantizationSimModel(model, inputs, default_output_bw=8, default_param_bw=8)
    sim.exclude_layers_from_quantization([sim.model.get_submodule(head)])

    def calibrate(model: nn.Module) -> None:
        with torch.no_grad():
            model(**batch) if isinstance(batch, dict) else model(batch)

    sim.compute_encodings(calibrate)
    return sim.model, "QuantizationSimModel, its default configuration; ranges are trained"
