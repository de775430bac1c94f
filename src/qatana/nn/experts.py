"""The experts of a mixture as transformers holds them: two 3-D parameters, multiplied expert by expert.

    h = gate(x W_up[e]^T + b_up[e]),   y = h W_down[e]^T + b_down[e],   out = sum over the chosen experts e of  p[e] y

Both products have slots: the tokens and what the gate returns are quantized like the inputs of linear layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qatana.nn.foreign import Foreign
from qatana.numerics.grouped import grouped_linear

FACTS = ("has_gate", "has_bias", "is_transposed", "num_experts")
"""What transformers' `use_experts_implementation` sets on a module of experts."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the form that transformers' experts functions share."""
    return all(hasattr(module, fact) for fact in FACTS) and "down_proj" in module._parameters


class Experts(Foreign):
    """tokens (T, H), index (T, k) int64, probabilities (T, k) -> (T, H)."""

    def __init__(self, source: Any) -> None:
        layout = "expert in out" if source.is_transposed else "expert out in"
        self.up = "gate_up_proj" if source.has_gate else "up_proj"
        super().__init__(source, {self.up: layout, "down_proj": layout})

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        source: Any = self._source[0]
        tokens, chosen = top_k_index.shape
        index = top_k_index.reshape(-1)
        x = self.input_of(self.up, hidden_states).repeat_interleave(chosen, dim=0)
        up = self._product(self.up, x, index)
        hidden = source._apply_gate(up) if source.has_gate else source.act_fn(up)
        out = self._product("down_proj", self.input_of("down_proj", hidden), index)
        if getattr(source, "has_post_expert_norm", False):
            out = source.post_expert_norm(out)
        out = out.view(tokens, chosen, -1) * top_k_weights.unsqueeze(-1)
        return out.sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        source: Any = self._source[0]
        weight = self.weight_of(name)
        y = grouped_linear(x, weight.transpose(1, 2) if source.is_transposed else weight, index)
        bias = self._parameters.get(f"{name}_bias") if source.has_bias else None
        return y if bias is None else y + bias[index.clamp(max=len(bias) - 1)]
