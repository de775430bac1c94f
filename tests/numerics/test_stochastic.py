"""Stochastic rounding is unbiased, lands on neighbouring levels of the format, and trains."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatana as qt
from qatana.errors import ModelError, SchemeError
from qatana.numerics import fake_quantize_by, stochastic

SCHEMES = ["int8", "int4/token", "fp8:e5m2", "fp8:e4m3", "fp8:e4m3/token", "e2m1/group16"]


def made(name: str) -> qt.Scheme:
    return qt.scheme(name, scale="dynamic")


@pytest.mark.parametrize("name", SCHEMES)
def test_the_expectation_is_the_tensor(name: str) -> None:
    """Mean of N draws within 5 standard errors of the tensor's own error variance, and 6 sigma over 4,096 elements at worst."""
    x, draws = torch.randn(64, 64), 400
    samples = torch.stack([stochastic(x, made(name)) for _ in range(draws)]).double()
    # A draw lies on one of two neighbours, so its error's standard deviation is at most half their distance.
    half = (samples.amax(0) - samples.amin(0)) / 2
    error = samples.mean(0) - x.double()
    bound = half / draws**0.5
    assert float(error.sum().abs()) < 5 * float(bound.square().sum().sqrt()) + 1e-6 * 64 * 64  # ulps of the levels
    # An element of which all draws are alike was decided otherwise with probability below a few per draws: of that size its error is.
    step = samples.amax() / 2 if name.startswith("e2m1") else half.amax() * 2
    assert float((error.abs() - 6 * bound).amax()) < 12 / draws * float(step)


@pytest.mark.parametrize("name", SCHEMES)
def test_levels_are_neighbours(name: str) -> None:
    """What lies on the grid stays; else the result is no farther than the two levels that nearest rounding chooses from."""
    x = torch.randn(32, 64)
    on_grid = fake_quantize_by(x, made(name))
    # The largest element of each block is a level in both, so the scale is the same number and everything is on its grid;
    # rounding of x / scale may leave an element one ulp beside its level, which is decided at random one time in 2^20.
    assert torch.allclose(stochastic(on_grid, made(name)), on_grid, rtol=2e-7, atol=0)
    drawn = torch.stack([stochastic(x, made(name)) for _ in range(64)])
    assert all(len(column.unique()) <= 2 for column in drawn.flatten(1).T)
    low, high = drawn.amin(0), drawn.amax(0)
    apart = low != high
    assert bool(((low <= x) & (x <= high))[apart].all())
    nearest = torch.minimum((x - low).abs(), (high - x).abs())
    # Levels of int8 with lo = -128: x_hat of the nearest level is one of the two.
    assert torch.allclose((x - on_grid).abs()[apart], nearest[apart], atol=1e-6)


def test_zeros_and_what_is_not_finite() -> None:
    zeros = torch.zeros(4, 4)
    assert torch.equal(stochastic(zeros, made("int8")), zeros)
    assert stochastic(torch.zeros(0, 4), made("int8")).shape == (0, 4)
    bad = torch.tensor([[1.0, float("inf")], [1.0, 2.0]])
    assert bool(stochastic(bad, made("int8/token")).isnan()[0].any())
    assert bool(stochastic(bad, made("int8/token")).isfinite()[1].all())
    assert stochastic(torch.randn(4, 4, dtype=torch.bfloat16), made("int8")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (qt.scheme("nf4"), "integers or floats"),
        (qt.scheme("uint8", symmetric=False, scale="dynamic"), "both signs"),
        (qt.scheme("int8"), "at each step"),
        (qt.scheme("mxfp8"), "float32 number"),
    ],
    ids=str,
)
def test_what_gradients_cannot_have(scheme: qt.Scheme, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        stochastic(torch.randn(4, 64), scheme)


def prepared() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    x = torch.randn(256, 16)
    target = x[:, :4] * x[:, 4:8]
    return qt.ptq(model, "ort:int8-dynamic", [x]), x, target


@pytest.mark.parametrize("name", ["int8", "fp8:e5m2", "fp8:e4m3/token"])
def test_a_network_trains(name: str) -> None:
    """The loss falls to what unquantized gradients reach, within a tenth."""
    losses = []
    for to in (None, name):
        torch.manual_seed(0)
        model, x, target = prepared()
        qt.quantize_gradients(model, to)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] < 0.3  # the target's variance is 1
    assert losses[1] < 1.1 * losses[0] + 0.02


def test_gradients_of_input_weight_and_bias_come_from_the_rounded_one() -> None:
    """gW = g_hat^T x_hat, gx = g_hat W_hat, gb = sum g_hat, for one and the same g_hat on the grid; the forward pass is unchanged."""
    model, x, _ = prepared()
    layer = model[0]
    x = x.clone().requires_grad_()
    before = layer(x)
    qt.quantize_gradients(model, "int8")
    y = layer(x)
    assert torch.equal(y, before)
    g = torch.randn_like(y)
    torch.manual_seed(5)
    y.backward(g)
    torch.manual_seed(5)
    expected = stochastic(g, made("int8"))
    # Sums of 256 products in float32: 256 ulps at most.
    assert torch.allclose(layer.bias.grad, expected.sum(0), rtol=256 * 2**-23, atol=1e-5)
    weight = fake_quantize_by(layer.weight.detach(), layer.weight_quantizer.scheme)
    assert torch.allclose(x.grad, expected @ weight, rtol=1e-4, atol=1e-4)


def test_a_float_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no quantized linear layer"):
        qt.quantize_gradients(nn.Linear(2, 2), "int8")
