"""Products on codes: the bits of the integer operators forward, the gradients of float layers on fake-quantized operands backward."""

from __future__ import annotations

import itertools
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics import (
    Affine,
    coded_add,
    coded_attention,
    coded_conv,
    fake_quantize_by,
    operators,
    product_gradients,
    products,
    scheme,
)
from qatana.numerics.coded import Coded, decode, encode, encode_rows, encode_weight
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.integer_sums import Geometry

ACTIVATION, SIGNED = scheme("uint8", symmetric=False), scheme("int8")
WEIGHT = scheme("int8n", "channel", scale="dynamic")
SCALE, ZERO = torch.tensor(0.02), torch.tensor(121.0)
ENGINES = ["onnxruntime", "openvino"]


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors]


def gradients(y: Tensor, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(y, inputs, upstream))


def assert_close(found: list[Tensor], expected: list[Tensor], relative: float = 1e-5) -> None:
    """To float32 rounding: sums of a few thousand products in another order differ by some 2^-24 of the largest."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= relative * b.abs().max(), float((a - b).abs().max() / b.abs().max())


ops = cast(Any, operators)
SHAPES = [(5, 33), (2, 3, 64), (0, 64), (1, 7), (2, 2, 3, 130), (4, 1500)]


def linear_case(shape: tuple[int, ...], outputs: int = 20) -> list[Tensor]:
    torch.manual_seed(0)
    x, w, b = torch.randn(*shape) * 2, torch.randn(outputs, shape[-1]), torch.randn(outputs)
    return leaves(x, w, b)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
def test_linear(shape: tuple[int, ...], engine: str) -> None:
    x, w, b = linear_case(shape)
    coded_x, coded_w = encode(x, SCALE, ZERO, ACTIVATION, engine), encode_weight(w, WEIGHT)
    y = products.linear(coded_x, coded_w, b, engine)
    x_codes = ops.quantize(x.detach(), float(SCALE), int(ZERO), 0, 255, engine, "")
    s32 = SCALE * coded_w.scale.reshape(-1)
    term = engine_named(engine).bias_term(b.detach(), s32)
    assert torch.equal(
        y, ops.linear(x_codes, float(SCALE), int(ZERO), coded_w.codes, coded_w.scale.reshape(-1), term, engine)
    )
    upstream = torch.randn_like(y)
    expected = F.linear(fake_quantize_by(x, ACTIVATION, SCALE, ZERO), fake_quantize_by(w, WEIGHT), b)
    assert_close(gradients(y, upstream, [x, w, b]), gradients(expected, upstream, [x, w, b]))


@pytest.mark.parametrize("weight", ["int8/channel", "int4/group64", "int2/group64"])
@pytest.mark.parametrize("shape", [(5, 192), (2, 3, 64), (0, 64), (1, 128), (3, 2048)], ids=str)
def test_rows(weight: str, shape: tuple[int, ...]) -> None:
    """Inputs with a scale per token, weights in blocks: the formula of `products.ROWS`, block by block in float32 on exact sums."""
    x, w, b = linear_case(shape)
    token, blocks = (scheme(name, scale="dynamic") for name in ("int8/token", weight))
    assert products.goes_by_rows(token, False)
    assert products.goes_by_rows(blocks, True)
    coded_x, coded_w = encode_rows(x, token), encode_weight(w, blocks)
    y = products.linear(coded_x, coded_w, b, products.ROWS)
    levels, scales = coded_x.codes.reshape(-1, shape[-1]).long(), coded_w.scale.reshape(len(w), -1)
    size, total = shape[-1] // scales.shape[1], torch.zeros(len(levels), len(w))
    for i in range(scales.shape[1]):
        part = slice(i * size, (i + 1) * size)
        total = total + (levels[:, part] @ coded_w.codes[:, part].long().t()).float() * scales[:, i]
    assert torch.equal(y.reshape(total.shape), total * coded_x.scale.reshape(-1, 1) + b)
    assert torch.equal(y, products.linear_of_levels(coded_x, coded_w.codes, coded_w.scale, b))
    upstream = torch.randn_like(y)
    expected = F.linear(fake_quantize_by(x, token), fake_quantize_by(w, blocks), b)
    assert_close(gradients(y, upstream, [x, w, b]), gradients(expected, upstream, [x, w, b]))


@pytest.mark.parametrize(("shape", "engine"), list(itertools.product([(5, 33), (2, 3, 64), (0, 64)], ENGINES)), ids=str)
def test_linear_requantized(shape: tuple[int, ...], engine: str) -> None:
    x, w, b = linear_case(shape)
    y = Affine.of(0.05, 130, 0, 255)
    coded_x, coded_w = encode(x, SCALE, ZERO, ACTIVATION, engine), encode_weight(w, WEIGHT)
    found = products.linear_requantized(coded_x, coded_w, b, engine, y, learned=False)
    x_codes = ops.quantize(x.detach(), float(SCALE), int(ZERO), 0, 255, engine, "")
    w_scale = coded_w.scale.reshape(-1)
    term = engine_named(engine).bias_term(b.detach(), SCALE * w_scale)
    codes = ops.linear_requantize(
        x_codes, float(SCALE), int(ZERO), coded_w.codes, w_scale, term, 0.05, 130, 0, 255, engine, ""
    )
    assert torch.equal(found, (codes.float() - 130) * y.scale)
    upstream = torch.randn_like(found)
    real = F.linear(fake_quantize_by(x, ACTIVATION, SCALE, ZERO), fake_quantize_by(w, WEIGHT), b)
    expected = fake_quantize_by(real, ACTIVATION, y.scale, y.zero_point)
    assert_close(gradients(found, upstream, [x, w, b]), gradients(expected, upstream, [x, w, b]))


def test_a_learned_output_scale_has_the_papers_gradient() -> None:
    """LSQ in float64 on the real output: d s = sum g (round(t) - t) inside, g level outside (Esser et al. 2020, eq. 3)."""
    x, w, _ = linear_case((40, 33))
    scale = torch.tensor(0.03, requires_grad=True)
    y = Affine(scale, torch.tensor(100.0), 0, 255)
    found = products.linear_requantized(
        encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"),
        encode_weight(w, WEIGHT),
        None,
        "onnxruntime",
        y,
        learned=True,
    )
    upstream = torch.randn_like(found)
    real = fake_quantize_by(x, ACTIVATION, SCALE, ZERO).double() @ fake_quantize_by(w, WEIGHT).double().t()
    t = real / 0.03
    level = torch.round(t).clamp(-100, 155)
    inside = torch.round(t) == level
    assert not inside.all()
    expected = ((level - t * inside) * upstream.double()).sum().detach()
    gradient = float(torch.autograd.grad(found, scale, upstream)[0])
    assert abs(gradient - float(expected)) < 1e-5 * abs(float(expected)), "t in float32, 800 terms"


@pytest.mark.parametrize("learned", ["x", "w", "both"])
def test_learned_scales_of_the_operands(learned: str) -> None:
    x, w, b = linear_case((40, 33))
    s_x, s_w = torch.tensor(0.02), torch.full((20, 1), 0.015)
    inputs = [x, w, b, *leaves(*([s_x] if learned != "w" else []), *([s_w] if learned != "x" else []))]
    weight = WEIGHT.with_(scale="static")
    zero = torch.zeros_like(s_w)
    y = products.linear(
        encode(x, s_x, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, weight, s_w, zero), b, "onnxruntime"
    )
    expected = F.linear(fake_quantize_by(x, ACTIVATION, s_x, ZERO), fake_quantize_by(w, weight, s_w, zero), b)
    upstream = torch.randn_like(y)
    assert_close(gradients(y, upstream, inputs), gradients(expected, upstream, inputs))


def test_gradients_under_autocast_are_bfloat16_products_of_codes() -> None:
    x, w, b = linear_case((64, 96))
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(
            encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT), b, "onnxruntime"
        )
    plain = products.linear(
        encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT), b, "onnxruntime"
    )
    assert y.dtype == torch.float32
    assert torch.equal(y, plain), "the forward pass is the deployed one"
    upstream = torch.randn_like(y)
    # dy and the result are rounded to 8 bits: 2^-9 each, relative to sums of terms with both signs
    assert_close(gradients(y, upstream, [x, w, b]), gradients(plain, upstream, [x, w, b]), relative=2**-7)


CONVOLUTIONS = [(5, 7, 3, 1, 1, 1), (6, 8, 3, 2, 1, 2), (4, 4, 1, 1, 0, 1), (3, 6, 3, 1, 1, 3)]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("factor", [False, True])
def test_convolution(case: tuple[int, ...], layout: torch.memory_format, factor: bool) -> None:
    channels, filters, kernel, stride, padding, groups = case
    torch.manual_seed(0)
    x, w, b = leaves(
        torch.randn(3, channels, 9, 9).contiguous(memory_format=layout) * 2,
        torch.randn(filters, channels // groups, kernel, kernel), torch.randn(filters),
    )  # fmt: skip
    f = (torch.rand(filters) + 0.5).requires_grad_() if factor else None
    geometry = Geometry([stride] * 2, [padding] * 2, [1, 1], groups)
    y = coded_conv.convolution(
        encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT), b, f, geometry
    )
    assert y.is_contiguous(memory_format=layout)
    operands = fake_quantize_by(x, ACTIVATION, SCALE, ZERO), fake_quantize_by(w, WEIGHT)
    expected = F.conv2d(*operands, None, stride, padding, 1, groups)
    expected = (expected if f is None else expected * f.view(-1, 1, 1)) + b.view(-1, 1, 1)
    assert_close([y], [expected])
    inputs = [x, w, b] + ([] if f is None else [f])
    upstream = torch.randn(y.shape)
    assert_close(gradients(y, upstream, inputs), gradients(expected, upstream, inputs))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolution_requantized(relu: bool, engine: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x, w, b = leaves(torch.randn(3, 5, 9, 9).contiguous(memory_format=layout), torch.randn(7, 5, 3, 3), torch.randn(7))
    y, geometry = Affine.of(0.04, 0 if relu else 120, 0, 255), Geometry([1, 1], [1, 1], [1, 1], 1)
    coded_x, coded_w = encode(x, SCALE, ZERO, ACTIVATION, engine), encode_weight(w, WEIGHT)
    place, codes = coded_conv.convolution_requantized(coded_x, coded_w, b, geometry, engine, y, relu)
    found = decode(Coded(place, codes, y.scale, y.zero_point - 128, ACTIVATION.integer, 128))
    x_codes = ops.quantize(x.detach(), float(SCALE), int(ZERO), 0, 255, engine, "")
    w_scale = coded_w.scale.reshape(-1)
    term = engine_named(engine).bias_term(b.detach(), SCALE * w_scale)
    expected_codes = ops.conv_requantize(
        x_codes, float(SCALE), int(ZERO), coded_w.codes, w_scale, term, *([1, 1],) * 3, 1, float(y.scale), int(y.zero_point), 0, 255,
        engine, "",
    )  # fmt: skip
    assert torch.equal(codes.to(torch.int16) + 128, expected_codes.to(torch.int16))
    real = F.conv2d(fake_quantize_by(x, ACTIVATION, SCALE, ZERO), fake_quantize_by(w, WEIGHT), b, 1, 1)
    expected = fake_quantize_by(real.relu() if relu else real, ACTIVATION, y.scale, y.zero_point)
    upstream = torch.randn(found.shape)
    assert_close(gradients(found, upstream, [x, w, b]), gradients(expected, upstream, [x, w, b]))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_add(relu: bool, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    a, b = leaves(torch.randn(3, 5, 9, 9).contiguous(memory_format=layout), torch.randn(3, 5, 9, 9))
    y = Affine.of(0.02, 0 if relu else 128, 0, 255)
    coded = [encode(t, SCALE, ZERO, ACTIVATION, "onnxruntime") for t in (a, b)]
    place, codes = coded_add.add(*coded, y, relu, "onnxruntime")
    found = decode(Coded(place, codes, y.scale, y.zero_point - 128, ACTIVATION.integer, 128))
    parts = [(c.own_codes(), float(SCALE), int(ZERO)) for c in coded]
    expected_codes = ops.add_requantize(
        *parts[0], *parts[1], float(y.scale), int(y.zero_point), 0, 255, "onnxruntime", ""
    )
    assert torch.equal(codes.to(torch.int16) + 128, expected_codes.to(torch.int16))
    total = sum(fake_quantize_by(t, ACTIVATION, SCALE, ZERO) for t in (a, b))
    assert isinstance(total, Tensor)
    upstream = torch.randn(found.shape)
    expected = fake_quantize_by(total.relu() if relu else total, ACTIVATION, y.scale, y.zero_point)
    assert_close(gradients(found, upstream, [a, b]), gradients(expected, upstream, [a, b]))


PROBABILITY = Affine.of(1 / 255, 0, 0, 255)


@pytest.mark.parametrize("requantized", [False, True])
@pytest.mark.parametrize(("engine", "format"), [("onnxruntime", ACTIVATION), ("openvino", SIGNED)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(requantized: bool, engine: str, format, masked: bool) -> None:
    torch.manual_seed(0)
    batch, heads, rows, columns, width = 2, 3, 7, 9, 16
    q, k, v = leaves(*(torch.randn(batch, heads, n, width) for n in (rows, columns, columns)))
    zero = ZERO if format is ACTIVATION else torch.tensor(0.0)
    mask = torch.zeros(batch, 1, 1, columns).masked_fill(torch.arange(columns) > 6, -1e9) if masked else None
    y = Affine.of(0.015, 128, 0, 255) if requantized else None
    coded = [encode(t, SCALE, zero, format, engine) for t in (q, k, v)]
    found, codes = coded_attention.attention(*coded, mask, width**-0.5, 0.0, PROBABILITY, y, engine, keep=True)
    hats = [fake_quantize_by(t, format, SCALE, zero) for t in (q, k, v)]
    scores = hats[0] @ hats[1].transpose(-1, -2) * width**-0.5
    p = torch.softmax(scores if mask is None else scores + mask, -1)
    p_hat = fake_quantize_by(p, ACTIVATION, PROBABILITY.scale, PROBABILITY.zero_point)
    expected = p_hat @ hats[2]
    expected = expected if y is None else fake_quantize_by(expected, ACTIVATION, y.scale, y.zero_point)
    assert (codes.float() - p * 255).abs().max() <= 0.5 + 1e-3, (
        "codes of the probabilities: rounded, p itself to float32"
    )
    assert (found - expected).abs().max() <= (0.015 if requantized else 0.02), "one code at ties, if at all"
    assert ((found - expected).abs() > 1e-5).float().mean() <= 0.01
    upstream = torch.randn_like(found)
    assert_close(gradients(found, upstream, [q, k, v]), gradients(expected, upstream, [q, k, v]))


def test_dropout_of_attention_keeps_its_share_and_its_expectation() -> None:
    torch.manual_seed(0)
    q, k, v = leaves(*(torch.randn(8, 4, 64, 8) for _ in range(3)))
    coded = [encode(t, SCALE, ZERO, ACTIVATION, "onnxruntime") for t in (q, k, v)]
    plain = coded_attention.attention(*coded, None, 1.0, 0.0, PROBABILITY, None, "onnxruntime")[0]
    found, codes = coded_attention.attention(*coded, None, 0.0, 0.25, PROBABILITY, None, "onnxruntime", keep=True)
    share = (codes > 0).float().mean()  # scaling 0: every probability is 1/64, code 4, and 5 divided by 0.75
    assert abs(float(share) - 0.75) < 4 * (0.75 * 0.25 / codes.numel()) ** 0.5, "four standard deviations"
    assert set(codes.unique().tolist()) == {0, 5}
    found.sum().backward()
    assert q.grad is not None
    assert torch.isfinite(q.grad).all()
    assert plain.shape == found.shape


def test_relu_and_quantizer_in_one() -> None:
    x = torch.linspace(-3, 6, 1001).requires_grad_()
    coded = encode(x, SCALE, torch.tensor(10.0), ACTIVATION, "onnxruntime", relu=True)
    expected = fake_quantize_by(x.relu(), ACTIVATION, SCALE, torch.tensor(10.0))
    assert torch.equal(decode(coded), expected)
    upstream = torch.randn(1001)
    assert torch.equal(gradients(decode(coded), upstream, [x])[0], gradients(expected, upstream, [x])[0])
    with pytest.raises(SchemeError, match="a ReLU and a learned scale"):
        encode(x, SCALE.clone().requires_grad_(), ZERO, ACTIVATION, "onnxruntime", relu=True)


def test_a_weight_with_a_zero_point_is_refused() -> None:
    with pytest.raises(SchemeError, match="symmetric=True"):
        encode_weight(torch.randn(4, 4), scheme("int8", "channel", symmetric=False, scale="dynamic"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_gradients_back(dtype: torch.dtype) -> None:
    x, w = leaves(torch.randn(4, 32, dtype=dtype), torch.randn(8, 32, dtype=dtype))
    y = products.linear(
        encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT), None, "onnxruntime"
    )
    y.sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.dtype == w.grad.dtype == dtype


@pytest.mark.parametrize("leads", [False, True])
@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 40, 1), (0, 4, 4), (64, 0, 3)], ids=str)
def test_float_products_of_any_strides(
    leads: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product_gradients, "onednn_leads", lambda: leads)
    torch.manual_seed(0)
    m, k, n = shape
    a, b = torch.randn(k, m).t(), torch.randn(n, k).t()
    assert_close([product_gradients.float_product(a, b)], [(a.double() @ b.double()).float()])


def test_operators_are_proper() -> None:
    torch.manual_seed(0)
    x, w, b = linear_case((5, 33))
    args = (x, SCALE, ZERO, ACTIVATION.text, "onnxruntime", False, False)
    torch.library.opcheck(torch.ops.qatana.encode.default, args)
    torch.library.opcheck(torch.ops.qatana.encode_weight.default, (w, None, None, WEIGHT.text, False))
    coded_x, coded_w = encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT)
    places = torch.zeros(5, 33, requires_grad=True), torch.zeros(20, 33, requires_grad=True)
    head = (places[0], *coded_x[1:4], places[1], coded_w.codes, coded_w.scale)
    torch.library.opcheck(torch.ops.qatana.coded_linear.default, (*head, b, "onnxruntime", False))
    torch.library.opcheck(torch.ops.qatana.decode.default, (places[0], *coded_x[1:4]))
