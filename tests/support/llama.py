"""A Llama small enough to quantize and save in every test, and large enough for two groups of 128."""

from __future__ import annotations

import torch
from torch import Tensor


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 1):
    """hidden 256, feed-forward 384, vocabulary 96; random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits (NaN, signs of zero)."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(raw(ours[name]), raw(tensor)), name


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)
