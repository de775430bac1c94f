"""Layers with slots for quantizers, and the integer layers that conversion puts in their place."""

from qatana.nn.attention import AttentionProducts
from qatana.nn.conv import Conv
from qatana.nn.elementwise import Activation, Add, GlobalAveragePool
from qatana.nn.embedding import Embedding
from qatana.nn.experts import Experts
from qatana.nn.foreign import Foreign
from qatana.nn.gradient import quantize_gradients
from qatana.nn.linear import Linear, SwappedLinear
from qatana.nn.registry import LayerType, layer_type, register_layer

__all__ = [
    "Activation",
    "Add",
    "AttentionProducts",
    "Conv",
    "Embedding",
    "Experts",
    "Foreign",
    "GlobalAveragePool",
    "LayerType",
    "Linear",
    "SwappedLinear",
    "layer_type",
    "quantize_gradients",
    "register_layer",
]
