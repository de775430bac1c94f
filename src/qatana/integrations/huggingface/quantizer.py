"""The HfQuantizer of QatanaConfig: what transformers calls while it loads, saves and trains a model."""

from __future__ import annotations

import copy
from typing import Any

import torch

import qatana as qt
from qatana.errors import require
from qatana.integrations.huggingface.config import METHOD, QatanaConfig
from qatana.integrations.huggingface.loading import lay_out, loaded, quantize

require("transformers", "hf")

from transformers.quantizers.auto import register_quantizer  # noqa: E402
from transformers.quantizers.base import HfQuantizer  # noqa: E402

STORED = ("scale", "offset")


class QatanaHfQuantizer(HfQuantizer):
    """Float checkpoint: the model is quantized when its weights are there. Checkpoint of a quantized model: the model gets its
    quantized layers first, on the meta device, and the data go into them as they are."""

    def __init__(self, quantization_config: QatanaConfig, **kwargs: Any) -> None:
        config = copy.deepcopy(quantization_config)  # the plan is this model's, not every model's
        super().__init__(config, **kwargs)
        self.quantization_config: QatanaConfig = config

    # -- loading ---------------------------------------------------------------------------------------------------
    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            lay_out(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            loaded(model, self.quantization_config)
        else:
            quantize(model, self.quantization_config)
            self.pre_quantized = True
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether the checkpoint decides a tensor's shape: one scale for all where all are equal."""
        path, _, leaf = param_name.rpartition(".")
        return leaf in STORED and "codes" in model.get_submodule(path)._buffers

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Scales stay in the type in which the file has them, which holds them exactly."""
        names = [str(name).split(".")[-2:] for name in getattr(converter, "target_patterns", ())]
        stored = any(
            path in ("weight", "stored") and leaf in STORED for path, leaf in (n for n in names if len(n) == 2)
        )
        return None if stored else super().get_new_dtype(converter, param, dtype)

    # -- what it can -----------------------------------------------------------------------------------------------
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return self.quantization_config.trainable

    @property
    def is_qat_trainable(self) -> bool:
        return self.quantization_config.trainable

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        qt.dequantize(model)
        if "_tied_weights_keys" in model.__dict__:
            del model._tied_weights_keys
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model.to(dtype).requires_grad_(True)


register_quantizer(METHOD)(QatanaHfQuantizer)
