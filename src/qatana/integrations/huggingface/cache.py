"""The cache of `generate()` in codes: `model.generate(ids, past_key_values=CodedCache(model))`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import qatana as qt
from qatana.errors import require

require("transformers", "hf")

from transformers.cache_utils import Cache, DynamicLayer  # noqa: E402

PRODUCTS = "attention_products"


class CodedCache(Cache):
    """Keys and values as the model's recipe quantizes them (`key="int8/token", value="int4/group32"`), each token's codes kept as they
    were when it came: attention reads the numbers that it was trained on, bit for bit. One cache for one generation.

    Layers of the model whose keys and values stay float keep them so. A layer with a sliding window keeps all tokens.
    Raises: ModelError if the model quantizes no keys and values, does it by a scale that follows from all tokens together, is an
    engine's integer model (whose attention multiplies integers: `generate` with the QAT model), or has an encoder."""

    def __init__(self, model: Any) -> None:
        found = {
            module.layer_idx: getattr(module, PRODUCTS)
            for module in model.modules()
            if hasattr(getattr(module, PRODUCTS, None), "cache") and hasattr(module, "layer_idx")
        }
        if model.config.is_encoder_decoder:
            raise qt.ModelError(
                f"{type(model).__name__} has a decoder with two attentions in a layer, which CodedCache does not hold"
            )
        quantized = [p for p in found.values() if p.key_quantizer is not None or p.value_quantizer is not None]
        if not quantized:
            raise qt.ModelError(
                f"{type(model).__name__} has no attention that reads quantized keys and values: give its recipe rules for them "
                f"(key='int8/token', value='int8/token') and, for a target other than 'torch', generate with the QAT model"
            )
        count = max(found) + 1
        super().__init__(layers=[CodedLayer(*found[i].cache()) if i in found else DynamicLayer() for i in range(count)])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, CodedLayer))


class CodedLayer(DynamicLayer):
    """Keys and values of one layer of the model: what transformers does to its tensors is done to the codes."""

    def __init__(self, keys: Any, values: Any) -> None:
        super().__init__()
        self._states = (keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        keys, values = self._states
        return keys.append(key_states), values.append(value_states)

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for states in self._states)

    def get_seq_length(self) -> int:
        return self._states[0].length

    def offload(self) -> None:
        self._change(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda part: part.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        for states in self._states:
            states.parts = []

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._change(lambda part: part[..., : -abs(tokens_to_remove), :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda part: part[indices, ...])

    def _change(self, how: Callable[[Tensor], Tensor]) -> None:
        for states in self._states:
            states.change(how)
