"""Weights stepped by codes, learned scales by shares of themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import qatana as qt
from qatana.errors import RecipeError
from qatana.numerics.by_scheme import fake_quantize_by
from qatana.train import CodeUnits, parameter_groups, training_of
from qatana.train.code_units import CodedWeight, coded_weights, norm_weights


class Tied(nn.Module):
    """An embedding tied to the output layer, and a layer between them, as GPT-2 writes it if `swapped`."""

    def __init__(self, swapped: bool) -> None:
        super().__init__()
        self.table, self.middle = nn.Embedding(12, 64), Conv1D(64, 64) if swapped else nn.Linear(64, 64)
        self.head = nn.Linear(64, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.table(ids)))


IDS = torch.arange(24).reshape(2, 12) % 12


def prepared(weight: str, swapped: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Tied(swapped)
    model = qt.prepare(model, qt.plan(model, qt.recipe("torch").rule(weight=weight), {"ids": IDS}, mode="modules"))
    return qt.calibrate(model, [{"ids": IDS}])


def matrix(one: CodedWeight) -> Tensor:
    return one.weight.t() if one.layout == "in out" else one.weight


WEIGHTS = [
    "int4/group32 sym learned mse",
    "int4/channel0 sym learned",
    "int8/tensor sym learned",
    "int4/group16 asym learned",
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradients_are_those_of_the_chain_rule(weight: str, swapped: bool) -> None:
    """Against autograd through  w = |s| u,  s = s_0 e^r.  Some weights clip."""
    model = prepared(weight, swapped)
    coded = coded_weights(model)
    assert [one.layout for one in coded] == ["out in", "in out" if swapped else "out in"]
    with torch.no_grad():
        for one in coded:
            one.weight.mul_(1.3)
    expected = []
    for one in coded:
        upstream, q = torch.randn(matrix(one).shape), one.quantizer
        (q(matrix(one).contiguous()) * upstream).sum().backward()
        s0, view = q.scale.detach().clone(), q.scheme.granularity.view
        u = (view(matrix(one).detach().contiguous()) / s0.abs()).requires_grad_()
        r = torch.zeros_like(s0, requires_grad=True)
        s = s0 * r.exp()
        w_hat = fake_quantize_by((u * s.abs()).reshape(upstream.shape), q.scheme, s, q.zero_point)
        (w_hat * upstream).sum().backward()
        expected.append((u.detach(), u.grad, r.grad))
    with CodeUnits(model).step():
        for one, (u, u_gradient, r_gradient) in zip(coded, expected, strict=True):
            assert one.weight.grad is not None
            found, gradient = one.blocks(one.weight.detach(), one.weight.grad)
            torch.testing.assert_close(found, u, rtol=0, atol=0)
            assert float((gradient == 0).float().mean()) > 0.001  # what clips has no gradient
            # float32: the same few products in another order, and sums of 16 to 4,096 of them
            torch.testing.assert_close(gradient, u_gradient, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(one.quantizer.scale.grad, r_gradient, rtol=1e-4, atol=1e-4)
            assert not one.quantizer.scale.any()


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_an_adam_step_is_a_step_of_codes_and_of_shares(weight: str, swapped: bool) -> None:
    """Adam's first step is lr * sign(gradient): w = |s| (u - 0.01 sign), s = s_0 exp(-0.002 sign)."""
    model = prepared(weight, swapped)
    groups = parameter_groups(model, 1e-3, 0.0, 0.002, code_lr=0.01)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-30)
    model(IDS).square().sum().backward()
    units = CodeUnits(model)
    before = [
        (one.blocks(one.weight.detach().clone())[0], one.quantizer.scale.detach().clone()) for one in units.weights
    ]
    rates = []
    with units.step():
        for one in units.weights:
            assert one.weight.grad is not None
            assert one.quantizer.scale.grad is not None
            rates.append((one.blocks(one.weight.grad)[0].sign(), one.quantizer.scale.grad.sign()))
        optimizer.step()
    for one, (w, s), (w_sign, s_sign) in zip(units.weights, before, rates, strict=True):
        scale = s * torch.exp(-0.002 * s_sign)
        torch.testing.assert_close(one.quantizer.scale.detach(), scale, rtol=1e-6, atol=0)
        expected = scale.abs() * (w / s.abs() - 0.01 * w_sign)
        torch.testing.assert_close(one.blocks(one.weight.detach())[0], expected, rtol=1e-6, atol=1e-7)


def test_a_gradient_that_lies_otherwise_in_memory_is_stepped_the_same() -> None:
    """The blocks of a stack of experts are a view of a gradient that lies as its weight does; else they are a copy, stepped in vain."""
    stepped = []
    for lay in (torch.clone, lambda gradient: gradient.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
        ))  # fmt: skip
        recipe = qt.recipe("torch", weight="int4/group16 sym learned mse")
        model = qt.calibrate(qt.prepare(model, qt.plan(model, recipe, {"input_ids": IDS})), [{"input_ids": IDS}])
        (stack,) = (one for one in coded_weights(model) if one.weight.shape == (4, 96, 32))
        model(input_ids=IDS).logits.square().sum().backward()
        stack.weight.grad = lay(stack.weight.grad)
        with CodeUnits(model).step():
            torch.optim.SGD([stack.weight], lr=0.01).step()
        stepped.append(stack.weight.detach())
    assert torch.equal(*stepped)


def test_without_a_gradient_nothing_moves() -> None:
    """A scale keeps its bits, a weight is divided and multiplied: 1 ulp."""
    model = prepared(WEIGHTS[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with CodeUnits(model).step():  # no gradients at all
        pass
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model(IDS).sum().backward()
    with CodeUnits(model).step():
        pass
    for name, p in model.named_parameters():
        if name.endswith("scale"):
            assert torch.equal(p, before[name])
        torch.testing.assert_close(p, before[name], rtol=2**-23, atol=0)


def test_groups() -> None:
    model = prepared(WEIGHTS[0])
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1e-3, 0.1, 1e-4, code_lr=0.01, factors={"middle.weight": 2.0})
    found = [(g["name"], g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups]
    assert [entry[:3] for entry in found] == [
        ("codes middle.weight", 0.02, 0.1), ("plain", 1e-3, 0.0), ("tables", 0.01, 0.0), ("scales", 1e-4, 0.0),
    ]  # fmt: skip
    assert found[0][3] == ["middle.weight"]
    assert found[2][3] == ["table.weight"]


def test_weights_of_other_kinds_keep_their_own_size() -> None:
    """Those that learn no scale, frozen ones, and convolutions: a norm is folded into what they quantize."""
    assert coded_weights(prepared("int4/group32 sym mse")) == []
    model = prepared(WEIGHTS[0])
    model.get_parameter("middle.weight").requires_grad_(False)
    assert [one.weight.shape for one in coded_weights(model)] == [(12, 64)]
    conv = nn.Sequential(nn.Conv1d(32, 8, 1))
    conv = qt.prepare(
        conv, qt.plan(conv, qt.recipe("torch").rule(weight="int4/channel0 sym learned"), torch.randn(1, 32, 4))
    )
    assert coded_weights(conv) == []
    groups = parameter_groups(conv, 1e-3, 0.1, 1e-4, code_lr=0.01)
    assert [(g["name"], g["lr"]) for g in groups] == [("weights", 1e-3), ("plain", 1e-3), ("scales", 1e-4)]


def test_norms_that_multiply_are_stepped_by_shares_of_themselves() -> None:
    """Adam's first step is lr * sign(gradient): g = g_0 exp(-lr sign). Weights of 1e-3 and of 10, of either sign; a 0 stays."""
    model = nn.Sequential(LlamaRMSNorm(8), nn.LayerNorm(8), nn.RMSNorm(8))
    with torch.no_grad():
        for norm in model:
            norm.weight.copy_(torch.tensor([1e-3, -1e-3, 0.1, 1.0, -1.0, 3.0, 10.0, 0.0]))
    groups = parameter_groups(model, 0.5, 0.1, 0.01, code_lr=0.1, factors={"2.*": 2.0})
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("plain", 0.5, 0.0, 1), ("norms", 0.01, 0.0, 2), ("norms 2.*", 0.02, 0.0, 1),
    ]  # fmt: skip
    torch.manual_seed(0)
    (model(torch.randn(4, 8)) * torch.randn(4, 8)).sum().backward()
    before = [(norm.weight.detach().clone(), norm.weight.grad.clone()) for norm in model]
    optimizer = torch.optim.AdamW(groups, eps=1e-30)
    with CodeUnits(model).step():
        optimizer.step()
    for norm, rate, (w, gradient) in zip(model, (0.01, 0.01, 0.02), before, strict=True):
        expected = w * torch.exp(-rate * (w * gradient).sign())
        torch.testing.assert_close(norm.weight.detach(), expected, rtol=1e-6, atol=0)  # float32: exp and two products


def test_norms_that_multiply_by_another_number_than_their_weight_keep_their_size() -> None:
    """Gemma's multiply by 1 + weight; a batch norm is folded; a norm over images takes no rows; a frozen one is not trained."""

    class ImageLayerNorm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    assert norm_weights(nn.Sequential(GemmaRMSNorm(8), nn.BatchNorm1d(8), ImageLayerNorm(8))) == []
    norm = nn.LayerNorm(8)
    norm.weight.requires_grad_(False)
    assert norm_weights(norm) == []
    model = nn.Sequential(nn.LayerNorm(8), norm)
    model[1].weight = model[0].weight.requires_grad_()
    assert len(norm_weights(model)) == 1


def test_codes_need_scales() -> None:
    with pytest.raises(RecipeError, match=r"float_steps=10.*calibrated model"):
        training_of({"steps": 20, "lr": 1e-3, "code_lr": 0.01, "float_steps": 10})
