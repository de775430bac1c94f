"""Model Optimizer: `mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop)`, then training (docs, "Quantization-Aware Training")."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


def prepare(model: nn.Module, batch: Any, head: str, kind: str) -> tuple[nn.Module, str]:
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    config["quant_cfg"].append({"quantizer_name": f"*{head}*", "enable": False})
    mtq.quantize(model, config, lambda model: model(**batch) if isinstance(batch, dict) else model(batch))
    return model, "INT8_DEFAULT_CFG"
