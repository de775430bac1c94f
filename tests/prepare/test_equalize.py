"""Equalization moves outlier channels from activations into weights, and the float model computes the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForTokenClassification,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
)

import qatana as qt

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 100, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ONE: dict[str, Any] = SMALL | {"num_hidden_layers": 1}


def ids(batches: int = 2) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(0, 100, (2, 16))} for _ in range(batches)]


def llama() -> Any:
    """A tiny Llama with some channels of its norms far above the others, as large ones have."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("layernorm.weight"):
                p[:3] *= 60.0
    return model.eval()


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def mlp() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def pairs(model: nn.Module, batches: list[Any]) -> dict[str, tuple[str, ...]]:
    return {row.producer: row.consumers for row in qt.equalize(model, batches)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_llama_computes_the_same_bits_and_its_outliers_are_gone(dtype: torch.dtype) -> None:
    model, batches = llama().to(dtype), ids()
    before = [logits(model, batch) for batch in batches]
    rows = qt.equalize(model, batches)
    assert all(torch.equal(a, logits(model, batch)) for a, batch in zip(before, batches, strict=True))
    layer = "model.layers.0."
    assert [(row.producer, row.consumers) for row in rows[:3]] == [
        (f"{layer}input_layernorm.weight", tuple(f"{layer}self_attn.{x}_proj.weight" for x in "qkv")),
        (f"{layer}post_attention_layernorm.weight", tuple(f"{layer}mlp.{x}_proj.weight" for x in ("gate", "up"))),
        (f"{layer}mlp.up_proj.weight", (f"{layer}mlp.down_proj.weight",)),
    ]
    assert len(rows) == 6, "the last norm feeds a table that is tied to the embedding"
    # strength 0.5 takes a channel 60 times too large to sqrt(60) times, up to the power of two: a factor of sqrt(2) each way
    assert all(row.before > 40 and row.after < 60**0.5 * 2 for row in rows if "norm" in row.producer)


def test_quantized_inputs_lose_less() -> None:
    """Three channels of 64 lie 60 times above the others. With a = (60 / 127)^2 / 12 for a step of the input, the inputs' error falls from
    64 a to (61 + 3 * 60) a / 60 = 4 a; that of the weights, a seventh of it before, stays within a factor of 2: a third is left at most."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 32)).eval()
    x = torch.randn(256, 64)
    with torch.no_grad():
        model[0].weight[:3] = 60.0
    truth = model(x).detach()

    def error(network: nn.Module) -> float:
        recipe = qt.recipe("torch", weight="int8/channel", input="int8/token")
        return float((qt.ptq(network, recipe, [x])(x) - truth).square().mean().detach())

    equal = copy.deepcopy(model)
    qt.equalize(equal, [x])
    assert error(equal) < error(model) / 3


def test_layer_norm_with_bias_and_relu() -> None:
    model = mlp()
    x = torch.randn(5, 8)
    before = model(x)
    assert pairs(model, [x]) == {"0.weight": ("1.weight",), "1.weight": ("3.weight",)}
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("strength", "who"), [(0.0, "weights"), (1.0, "activations")])
def test_strength_says_who_gets_equal_channels(strength: float, who: str) -> None:
    """At 1 the channels of the activations end within a factor of sqrt(2) of each other, each way; at 0 the columns of the weights do."""
    model, x = mlp(), torch.randn(64, 8)
    qt.equalize(model, [x], strength=strength)
    found = {"weights": model[1].weight.abs().amax(0), "activations": model[0](x).abs().amax(0)}[who]
    rounding = 1 + 1e-6  # of the quotient in float32
    assert float(found.detach().amax() / found.detach().amin()) <= 2.0 * rounding


def test_dead_channels_stay() -> None:
    model, x = mlp(), torch.randn(5, 8)
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 0.0
        model[1].weight[:, 5] = 0.0
    before = model(x)
    qt.equalize(model, [x])
    assert torch.equal(model(x), before)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=100, bos_token_id=None, eos_token_id=None), {"ln_1", "ln_2"}),
        (GemmaConfig(head_dim=8, **ONE), {"up_proj"}),  # its norms multiply by 1 + weight
        (MixtralConfig(**ONE), {"input_layernorm"}),  # experts take rows of the other norm
    ],
)  # fmt: skip
def test_families(config: Any, expected: set[str]) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = logits(model, ids()[0])
    assert {name.split(".")[-2] for name in pairs(model, ids())} == expected
    assert torch.equal(logits(model, ids()[0]), before)


def test_a_norm_that_a_residual_reads_is_left_alone() -> None:
    """BERT adds what its norms put out to the next layer's output."""
    torch.manual_seed(0)
    config = BertConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "tie_word_embeddings")})
    assert set(pairs(BertForTokenClassification(config), ids())) == {"bert.encoder.layer.1.output.LayerNorm.weight"}


class Twice(nn.Module):
    """One linear layer at work in two places, a tensor that is returned, a slice, a softmax: none may change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.shared, self.returned = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.sliced, self.bent, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shared(self.shared(self.norm(x)))
        kept = self.returned(x)
        part = self.sliced(kept)
        x = F.linear(part[..., :4], self.last.weight[:, :4]) + F.softmax(self.bent(part), -1)
        return x, kept


def test_what_something_else_reads_stays() -> None:
    torch.manual_seed(0)
    assert pairs(Twice(), [torch.randn(3, 8)]) == {}


def test_a_later_batch_that_takes_another_way_is_seen() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.b(y) + (y if len(x) > 2 else 0)

    assert pairs(Fork(), [torch.randn(2, 4)]) == {"a.weight": ("b.weight",)}
    assert pairs(Fork(), [torch.randn(2, 4), torch.randn(3, 4)]) == {}


def test_a_model_that_is_not_the_same_afterwards_is_put_back() -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + torch.rand(())

    model = Random()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(qt.ModelError, match="make its forward pass deterministic"):
        qt.equalize(model, [torch.randn(2, 4)])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wrong_use() -> None:
    model, batches = llama(), ids()
    with pytest.raises(ValueError, match=r"strength 1\.5"):
        qt.equalize(model, batches, strength=1.5)
    with pytest.raises(qt.DataError, match="no batch"):
        qt.equalize(model, [])
    with pytest.raises(qt.DataError, match="NaN"):
        qt.equalize(mlp(), [torch.full((2, 8), float("nan"))])
    with pytest.raises(qt.ModelError, match="quantized already; equalize the float model"):
        qt.equalize(qt.prepare(model, qt.plan(model, "torch", batches[0])), batches)
