"""The affine equation against ONNX's reference evaluator, torch's own fake-quantize and the papers' closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qatana.numerics import (
    IntFormat,
    dequantize,
    fake_quantize,
    levels,
    quantize,
    replace_forward,
    round_clamp,
    scale_gradient,
)

ONNX_TYPES = {
    "int8": TensorProto.INT8, "uint8": TensorProto.UINT8, "int4": TensorProto.INT4, "uint4": TensorProto.UINT4,
}  # fmt: skip


def reference(
    x: np.ndarray, scale: np.ndarray, zero: np.ndarray, kind: str, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values that the ONNX reference implementation of QuantizeLinear and DequantizeLinear gives."""
    proto = ONNX_TYPES[kind]
    zero_point = helper.make_tensor("z", proto, zero.shape, [int(v) for v in zero.ravel()])
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
            helper.make_node("Cast", ["q"], ["c"], to=TensorProto.INT32),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info(n, t, x.shape) for n, t in (("c", TensorProto.INT32), ("y", TensorProto.FLOAT))],
        [numpy_helper.from_array(scale, "s"), zero_point],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    codes, values = ReferenceEvaluator(model).run(None, {"x": x})
    return np.asarray(codes, np.int64), np.asarray(values)


def probes(scale: float) -> np.ndarray:
    """Ties (k + 0.5) * scale, their float neighbours, and values far outside every range."""
    ties = ((np.arange(-300, 300) + 0.5) * scale).astype(np.float32)
    near = np.concatenate([ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))])
    far = np.array([0.0, -0.0, 1e6, -1e6, 1e-40, -1e-40], np.float32) * np.float32(scale)
    return np.concatenate([near, far, np.random.default_rng(0).normal(0, 40 * scale, 2000).astype(np.float32)])


@pytest.mark.parametrize("kind", ["int8", "uint8", "int4", "uint4"])
@pytest.mark.parametrize("scale", [1.0, 0.0078125, 0.0123, 3.7])
def test_equals_onnx_reference_per_tensor(kind: str, scale: float) -> None:
    format, x = IntFormat.parse(kind), probes(scale)
    for zero in {format.lo, format.hi, 0, (format.lo + format.hi) // 2}:
        codes, values = reference(x, np.float32(scale), np.array(zero), kind, 1)
        ours = quantize(torch.from_numpy(x), torch.tensor(scale), float(zero), format)
        assert np.array_equal(ours.numpy().astype(np.int64), codes)
        assert np.array_equal(dequantize(ours, torch.tensor(scale), float(zero)).numpy(), values)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_equals_onnx_reference_per_channel(kind: str) -> None:
    format, rng = IntFormat.parse(kind), np.random.default_rng(1)
    x = rng.normal(0, 3, (5, 40)).astype(np.float32)
    scale = rng.uniform(0.01, 0.2, 5).astype(np.float32)
    zero = rng.integers(format.lo, format.hi + 1, 5)
    codes, values = reference(x, scale, zero, kind, 0)
    s, z = torch.from_numpy(scale)[:, None], torch.from_numpy(zero.astype(np.float32))[:, None]
    assert np.array_equal(quantize(torch.from_numpy(x), s, z, format).numpy().astype(np.int64), codes)
    assert np.array_equal(fake_quantize(torch.from_numpy(x), s, z, format).numpy(), values)


def test_ties_go_to_even_and_the_zero_point_stays_outside() -> None:
    """By hand, scale 1, zero point 3: rint(v) + 3. Rounding v + 3 would send 0.5 to 4 and 1.5 to 4."""
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    assert quantize(x, torch.tensor(1.0), 3.0, IntFormat(8, signed=False)).tolist() == [1, 3, 3, 5, 5]


def test_infinities_saturate() -> None:
    x = torch.tensor([torch.inf, -torch.inf, 3.4e38, -3.4e38])
    assert quantize(x, torch.tensor(0.1), 7.0, IntFormat(8, signed=False)).tolist() == [255, 0, 255, 0]
    assert quantize(x, torch.tensor(0.1), 0.0, IntFormat.parse("int8n")).tolist() == [127, -127, 127, -127]


def test_the_scale_divides() -> None:
    """x / s, never x * (1 / s): the quotient decides at ties, and some of these quotients differ from the product."""
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.01, 1, 4000).astype(np.float32)
    x = (scale * (rng.integers(-100, 100, 4000) + 0.5).astype(np.float32)).astype(np.float32)
    expected = np.clip(np.rint(x / scale), -128, 127)
    by_reciprocal = np.clip(np.rint(x * (np.float32(1) / scale)), -128, 127)
    ours = quantize(torch.from_numpy(x), torch.from_numpy(scale), 0.0, IntFormat(8)).numpy()
    assert (expected != by_reciprocal).any()  # the data can tell
    assert np.array_equal(ours, expected)


@pytest.mark.parametrize("zero", [0, 3, 128])
def test_values_and_gradients_equal_torch_where_its_formula_is_ours(zero: int) -> None:
    """torch.fake_quantize_per_tensor_affine multiplies by 1 / scale: with scale a power of two that is the same number."""
    scale, x = 0.03125, torch.randn(4096) * 4
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = fake_quantize(a, torch.tensor(scale), float(zero), IntFormat(8, signed=False))
    theirs = torch.fake_quantize_per_tensor_affine(b, scale, zero, 0, 255)
    weights = torch.randn(4096)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    assert torch.equal(ours, theirs)
    assert a.grad is not None
    assert b.grad is not None
    assert torch.equal(a.grad, b.grad)
    assert 0 < int((a.grad == 0).sum()) < 4096


def test_the_gradient_mask_is_where_round_lies_inside() -> None:
    """int4, scale 1: 7.4 rounds to 7 (inside), 7.5 rounds to 8 (outside); -8.5 rounds to -8 (inside), -8.6 to -9."""
    x = torch.tensor([7.4, 7.5, 7.6, -8.4, -8.5, -8.6, 0.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), 0.0, IntFormat(4)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("name", ["int2", "int4", "int8n", "uint3", "uint8"])
@pytest.mark.parametrize("per_row", [False, True])
def test_scale_gradient_is_lsq(name: str, per_row: bool) -> None:
    """Esser et al. 2020, eq. 3, in float64: inside round(v) - v, below -Qn, above Qp, times the incoming gradient."""
    format = IntFormat.parse(name)
    x, upstream = torch.randn(6, 50) * 3, torch.randn(6, 50)
    scale = (torch.rand(6, 1) + 0.3 if per_row else torch.tensor(0.7)).requires_grad_()
    (fake_quantize(x, scale, 0.0, format) * upstream).sum().backward()
    v = (x / scale.detach()).double().numpy()  # the float32 quotient is what is rounded
    r = np.rint(v)
    local = np.where(r < format.lo, format.lo, np.where(r > format.hi, format.hi, r - v))
    expected = (local * upstream.double().numpy()).sum(1 if per_row else None, keepdims=per_row)
    # float32 sums of 50 or 300 terms: relative error of at most 300 roundings of 6e-8 of the sum of magnitudes
    bound = 300 * 6e-8 * np.abs(local * upstream.double().numpy()).sum()
    assert scale.grad is not None
    assert np.abs(scale.grad.numpy() - expected).max() <= bound


def test_scale_gradient_helper_changes_the_gradient_alone() -> None:
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.arange(5.0)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 0.25, 0.5, 0.75, 1.0]


def test_replace_forward_takes_one_value_and_the_other_gradient() -> None:
    a = torch.randn(5, requires_grad=True)
    exact = torch.arange(5.0)
    y = replace_forward(a * 3, exact)
    assert torch.equal(y, exact)
    y.sum().backward()
    assert a.grad is not None
    assert a.grad.tolist() == [3.0] * 5


def test_round_clamp_is_a_proper_torch_operator() -> None:
    """Schema, fake kernel and autograd registration, as torch checks them itself."""
    t = (torch.randn(4, 5) * 3).requires_grad_()
    torch.library.opcheck(torch.ops.qatana.round_clamp.default, (t, torch.tensor(-2.0), torch.tensor(1.0)))


def test_no_gradient_reaches_the_bounds() -> None:
    lower = torch.tensor(-1.0, requires_grad=True)
    y = round_clamp(torch.randn(10, requires_grad=True), lower, 2.0)
    y.sum().backward()
    assert lower.grad is None


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 2)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = fake_quantize(x, torch.tensor(0.5), 0.0, IntFormat(8))
    y.sum().backward()
    assert y.shape == x.shape
    assert quantize(x, torch.tensor(0.5), 0.0, IntFormat(8)).shape == x.shape


def test_levels_are_codes_minus_zero_point() -> None:
    x, scale = torch.randn(200), torch.tensor(0.02)
    codes = quantize(x, scale, 100.0, IntFormat(8, signed=False))
    assert torch.equal(levels(x, scale, 100.0, 0, 255), codes.float() - 100)
