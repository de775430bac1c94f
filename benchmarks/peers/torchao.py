"""torchao: `quantize_` with QATConfig for Linears (docs/source/workflows/qat.md), `prepare_qat_pt2e` where there are convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def prepare(model: nn.Module, batch: Any, head: str, kind: str) -> tuple[nn.Module, str]:
    return _convolutions(model, batch) if kind == "resnet" else _linears(model, head)


def _linears(model: nn.Module, head: str) -> tuple[nn.Module, str]:
    from torchao.quantization import quantize_
    from torchao.quantization.granularity import PerAxis, PerToken
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    inputs = IntxFakeQuantizeConfig(torch.int8, granularity=PerToken(), is_symmetric=False)
    weight = IntxFakeQuantizeConfig(torch.int8, granularity=PerAxis(0), is_symmetric=True)
    config = QATConfig(activation_config=inputs, weight_config=weight, step="prepare")
    quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and name != head)
    return model, "Linears: inputs per token at run time, weights per channel"


def _convolutions(model: nn.Module, batch: Any) -> tuple[nn.Module, str]:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    exported = torch.export.export(model, (batch,)).module()
    quantizer = X86InductorQuantizer()
    quantizer.set_global(get_default_x86_inductor_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(prepared)
    prepared.train = lambda mode=True: prepared  # an exported model refuses train(), which it has been moved to
    return prepared, "PT2E, X86InductorQuantizer: static inputs, weights per channel"
