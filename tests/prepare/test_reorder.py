"""Channels in another order: the float model computes the same, and weights in groups lose less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import qatana as qt

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def ids(batches: int = 2) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 100, (2, 16))} for _ in range(batches)]


def uneven(weight: Tensor) -> None:
    """Columns of two sizes, in turn."""
    with torch.no_grad():
        weight[:, ::2] *= 10.0


def llama() -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval()
    for layer in model.model.layers:
        uneven(layer.mlp.down_proj.weight)
    return model


def mlp(function: nn.Module) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), function, nn.Linear(64, 8)).eval()
    uneven(model[3].weight)
    return model


def test_a_llama_computes_the_same() -> None:
    model, batches = llama(), ids()
    before = [model(**batch).logits for batch in batches]
    gates = [layer.mlp.gate_proj.weight.detach().clone() for layer in model.model.layers]
    rows = qt.reorder(model, batches)
    # float32: sums of 96 products in another order
    for batch, expected in zip(batches, before, strict=True):
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    mlps = [f"model.layers.{i}.mlp." for i in range(2)]
    assert [(set(row.producers), row.consumers) for row in rows] == [
        ({f"{name}gate_proj.weight", f"{name}up_proj.weight"}, (f"{name}down_proj.weight",)) for name in mlps
    ]
    for layer, gate in zip(model.model.layers, gates, strict=True):
        assert not torch.equal(layer.mlp.gate_proj.weight, gate)
        assert torch.equal(layer.mlp.gate_proj.weight.sort(0).values, gate.sort(0).values)
        assert torch.equal(layer.mlp.down_proj.weight.abs().mean(0).argsort()[:48].sort().values, torch.arange(48))


@pytest.mark.parametrize("function", [nn.GELU(), nn.SiLU(), nn.ReLU(), nn.Tanh()])
def test_weights_in_groups_lose_less(function: nn.Module) -> None:
    """Half of the columns are ten times the others, in turn. Sorted, the groups of 32 are of one size each: the small half's error falls to
    a hundredth of what it was, that of all to half and a little. Biases go along."""
    model, x = mlp(function), torch.randn(256, 16)
    truth = model(x).detach()

    def error(network: nn.Module) -> float:
        recipe = qt.recipe("torch").rule(match="3", weight="int4/group32 sym")
        return float((qt.ptq(copy.deepcopy(network), recipe, [x])(x) - truth).square().mean().detach())

    plain = error(model)
    (row,) = qt.reorder(model, [x])
    torch.testing.assert_close(model(x), truth, rtol=1e-5, atol=1e-6)  # float32: sums in another order
    assert row.producers == ("1.weight",)
    assert row.consumers == ("3.weight",)
    assert row.error == pytest.approx(0.505, abs=0.1)  # (1 + 0.01) / 2, up to where the largest weights lie
    assert error(model) < 0.8 * plain


def test_gpt2_whose_weights_lie_transposed() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100, bos_token_id=None, eos_token_id=None)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[::2] *= 10.0
        model.transformer.h[0].mlp.c_fc.bias.normal_()
    batches = ids()
    expected = model(**batches[0]).logits
    (row,) = qt.reorder(model, batches)
    assert row.producers == ("transformer.h.0.mlp.c_fc.weight",)
    torch.testing.assert_close(model(**batches[0]).logits, expected, rtol=1e-5, atol=1e-6)  # float32


class Odd(nn.Module):
    """Two linear layers with something between them that wants its channels where they are."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.between, self.first, self.second = between, nn.Linear(8, 64), nn.Linear(64, 8, bias=False)
        self.norm, self.register = nn.LayerNorm(64), nn.Parameter(torch.randn(64))
        uneven(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        changed = {
            "norm": lambda: self.norm(y),
            "softmax": lambda: y.softmax(-1),
            "vector": lambda: y * self.register,
            "constant": lambda: y + torch.arange(64.0),
            "mask": lambda: torch.where(torch.arange(64) < 32, y, 0.0),
            "heads": lambda: y.view(-1, 2, 32).transpose(1, 2).reshape(-1, 64),
            "part": lambda: F.pad(y[..., :32], (0, 32)),
            "twice": lambda: self.first(y[..., :8].relu()),
            "half": lambda: torch.cat([y[..., :32] * y[..., 32:].sigmoid()] * 2, -1),
        }
        return self.second(changed[self.between]())


@pytest.mark.parametrize("between", ["norm", "softmax", "vector", "constant", "mask", "heads", "part", "twice", "half"])
def test_what_wants_its_channels_in_place_keeps_them(between: str) -> None:
    torch.manual_seed(0)
    model, x = Odd(between), torch.randn(5, 8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert qt.reorder(model, [x]) == []
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_that_computes_something_else_is_as_it_was() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(5, 16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model[2].register_forward_hook(lambda module, args, result: result + torch.rand(()))  # another in every run
    with pytest.raises(qt.ModelError, match="something else in every run; its weights are as they were"):
        qt.reorder(model, [x])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_channels_of_one_size_and_short_ones_keep_their_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(8, 1).expand(8, 64))
    rows = qt.reorder(model, [torch.randn(5, 8)])
    assert rows == []
    assert qt.reorder(mlp(nn.ReLU()), [torch.randn(5, 16)], group=64) == []


def test_errors_name_cause_and_remedy() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(5, 16)
    with pytest.raises(ValueError, match="group 1 is below 2"):
        qt.reorder(model, [x], group=1)
    with pytest.raises(qt.DataError, match="reordering got no batch"):
        qt.reorder(model, [])
    with pytest.raises(qt.DataError):
        qt.reorder(model, [torch.full((2, 16), float("nan"))])
    with pytest.raises(qt.ModelError, match="quantized already; reorder the float model"):
        qt.reorder(qt.prepare(model, qt.plan(model, "torch", x)), [x])
