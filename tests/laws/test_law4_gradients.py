"""Law 4: gradients equal the papers' closed form, computed in float64.

LSQ (Esser et al. 2020): for v = x / s,  d x_hat / d s = round(v) - v inside, -Qn below, Qp above, times g = 1 / sqrt(N * Qp);
d x_hat / d x = 1 inside, 0 outside. N: elements that share the scale (weights), features of one sample (activations)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qatana as qt
from qatana.nn.linear import Linear
from qatana.numerics import Granularity, Scheme
from qatana.quantizer import Quantizer


def lsq(x: np.ndarray, scale: np.ndarray, lo: int, hi: int, upstream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradients (x, per-element contributions to the scale) in float64; the quotient is the float32 one that is rounded."""
    v = (x / scale).astype(np.float64)
    r = np.rint(v)
    inside = (r >= lo) & (r <= hi)
    return upstream * inside, upstream * np.where(inside, r - v, np.clip(r, lo, hi))


@given(
    name=st.sampled_from(["int2", "int3", "int4", "int8n", "int8"]),
    text=st.sampled_from(["tensor", "channel", "group8", "block2x8"]),
    seed=st.integers(0, 10_000),
    size=st.floats(0.05, 2),
)
def test_learned_weight_scales(name: str, text: str, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    scheme = qt.scheme(name, text, scale="learned")
    w, upstream = torch.randn(6, 16), torch.randn(6, 16).double()
    quantizer = Quantizer(scheme, (6, 16), "w")
    quantizer.settle(w)
    with torch.no_grad():
        quantizer.scale *= size
    quantizer.enabled = True
    leaf = w.clone().requires_grad_()
    (quantizer(leaf) * upstream.float()).sum().backward()

    granularity, format = Granularity.parse(text), scheme.format
    view, up = granularity.view(w).numpy(), granularity.view(upstream.float()).double().numpy()
    scale = quantizer.scale.detach().numpy()
    gx, gs = lsq(view, scale, format.lo, format.hi, up)
    axes = granularity.reduced_dims(view.ndim)
    factor = (w.numel() / scale.size * format.hi) ** -0.5
    expected = gs.sum(axes, keepdims=text != "tensor") * factor
    assert leaf.grad is not None
    assert quantizer.scale.grad is not None
    # (g * s) / s: two roundings of 2^-24
    np.testing.assert_allclose(leaf.grad.double().numpy().reshape(gx.shape), gx, rtol=2.4e-7, atol=0)
    # float32 sums of up to 96 terms: at most 96 roundings of 2^-24 of the sum of magnitudes, those of v * upstream included
    bound = 96 * 2.0**-24 * factor * (np.abs(gs) + np.abs(up * view / scale)).sum(axes, keepdims=text != "tensor")
    assert (np.abs(quantizer.scale.grad.numpy() - expected) <= bound).all()


@pytest.mark.parametrize("signed", [True, False])
def test_learned_activation_scale_counts_the_features_of_one_sample(signed: bool) -> None:
    scheme = Scheme(qt.scheme("int4" if signed else "uint4").format, symmetric=signed, scale="learned")
    quantizer = Quantizer(scheme, None, "x")
    x, upstream = torch.randn(8, 5, 6), torch.randn(8, 5, 6)
    x = x if signed else x.abs()
    quantizer.observe(x)
    quantizer.settle()
    with torch.no_grad():
        quantizer.scale *= 0.5
    quantizer.enabled = True
    (quantizer(x) * upstream).sum().backward()
    zero, format = float(quantizer.zero_point), scheme.format
    _, gs = lsq(
        x.numpy(), quantizer.scale.detach().numpy(), format.lo - zero, format.hi - zero, upstream.double().numpy()
    )
    expected = gs.sum() * (5 * 6 * format.hi) ** -0.5
    # 240 terms in float32
    bound = 240 * 2.0**-24 * (np.abs(gs) + np.abs((upstream * x / quantizer.scale.detach()).numpy())).sum()
    assert quantizer.scale.grad is not None
    assert abs(float(quantizer.scale.grad) - expected) <= bound


def integer_linear(output: bool) -> Linear:
    """An int8 linear layer with calibrated static activations."""
    layer = Linear(torch.nn.Parameter(torch.randn(7, 12)), torch.nn.Parameter(torch.randn(7)))
    activation = qt.scheme("uint8", symmetric=False)
    layer.weight_quantizer = Quantizer(qt.scheme("int8n", "channel", scale="dynamic"), (7, 12), "w")
    layer.input_quantizer = Quantizer(activation, None, "x")
    layer.output_quantizer = Quantizer(activation, None, "y") if output else None
    for quantizer, bound in ((layer.input_quantizer, 2.0), (layer.output_quantizer, 4.0)):
        if quantizer is not None:
            quantizer.observe(torch.tensor([-bound, bound]))
            quantizer.settle()
    for quantizer in (layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer):
        if quantizer is not None:
            quantizer.enabled = True
    return layer


@pytest.mark.parametrize("output", [False, True], ids=["float output", "codes out"])
def test_the_integer_forward_is_straight_through_on_the_dequantized_codes(output: bool) -> None:
    """dx = (g w_hat) inside x's range, dw = g^T x_hat, db = sum g; g is masked where the output saturates."""
    layer = integer_linear(output)
    x, upstream = (torch.randn(30, 12) * 1.5).requires_grad_(), torch.randn(30, 7)
    y = layer(x)
    (y * upstream).sum().backward()
    w, i, o = layer.weight_quantizer, layer.input_quantizer, layer.output_quantizer
    assert w is not None
    assert i is not None
    assert layer.bias is not None
    with torch.no_grad():
        w_hat, x_hat = w(layer.weight).double(), i(x).double()
        inside_x = ((x / i.scale).round() + i.zero_point).clamp(0, 255) == (x / i.scale).round() + i.zero_point
        g = upstream.double()
        if o is not None:
            exact = x_hat @ w_hat.T + layer.bias.double()
            code = torch.round(exact / o.scale.double()) + o.zero_point
            g = g * ((code >= 0) & (code <= 255))
            assert 0 < int((g == 0).sum()) < g.numel()
    # float32 products of at most 30 terms: relative 1e-5 of the largest entry is far above 30 roundings of 6e-8
    for ours, expected in (
        (x.grad, (g @ w_hat) * inside_x),
        (layer.weight.grad, g.T @ x_hat),
        (layer.bias.grad, g.sum(0)),
    ):
        assert ours is not None
        assert float((ours - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
