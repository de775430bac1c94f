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
from qatana.nn.conv import Conv
from qatana.nn.elementwise import Add, GlobalAveragePool
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


ACTIVATION = qt.scheme("uint8", symmetric=False, scale="learned")


def static(name: str, x: torch.Tensor) -> Quantizer:
    """A quantizer with a learned scale that clips x a little."""
    quantizer = Quantizer(ACTIVATION, None, name)
    quantizer.observe(0.8 * x)
    quantizer.settle()
    quantizer.enabled = True
    return quantizer


def quantized_operators() -> dict[str, tuple[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor]]:
    """Operators that requantize, their inputs, and their outputs before that, in float64 on the dequantized operands."""
    x, other = torch.randn(6, 4, 5, 5), torch.randn(6, 4, 5, 5)
    qx, qo = static("x", x), static("other", other)
    weights = {"linear": torch.randn(7, 5), "conv": torch.randn(3, 4, 3, 3)}
    found: dict[str, torch.nn.Module] = {
        "linear": Linear(torch.nn.Parameter(weights["linear"]), None),
        "conv": Conv(torch.nn.Conv2d(4, 3, 3, bias=False), None, False, "onnxruntime"),
        "add": Add(False, "onnxruntime"),
        "pool": GlobalAveragePool("onnxruntime"),
    }
    found["conv"].weight = torch.nn.Parameter(weights["conv"])
    hats = {}
    for name, weight in weights.items():
        quantizer = Quantizer(qt.scheme("int8n", "channel", scale="dynamic"), tuple(weight.shape), "w")
        quantizer.enabled = True
        found[name].weight_quantizer, hats[name] = quantizer, quantizer(weight).double()
    with torch.no_grad():
        a, b = qx(x).double(), qo(other).double()
        exact = {
            "linear": torch.nn.functional.linear(a, hats["linear"]),
            "conv": torch.nn.functional.conv2d(a, hats["conv"]),
            "add": a + b,
            "pool": a.mean((2, 3), keepdim=True),
        }
    for name, layer in found.items():
        layer.input_quantizer = qx
        layer.output_quantizer = static("y", exact[name].float())
    found["add"].other_quantizer = qo
    return {name: (layer, (x, other) if name == "add" else (x,), exact[name]) for name, layer in found.items()}


@pytest.mark.parametrize("kind", ["linear", "conv", "add", "pool"])
def test_learned_output_scales(kind: str) -> None:
    """The same closed form where a layer requantizes: x is its exact output, N the features of one sample of it."""
    layer, inputs, exact = quantized_operators()[kind]
    output, upstream = layer.output_quantizer, torch.randn(exact.shape)
    (layer(*inputs) * upstream).sum().backward()
    zero = float(output.zero_point)
    v = exact.numpy() / output.scale.detach().double().numpy()
    assert (np.abs(np.abs(v - np.floor(v)) - 0.5) > 1e-5).all()  # no tie, so codes do not depend on the last bit
    _, gs = lsq(exact.numpy(), output.scale.detach().double().numpy(), -zero, 255 - zero, upstream.double().numpy())
    factor = (exact[0].numel() * 255) ** -0.5
    # v in float32 after a product of three factors: 4 roundings of 2^-24 of |v|; then a float32 sum of n terms
    magnitude = (np.abs(upstream.numpy()) * (1 + np.abs(v))).sum()
    assert abs(float(output.scale.grad) - gs.sum() * factor) <= (4 + exact.numel()) * 2.0**-24 * magnitude * factor


def test_learned_input_scale_of_a_sum() -> None:
    """Both ways from an operand's scale to the sum, by its codes and by the sum's own arithmetic, carry the same factor."""
    layer, (a, b), exact = quantized_operators()["add"]
    qa, qy, upstream = layer.input_quantizer, layer.output_quantizer, torch.randn(exact.shape)
    (layer(a, b) * upstream).sum().backward()
    v = np.rint(exact.numpy() / qy.scale.detach().double().numpy()) + float(qy.zero_point)
    masked = upstream.double().numpy() * ((v >= 0) & (v <= 255))
    zero, scale = float(qa.zero_point), qa.scale.detach().numpy()
    _, gs = lsq(a.numpy(), scale, -zero, 255 - zero, masked)
    factor = (a[0].numel() * 255) ** -0.5
    magnitude = (np.abs(masked) * (1 + np.abs(a.numpy() / scale))).sum()
    # as above
    assert abs(float(qa.scale.grad) - gs.sum() * factor) <= (4 + a.numel()) * 2.0**-24 * magnitude * factor


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
