"""LoRA inside the quantizer: adapters of PEFT that train the integers which ship.

    y = x_hat Q(W + scaling B A)^T + b            training: B and A get the gradient of what is rounded
    W <- W + scaling B A                          merging: the same sum, so the same codes

PEFT's own LoRA layer adds B A x beside the quantized layer: merging then rounds a weight that was never trained rounded."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import qatana as qt
from qatana.errors import require


def add_lora(model: Any, config: Any, adapter_name: str = "default") -> Any:
    """PEFT's `get_peft_model` for a QAT model: a PeftModel whose adapters lie inside the quantizers of the targeted linear layers.

    config   a `peft.LoraConfig`; targeted layers that stay float get PEFT's own LoRA. Learned scales of the model are not trained
    Merged (`merge_and_unload()`) it is the QAT model again, with identical codes; `integer_model` takes that.
    Raises: ModelError for a model that is not calibrated or an integer model; RecipeError for LoRA variants that have no B A to add to a
    weight, and for dropout, which has no place inside one."""
    peft: Any = require("peft", "hf")
    found = qt.quantizers(model)
    layers = {type(m) for m in model.modules() if hasattr(m, "in_features") and hasattr(m, "weight_quantizer")}
    if not layers:
        raise qt.ModelError("the model has no quantized linear layer that trains; load it with trainable=True")
    waiting = next((name for name, quantizer in found.items() if not bool(quantizer.calibrated)), None)
    if waiting is not None:
        raise qt.ModelError(f"{waiting}: not calibrated; run qatana.calibrate(model, loader) before the adapters come")
    if config.lora_dropout:
        raise qt.RecipeError(
            f"lora_dropout={config.lora_dropout} drops inputs of the adapter, which is part of the weight here: 0"
        )
    config._register_custom_module(dict.fromkeys(layers, _layer_class()))
    # PEFT knows the sizes of layers by the name of their class, and asks those whose name it does not know.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type '<class 'qatana", UserWarning)
        return peft.get_peft_model(model, config, adapter_name=adapter_name)


def _layer_class() -> type[nn.Module]:
    layer: Any = require("peft.tuners.lora", "hf")

    class QuantizedLora(layer.Linear):
        """A quantized linear layer whose weight is W + the sum of its active adapters."""

        def __init__(self, base_layer: Any, adapter_name: str, **kwargs: Any) -> None:
            super().__init__(base_layer, adapter_name, **kwargs)
            self.fan_in_fan_out = base_layer.swapped  # whose weight is (K, N)
            if self.lora_variant or any(self.lora_bias.values()):
                raise qt.RecipeError("LoRA inside a quantizer is W + B A: no DoRA or other variant, no lora_bias")

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            self._check_forward_args(x, *args, **kwargs)
            if self.disable_adapters and self.merged:
                self.unmerge()
            active = [name for name in self.active_adapters if name in self.lora_A]
            base = self.get_base_layer()
            if self.disable_adapters or self.merged or not active:
                return base(x)
            with torch.autocast(x.device.type, enabled=False):  # as merging adds them
                weight = base.weight
                for name in active:
                    weight = weight + self.get_delta_weight(name).to(weight.dtype)
            return functional_call(base, {"weight": weight}, (x,))

    return QuantizedLora
