"""Layers with slots for quantizers, and the integer layers that conversion puts in their place."""

from qatana.nn.attention import AttentionProducts
from qatana.nn.conv import Conv
from qatana.nn.elementwise import Activation, Add, GlobalAveragePool
from qatana.nn.embedding import Embedding
from qatana.nn.gradient import quantize_gradients
from qatana.nn.linear import Linear

__all__ = [
    "Activation",
    "Add",
    "AttentionProducts",
    "Conv",
    "Embedding",
    "GlobalAveragePool",
    "Linear",
    "quantize_gradients",
]
