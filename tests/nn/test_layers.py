"""Layers with slots: off they are torch's layers, on they compute on exactly the integers that their quantizers show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatana as qt
from qatana.errors import ModelError
from qatana.nn.attention import AttentionProducts
from qatana.nn.conv import Conv
from qatana.nn.elementwise import Activation, Add, GlobalAveragePool
from qatana.nn.embedding import Embedding
from qatana.nn.linear import Linear
from qatana.numerics import fake_quantize_by
from qatana.quantizer import Quantizer

ENGINE = "onnxruntime"
ACTIVATION = qt.scheme("uint8", symmetric=False)
WEIGHT = qt.scheme("int7n", "channel", scale="dynamic")


def slots(layer: Any, shape: tuple[int, ...] | None, *roles: str) -> dict[str, Quantizer]:
    """Give a layer quantizers: a weight's where `shape` says its shape, activations' for the roles."""
    made = {role: Quantizer(ACTIVATION, None, role) for role in roles}
    if shape is not None:
        made["weight"] = Quantizer(WEIGHT, shape, "weight")
    for role, quantizer in made.items():
        setattr(layer, f"{role}_quantizer", quantizer)
    return made


def calibrate(layer: nn.Module, made: dict[str, Quantizer], *inputs: Any) -> dict[str, Tensor]:
    """Observe, settle, enable; returns the codes of one more pass over the same inputs."""
    activations = [q for role, q in made.items() if role != "weight"]
    for quantizer in activations:
        quantizer.observing = True
    with torch.no_grad():
        layer(*inputs)
    for quantizer in activations:
        quantizer.observing = False
        quantizer.settle()
    heard: dict[str, Tensor] = {}
    for quantizer in made.values():
        quantizer.enabled, quantizer.tap = True, heard.__setitem__
    with torch.no_grad():
        layer(*inputs)
    return heard


def number(x: Tensor) -> np.float32:
    return np.float32(x.item())


def float_conv(bias: bool, norm: bool, affine: bool = True) -> tuple[nn.Conv2d, nn.BatchNorm2d | None]:
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=bias)
    if not norm:
        return conv, None
    batch_norm = nn.BatchNorm2d(8, affine=affine)
    batch_norm.running_mean = torch.randn(8)
    batch_norm.running_var = torch.rand(8) + 0.2
    if affine:
        nn.init.uniform_(batch_norm.weight, -1, 1)
        nn.init.uniform_(batch_norm.bias, -1, 1)
    return conv, batch_norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding_equals_norm_after_convolution(bias: bool, affine: bool) -> None:
    conv, norm = float_conv(bias, True, affine)
    layer, x = Conv(conv, norm, True, ENGINE).double().eval(), torch.randn(2, 6, 9, 9).double()
    assert norm is not None
    expected = F.relu(norm.double().eval()(conv.double()(x)))
    # the same formula in float64, in another order
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    weight, shift, factor = layer.folded()
    assert factor is not None
    gamma = norm.weight if affine else torch.ones(8)
    torch.testing.assert_close(factor, gamma / (norm.running_var + norm.eps).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(F.conv2d(x, weight, shift, 2, 1, 1, 2).relu(), expected, rtol=1e-12, atol=1e-12)


def test_training_uses_the_statistics_of_the_batch() -> None:
    """Off: values, gradients and running statistics are those of convolution and BatchNorm (float64: the same formula)."""
    conv, norm = float_conv(True, True)
    assert norm is not None
    twin_conv, twin_norm = float_conv(True, True)
    twin_conv.load_state_dict(conv.state_dict())
    twin_norm.load_state_dict(norm.state_dict())  # type: ignore[union-attr]
    layer, x = Conv(conv, norm, True, ENGINE).double().train(), torch.randn(4, 6, 9, 9).double()
    norm.double().train()
    twin_norm.double().train()  # type: ignore[union-attr]
    ours, theirs = layer(x), F.relu(twin_norm(twin_conv.double()(x)))  # type: ignore[misc]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(ours)
    (ours * upstream).sum().backward()
    (theirs * upstream).sum().backward()
    torch.testing.assert_close(norm.running_mean, twin_norm.running_mean, rtol=1e-10, atol=1e-12)  # type: ignore[union-attr]
    torch.testing.assert_close(norm.running_var, twin_norm.running_var, rtol=1e-10, atol=1e-12)  # type: ignore[union-attr]
    pairs = ((conv.weight, twin_conv.weight), (norm.weight, twin_norm.weight), (norm.bias, twin_norm.bias))  # type: ignore[union-attr]
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


def test_frozen_statistics_are_evaluation() -> None:
    conv, norm = float_conv(False, True)
    layer, x = Conv(conv, norm, True, ENGINE), torch.randn(4, 6, 9, 9)
    made = slots(layer, conv.weight.shape, "input", "output")
    layer.eval()
    calibrate(layer, made, x)
    expected = layer(x)
    layer.train()
    assert not torch.equal(layer(x), expected)
    layer.freeze_batch_norm = True
    assert norm is not None
    before = norm.running_mean.clone()  # type: ignore[union-attr]
    assert not torch.equal(before, torch.zeros(8))
    frozen_expected = layer.eval()(x)
    layer.train()
    assert torch.equal(layer(x), frozen_expected)
    assert torch.equal(norm.running_mean, before)  # type: ignore[arg-type]


def test_a_factor_of_zero_does_not_divide() -> None:
    conv, norm = float_conv(False, True)
    assert norm is not None
    with torch.no_grad():
        norm.weight[2] = 0
    layer, x = Conv(conv, norm, True, ENGINE).train(), torch.randn(4, 6, 9, 9)
    y = layer(x)
    y.sum().backward()
    assert bool(torch.isfinite(y).all())
    for parameter in (*conv.parameters(), *norm.parameters()):
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_convolution_on_integers(norm: bool, relu: bool) -> None:
    """Codes from an int64 convolution in numpy and the engine's formula: rint(f32(acc + b) * f32(f32(s_x s_w) / s_y)) + z."""
    conv, batch_norm = float_conv(True, norm)
    layer, x = Conv(conv, batch_norm, relu, ENGINE).eval(), torch.randn(3, 6, 9, 9)
    made = slots(layer, conv.weight.shape, "input", "output")
    heard = calibrate(layer, made, x)
    weight, bias, _ = (None if t is None else t.detach() for t in layer.folded())
    assert weight is not None
    assert bias is not None
    w_scale = np.abs(weight.numpy()).max((1, 2, 3)) / np.float32(63)
    w = np.clip(np.rint(weight.numpy() / w_scale[:, None, None, None]), -63, 63)
    assert np.array_equal(heard["weight"].numpy(), w)
    s_x, z_x = number(made["input"].scale), int(made["input"].zero_point)
    levels = heard["input"].to(torch.int64) - z_x
    acc = F.conv2d(levels, torch.from_numpy(w).to(torch.int64), None, 2, 1, 1, 2).numpy()
    s32 = s_x * w_scale
    b = np.rint(bias.numpy() / s32).astype(np.int64)
    s_y, z_y = number(made["output"].scale), int(made["output"].zero_point)
    value = (acc + b[:, None, None]).astype(np.float32) * (s32 / s_y)[:, None, None]
    expected = np.clip(np.rint(value) + z_y, z_y if relu else 0, 255)
    assert np.array_equal(heard["output"].numpy(), expected)
    assert np.array_equal(layer(x).detach().numpy(), (expected.astype(np.float32) - z_y) * s_y)


def test_same_padding_and_its_limits() -> None:
    odd = nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1))
    x = torch.randn(1, 3, 9, 9)
    # one kernel or another of the same convolution
    torch.testing.assert_close(Conv(odd, None, False, ENGINE)(x), odd(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ModelError, match="asymmetric 'same' padding"):
        Conv(nn.Conv2d(3, 4, 4, padding="same"), None, False, ENGINE)
    with pytest.raises(ModelError, match="padding_mode 'reflect' has no integer form"):
        Conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), None, False, ENGINE)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_integers(bias: bool) -> None:
    source = nn.Linear(12, 7, bias=bias)
    layer, x = Linear(source.weight, source.bias, ENGINE), torch.randn(5, 3, 12)
    made = slots(layer, (7, 12), "input")
    heard = calibrate(layer, made, x)
    w_scale = np.abs(source.weight.detach().numpy()).max(1) / np.float32(63)
    s32 = number(made["input"].scale) * w_scale
    acc = (heard["input"].to(torch.int64).numpy() - int(made["input"].zero_point)) @ heard["weight"].to(
        torch.int64
    ).numpy().T
    b = np.rint(source.bias.detach().numpy() / s32).astype(np.int64) if bias else 0
    assert np.array_equal(layer(x).detach().numpy(), (acc + b).astype(np.float32) * s32)


def test_off_is_torch_itself() -> None:
    source, table = nn.Linear(12, 7), nn.Embedding(9, 12, padding_idx=0)
    x, ids = torch.randn(5, 12), torch.randint(0, 9, (2, 4))
    assert torch.equal(Linear(source.weight, source.bias, ENGINE)(x), source(x))
    assert torch.equal(Embedding(table.weight, 0)(ids), table(ids))
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(Add(True, ENGINE)(a, b), (a + b).relu())
    assert torch.equal(GlobalAveragePool(ENGINE)(a), a.mean((2, 3), keepdim=True))
    assert torch.equal(Activation(F.gelu)(x), F.gelu(x))


def test_padding_tokens_get_no_gradient() -> None:
    layer = Embedding(nn.Parameter(torch.randn(9, 8)), padding_idx=0)
    slots(layer, (9, 8))["weight"].enabled = True
    layer(torch.tensor([[0, 3, 3]])).sum().backward()
    assert layer.weight.grad is not None
    # (g * s) / s: two roundings of 2^-24, twice the same row
    torch.testing.assert_close(
        layer.weight.grad.sum(1), torch.tensor([0, 0, 0, 16.0, 0, 0, 0, 0, 0]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("text", ["channel", "group4"])
@pytest.mark.parametrize("mode", ["dynamic", "static", "learned"])
def test_embedding_rows_are_rows_of_the_quantized_table(text: str, mode: Any) -> None:
    layer = Embedding(nn.Parameter(torch.randn(9, 8)))
    layer.weight_quantizer = Quantizer(qt.scheme("int4n", text, scale=mode), (9, 8), "weight")
    layer.weight_quantizer.settle(layer.weight)
    layer.weight_quantizer.enabled = True
    ids = torch.randint(0, 9, (3, 5))
    blocks = layer.weight.detach().numpy().reshape(9, -1, 8 if text == "channel" else 4)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(7)
    table = (np.rint(blocks / scale) * scale).reshape(9, 8)
    assert np.array_equal(layer(ids).detach().numpy(), table[ids.numpy()])


@pytest.mark.parametrize("relu", [True, False])
def test_add_within_a_step(relu: bool) -> None:
    """Each operand is off by half of its step at most, and the sum by half of its own."""
    layer, a, b = Add(relu, ENGINE), torch.randn(2, 3, 8, 8), 3 * torch.randn(2, 3, 8, 8)
    made = slots(layer, None, "input", "other", "output")
    calibrate(layer, made, a, b)
    expected = (a + b).relu() if relu else a + b
    bound = (
        sum(float(q.scale) for q in made.values()) / 2 + max(float(q.scale) for q in made.values()) / 2
    )  # zero points are integers
    assert float((layer(a, b) - expected).abs().max()) <= bound
    assert not relu or int(made["output"].zero_point) == 0


def test_attention_off_is_scaled_dot_product_attention() -> None:
    q, k, v = (torch.randn(2, 3, n, 8).double() for n in (5, 7, 7))
    mask = torch.zeros(2, 1, 5, 7).double()
    mask[1, :, :, 5:] = -torch.inf
    ours = AttentionProducts(ENGINE)(q, k, v, mask, 0.31)
    expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.31)
    # float64: the same formula, maybe in blocks
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_attention_on_integers() -> None:
    """Scores f32(acc) * f32(f32(s_q c) s_k), context rint(f32(acc) f32(f32(s_p s_v) / s_y)) + z, from codes in int64."""
    layer = AttentionProducts(ENGINE).eval()
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    made = slots(layer, None, "query", "key", "value", "context")
    layer.probability_quantizer = Quantizer(
        qt.scheme("uint8", symmetric=False, fixed=(1 / 255, 0)), None, "probability"
    )
    made["probability"] = layer.probability_quantizer
    heard = calibrate(layer, made, q, k, v, None, 0.31)
    level = {name: heard[name].to(torch.int64).numpy() - int(made[name].zero_point) for name in heard}
    scale = {name: number(made[name].scale) for name in heard}
    acc = level["query"] @ level["key"].swapaxes(-1, -2)
    scores = acc.astype(np.float32) * ((scale["query"] * np.float32(0.31)) * scale["key"])
    p = np.rint(torch.softmax(torch.from_numpy(scores), -1).numpy() / np.float32(1 / 255))
    assert np.array_equal(heard["probability"].numpy(), p)
    acc = p.astype(np.int64) @ level["value"]
    value = acc.astype(np.float32) * (scale["probability"] * scale["value"] / scale["context"])
    expected = np.clip(np.rint(value) + int(made["context"].zero_point), 0, 255)
    assert np.array_equal(heard["context"].numpy(), expected)


def test_attention_dropout_only_while_training() -> None:
    layer = AttentionProducts(ENGINE)
    q, k, v = (torch.randn(1, 2, 6, 4) for _ in "qkv")
    assert torch.equal(layer.eval()(q, k, v, None, 0.5, 0.9), layer(q, k, v, None, 0.5))
    assert not torch.equal(layer.train()(q, k, v, None, 0.5, 0.9), layer.eval()(q, k, v, None, 0.5))


# -- formats that integer layers do not multiply ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [("nvfp4", {}), ("mxfp4", {}), ("gguf:q4_0", {}), ("fp8:e4m3/channel", {"scale": "dynamic"}), ("binary", {})],
)
def test_embedding_in_other_formats_is_the_quantized_table(name: str, options: Any) -> None:
    """Rows of the table quantized whole, by itself, whichever way the layer takes; gradients reach those rows alone."""
    layer = Embedding(nn.Parameter(torch.randn(10, 64)))
    scheme = qt.scheme(name, **options)
    quantizer = Quantizer(scheme, (10, 64), "weight")
    layer.weight_quantizer = quantizer
    quantizer.enabled = True
    ids = torch.tensor([[1, 4], [4, 9]])
    out = layer(ids)
    assert torch.equal(out, fake_quantize_by(layer.weight.detach(), scheme)[ids])
    out.sum().backward()
    assert layer.weight.grad is not None
    assert set(layer.weight.grad.abs().sum(1).nonzero().flatten().tolist()) <= {1, 4, 9}


def test_convolution_in_other_formats_is_a_float_convolution() -> None:
    """fp8 weights per channel beside integer activations: torch's convolution of what the quantizers read back."""
    conv = nn.Conv2d(3, 4, 3)
    layer = Conv(conv, None, False, ENGINE)
    made = slots(layer, None, "input", "output")
    made["weight"] = layer.weight_quantizer = Quantizer(
        qt.scheme("fp8:e4m3/channel", scale="dynamic"), tuple(conv.weight.shape), "weight"
    )
    x = torch.randn(2, 3, 6, 6)
    calibrate(layer, {role: made[role] for role in ("input", "output")}, x)
    made["weight"].enabled = True
    assert not layer.integer
    w_hat = fake_quantize_by(conv.weight, made["weight"].scheme)
    expected = made["output"](F.conv2d(made["input"](x), w_hat, conv.bias))
    assert torch.equal(layer(x), expected)


def test_a_weight_has_no_tokens() -> None:
    recipe = qt.recipe("ort:int8-dynamic").rule("*", weight={"granularity": "token", "scale": "dynamic"})
    with pytest.raises(qt.QatanaError, match="a weight has no tokens"):
        qt.plan(nn.Sequential(nn.Linear(8, 8)), recipe, torch.randn(2, 8))
