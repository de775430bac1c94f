"""Layers that are not ours: weights quantized as matrices with one row per output, forwards their own, state under the float names."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

import qatana as qt
from qatana.errors import ModelError, RecipeError, SchemeError
from qatana.nn import Foreign, layer_type
from qatana.nn.foreign import LAYOUTS, from_matrix, to_matrix
from qatana.numerics import fake_quantize_by
from qatana.numerics.grouped import grouped_linear

WEIGHT = "int4/channel sym dynamic"


def quantized(model: nn.Module, x: Any, **schemes: Any) -> nn.Module:
    return qt.ptq(model.eval(), qt.recipe("torch", weight=WEIGHT, **schemes), [x])


def by_rows(matrix: Tensor) -> Tensor:
    return fake_quantize_by(matrix.detach().contiguous(), qt.scheme(WEIGHT))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_undone(layout: str) -> None:
    weight = torch.arange(24.0).view(2, 3, 4)
    matrix = to_matrix(weight, layout)
    assert torch.equal(from_matrix(matrix, layout, tuple(weight.shape)), weight)
    outputs = {"out in": 2, "in out": 3, "expert out in": 2 * 3, "expert in out": 2 * 4}
    assert len(matrix) == outputs[layout]


LAYERS = {
    "conv1d_of_gpt2": (lambda: Conv1D(8, 16), (3, 5, 16), lambda w: by_rows(w.t()).t()),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4), by_rows),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9), lambda w: by_rows(w.transpose(0, 1)).transpose(0, 1)),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5), lambda w: by_rows(w.transpose(0, 1)).transpose(0, 1)),
    "circular": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 9), by_rows),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_runs_its_own_forward_on_the_quantized_weight(name: str) -> None:
    torch.manual_seed(0)
    make, shape, expected = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    reference = copy.deepcopy(layer)
    reference.weight = nn.Parameter(
        expected(reference.weight)
    )  # in the memory order of codes, which last bits depend on
    model = quantized(nn.Sequential(layer), x)
    assert isinstance(model[0], Foreign)
    assert {"0.weight", "0.bias"} <= set(model.state_dict())
    assert model[0].weight is layer.weight
    with torch.no_grad():
        assert torch.equal(model(x), reference(x))
        assert torch.equal(qt.convert(model)(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    model.train()(x).square().mean().backward()
    assert bool(model[0].weight.grad.any())


def test_weight_normalization_is_quantized_as_computed() -> None:
    torch.manual_seed(0)
    layer, x = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3), dim=2), torch.randn(2, 4, 9)
    with torch.no_grad():
        expected = F.conv1d(x, by_rows(layer.weight), layer.bias)
    names = set(layer.state_dict())
    model = quantized(nn.Sequential(layer), x)
    assert names <= {name.removeprefix("0.") for name in model.state_dict()}
    assert torch.equal(model(x), expected)
    assert torch.equal(qt.convert(model)(x), expected)
    model.train()(x).square().mean().backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in model.parameters()) == 3


def test_attention_of_torch() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 16)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for weight in (reference.attention.in_proj_weight, reference.attention.out_proj.weight):
            weight.copy_(by_rows(weight))
    model = quantized(model, x)
    assert [q.name for q in qt.quantizers(model).values()] == [
        "attention.in_proj_weight.weight",
        "attention.out_proj.weight.weight",
    ]
    # In training mode neither takes torch's fused path for inference, which rounds in another order.
    assert torch.equal(model.train()(x), reference.train()(x))


class Scaled(nn.Embedding):
    """As transformers' scaled embeddings."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 8.0


def test_a_subclass_keeps_its_forward_and_a_shared_layer_its_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = Scaled(8, 16)
            self.same = self.table

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids) + self.same(ids)

    torch.manual_seed(0)
    model, ids = Twice(), torch.arange(8)[None]
    expected = 2 * F.embedding(ids, by_rows(model.table.weight)) * 8.0
    model = quantized(model, ids)
    assert model.table is model.same
    assert torch.equal(model(ids), expected)
    integer = qt.integer_model(model)
    assert integer.table is integer.same
    assert torch.equal(integer(ids), expected)


# -- experts -----------------------------------------------------------------------------------------------------------
def test_grouped_product_and_its_gradients() -> None:
    """Against an einsum over gathered weights, float64; a row of no expert is 0."""
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*s, generator=draw, dtype=torch.float64, requires_grad=True) for s in ((9, 5), (4, 3, 5)))
    index = torch.tensor([3, 0, 0, 2, 3, 4, 0, 4, 2])
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, index), (x, w))
    y = grouped_linear(x, w, index)
    here = index < 4
    expected = torch.einsum("sk,snk->sn", x[here], w[index[here]])
    # float64 sums of 5 terms in another order
    assert torch.allclose(y[here], expected, rtol=0, atol=1e-14)
    assert not bool(y[~here].any())


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


IDS = {"input_ids": torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(1)), "use_cache": False}


def test_every_expert_has_its_own_scales() -> None:
    before = mixtral()
    model = quantized(copy.deepcopy(before), IDS)
    layer = model.model.layers[0].mlp.experts
    theirs = before.model.layers[0].mlp.experts
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(theirs, name)
        assert torch.equal(layer.weight_of(name), torch.stack([by_rows(expert) for expert in weight]))
        assert (
            layer.slots[name].weight_quantizer.weight_parameters(layer.slots[name].weight)[0].numel()
            == weight[..., 0].numel()
        )
        with torch.no_grad():
            weight.copy_(torch.stack([by_rows(expert) for expert in weight]))
    draw = torch.Generator().manual_seed(2)
    tokens, index = torch.randn(6, 32, generator=draw), torch.tensor([[0, 1], [3, 2], [1, 0], [2, 1], [3, 0], [0, 2]])
    share = torch.rand(6, 2, generator=draw)
    # float32 sums of 48 products and of two experts in another order
    assert torch.allclose(layer(tokens, index, share), theirs(tokens, index, share), rtol=1e-5, atol=1e-6)


def test_the_plan_lists_bare_parameters() -> None:
    plan = qt.plan(mixtral(), qt.recipe("torch", weight=WEIGHT), IDS)
    row = plan.row("model.layers.0.mlp.gate.weight")
    assert row is not None
    assert row.scheme is None
    assert "MixtralTopKRouter" in row.reason
    assert "register_layer" in row.reason
    target = qt.plan(mixtral(), "ort:int8", IDS).row("model.layers.0.mlp.experts.gate_up_proj.weight")
    assert target is not None
    assert target.reason == "ort:int8 has no integer kernel for MixtralExperts"


def test_state_of_experts_and_conv1d_loads_again() -> None:
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    for make in (mixtral, lambda: GPT2LMHeadModel(config).eval()):
        before = make()
        model = quantized(copy.deepcopy(before), IDS, input="int8/token")
        names = set(before.state_dict())
        assert names <= set(model.state_dict())
        other = quantized(make(), IDS, input="int8/token")
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(**IDS).logits, model(**IDS).logits)


def test_capped_scores_are_the_models_own() -> None:
    """Gemma 2 caps its scores between the products: with quantizers off nothing may change, and engines leave its attention float."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        attn_logit_softcapping=0.05, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    before = model(**IDS).logits
    plan = qt.plan(model, "ort:int8", IDS)
    rows = [row for row in plan.rows if row.kind == "attention"]
    assert len(rows) == 5
    assert all(row.scheme is None and "softcap" in row.reason for row in rows)
    assert torch.equal(qt.prepare(model, plan)(**IDS).logits, before)


@pytest.mark.parametrize("target", ["ort:int8", "ort:int8-dynamic"])
def test_conv1d_for_engines_is_the_linear_layer_of_its_transpose(target: str) -> None:
    """The parameter stays (K, N); codes, outputs and gradients are those of nn.Linear with its transpose."""
    torch.manual_seed(0)
    conv, x = Conv1D(24, 16), torch.randn(5, 16)
    linear = nn.Linear(16, 24)
    linear.weight, linear.bias = nn.Parameter(conv.weight.detach().t().contiguous()), nn.Parameter(conv.bias.detach())
    pair = [qt.ptq(nn.Sequential(layer), target, [x]) for layer in (conv, linear)]
    outputs = [model(x) for model in pair]
    assert torch.equal(*outputs)
    for model, y in zip(pair, outputs, strict=True):
        assert type(model[0].weight) is nn.Parameter
        (y**2).sum().backward()
    assert pair[0][0].weight.shape == (16, 24)
    assert torch.equal(pair[0][0].weight.grad.t(), pair[1][0].weight.grad)
    integer = [qt.integer_model(model).state_dict() for model in pair]
    assert set(integer[0]) == set(integer[1])
    assert all(torch.equal(integer[0][name], integer[1][name]) for name in integer[1])


# -- registering -------------------------------------------------------------------------------------------------------
def test_what_cannot_be_registered() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    with pytest.raises(ModelError, match="unknown layout 'in-out' of weight 'matrix'; did you mean 'in out'"):
        Foreign(Own(), {"matrix": "in-out"})
    with pytest.raises(ModelError, match="Own has no parameter 'matrx'; did you mean 'matrix'"):
        Foreign(Own(), {"matrx": "in out"})
    with pytest.raises(ModelError, match="replaces no float layer"):
        qt.register_layer(weights={"matrix": "in out"})(type("Quantized", (Foreign,), {}))
    with pytest.raises(SchemeError, match="'nf4' exists already"):
        qt.register_format(type("nf4", (), {"__name__": "nf4", "__call__": lambda self: [0.0, 1.0]})())
    with pytest.raises(RecipeError, match="unknown target 'ort:int9'"):
        qt.register_target("mine", base="ort:int9")
    with pytest.raises(RecipeError, match="'torch' exists already"):
        qt.register_target("torch", base="torch")(dict)
    assert layer_type(Own()) is None
