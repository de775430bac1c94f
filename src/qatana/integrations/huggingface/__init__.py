"""Hugging Face: `QatanaConfig` for `from_pretrained`, a callback and a distillation loss for the `Trainer`.

from qatana.integrations.huggingface import QatanaCallback, QatanaConfig, integer_model

model = AutoModelForCausalLM.from_pretrained(name, quantization_config=QatanaConfig({"target": "torch", ...}))
Trainer(model, args, callbacks=[QatanaCallback()], ...).train()
integer_model(model).save_pretrained("integers")                        # from_pretrained("integers") loads it

Importing this package registers the method "qatana" with transformers."""

from qatana.integrations.huggingface.cache import CodedCache
from qatana.integrations.huggingface.callback import Distillation, QatanaCallback
from qatana.integrations.huggingface.config import QatanaConfig
from qatana.integrations.huggingface.example import example_inputs
from qatana.integrations.huggingface.lora import add_lora
from qatana.integrations.huggingface.models import attach, integer_model
from qatana.integrations.huggingface.quantizer import QatanaHfQuantizer

__all__ = [
    "CodedCache",
    "Distillation",
    "QatanaCallback",
    "QatanaConfig",
    "QatanaHfQuantizer",
    "add_lora",
    "attach",
    "example_inputs",
    "integer_model",
]
