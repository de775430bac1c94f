"""quanto: `quantize`, `Calibration`, then training without `freeze` (README, "Quantization workflow for vanilla PyTorch models")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def prepare(model: nn.Module, batch: Any, head: str, kind: str) -> tuple[nn.Module, str]:
    from optimum.quanto import Calibration, QModuleMixin, qint8, quantize

    quantize(model, weights=qint8, activations=qint8, exclude=head)
    with Calibration(), torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for module in model.modules():
        if isinstance(module, QModuleMixin):
            module.register_forward_hook(_contiguous)
    return model, "gradients made contiguous by a hook: its backward pass takes views of them"


def _contiguous(module: nn.Module, inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor) and output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
