"""NNCF: `nncf.quantize` on a calibration data set, then training (docs, "Training-time compression, Quantization-aware training")."""

from __future__ import annotations

import os
from typing import Any

from torch import nn


def prepare(model: nn.Module, batch: Any, head: str, kind: str) -> tuple[nn.Module, str]:
    os.environ.setdefault(
        "NNCF_EXTENSION_LOAD_TIMEOUT", "0"
    )  # its C++ kernels are compiled at the first use, which takes minutes
    import nncf

    found = nncf.quantize(
        model,
        nncf.Dataset([batch]),
        model_type=None if kind == "resnet" else nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(patterns=[f".*{head}.*"]),
        subset_size=1,
    )
    return found, "nncf.quantize"
