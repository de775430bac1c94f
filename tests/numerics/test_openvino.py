"""OpenVINO's arithmetic against OpenVINO itself: every output equal, on near-tie data, where formulas that differ in one rounding differ.

Weights lie in [-63, 63] and activations of the second operand of a product too: without VNNI OpenVINO's kernels saturate otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.compare import same, tensor
from support.openvino_kernels import Grid, Model, f32, near, near_tie_scale

from qatana.numerics import Affine, engine
from qatana.numerics.engine import Engine

ops = torch.ops.qatana
OV = "openvino"
pytestmark = [pytest.mark.engine, pytest.mark.slow]
I8, U8 = np.int8, np.uint8


def scales(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.uniform(0.01, 0.1, n).astype(f32)


def draw(rng: np.random.Generator, grid: Grid, shape: tuple[int, ...], width: int = 60) -> np.ndarray:
    return np.clip(grid.zero + rng.integers(-width, width + 1, shape), *grid.range).astype(grid.type)


GRIDS = {"int8 0": (I8, 0), "uint8 0": (U8, 0), "uint8 1": (U8, 1), "uint8 117": (U8, 117), "uint8 255": (U8, 255)}


@pytest.mark.parametrize("kind", GRIDS)
def test_quantize(kind: str) -> None:
    """Values within a few ulp of k + 0.5, and the ends of the floats."""
    rng = np.random.default_rng(list(GRIDS).index(kind))
    for _ in range(12):
        grid = Grid(f32(10 ** rng.uniform(-4, 1)), GRIDS[kind][1], GRIDS[kind][0])
        x = ((rng.integers(-300, 300, (3, 40, 64)) + 0.5) * np.float64(grid.scale)).astype(f32)
        for _ in range(3):
            x = np.nextafter(x, np.where(rng.random(x.shape) < 0.5, f32(np.inf), f32(-np.inf)))
        x[0, 0, :5] = [np.inf, -np.inf, 3e38, 0.0, -0.0]
        model = Model()
        theirs, _ = model.run(model.quantize(model.entry("x", x), grid), grid.type)
        same(ops.quantize(tensor(x), *grid.output()), theirs)


def test_the_near_ties_tell_onnx_runtimes_rule_from_openvinos() -> None:
    rng = np.random.default_rng(3)
    y = Affine.of(0.0371, 117, 0, 255)
    x = torch.from_numpy(((rng.integers(-100, 100, 5000) + 0.5) * 0.0371).astype(f32))
    assert (engine("onnxruntime").levels(x, y) != engine(OV).levels(x, y)).float().mean() > 0.01


INPUTS = {"uint8 117": (U8, 117), "uint8 1": (U8, 1), "uint8 0": (U8, 0), "int8 0": (I8, 0)}
OUTPUTS = {
    "int8 0": Grid(f32(0), 0, I8), "uint8 0": Grid(f32(0), 0, U8), "uint8 128": Grid(f32(0), 128, U8),
    "7 bits": Grid(f32(0), 0, I8, (-63, 63)), "4 bits": Grid(f32(0), 7, U8, (0, 15)),
}  # fmt: skip


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("y_kind", OUTPUTS)
@pytest.mark.parametrize("x_kind", INPUTS)
def test_linear(x_kind: str, y_kind: str, rank: int) -> None:
    """P1 and P2: which one follows from the rank and the zero point of the input."""
    rng = np.random.default_rng([rank, len(x_kind), len(y_kind)])
    for _ in range(4):
        sx, sy = scales(rng, 2)
        x, y = Grid(sx, INPUTS[x_kind][1], INPUTS[x_kind][0]), OUTPUTS[y_kind]._replace(scale=sy)
        codes = draw(rng, x, (90, 48) if rank == 2 else (3, 30, 48))
        weight, scale = rng.integers(-9, 10, (40, 48)).astype(I8), near_tie_scale(rng, 40, y, sx)
        bias = near(rng.integers(-300, 300, 40) * (sx * scale), rng, 40).astype(f32)
        model = Model()
        product = model.op(
            "MatMul", model.codes("x", codes, x), model.op("Transpose", model.weight(weight, scale), perm=[1, 0])
        )
        theirs, kernels = model.run(model.quantize(model.op("Add", product, model.const(bias)), y), y.type)
        assert "FullyConnected:i8" in kernels
        ours = ops.linear_requantize(
            tensor(codes), *x.numbers(), tensor(weight), tensor(scale), tensor(bias), *y.output()
        )
        same(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("x_kind", INPUTS)
def test_linear_with_float_output(x_kind: str, rank: int, bias: bool) -> None:
    rng = np.random.default_rng([rank, bias, len(x_kind)])
    sx = scales(rng, 1)[0]
    x = Grid(sx, INPUTS[x_kind][1], INPUTS[x_kind][0])
    codes = draw(rng, x, (90, 48) if rank == 2 else (3, 30, 48), 255)
    weight, scale = rng.integers(-63, 64, (40, 48)).astype(I8), rng.uniform(0.001, 0.01, 40).astype(f32)
    b = rng.normal(0, 1, 40).astype(f32) if bias else None
    model = Model()
    out = model.op(
        "MatMul", model.codes("x", codes, x), model.op("Transpose", model.weight(weight, scale), perm=[1, 0])
    )
    theirs, kernels = model.run(out if b is None else model.op("Add", out, model.const(b)), np.float32)
    assert "FullyConnected:i8" in kernels
    same(ops.linear(tensor(codes), *x.numbers(), tensor(weight), tensor(scale), tensor(b), OV), theirs)


@pytest.mark.parametrize("function", ["Relu", "Gelu", "Tanh"])
@pytest.mark.parametrize("zero", [1, 40, 128])
def test_linear_function_quantize_is_one_kernel_and_the_three_operators(function: str, zero: int) -> None:
    """What a linear layer's input scheme is for: with a uint8 zero point above 0 the fused kernel rounds like QuantizeLinear alone.

    Tanh and GELU are OpenVINO's own, taken from its float output: this is about the rounding behind them."""
    rng = np.random.default_rng([zero, len(function)])
    for _ in range(4):
        sx, sy = scales(rng, 2)
        x, y = Grid(sx, 120), Grid(sy if function != "Tanh" else f32(sy / 10), zero)
        codes = draw(rng, x, (3, 30, 48))
        weight, scale = rng.integers(-9, 10, (40, 48)).astype(I8), near_tie_scale(rng, 40, y, sx)
        bias = near(rng.integers(-300, 300, 40) * (sx * scale), rng, 40).astype(f32)

        def build(
            model: Model, codes: np.ndarray = codes, x: Grid = x, w: Any = (weight, scale), b: np.ndarray = bias
        ) -> str:
            product = model.op(
                "MatMul", model.codes("x", codes, x), model.op("Transpose", model.weight(*w), perm=[1, 0])
            )
            return model.op(function, model.op("Add", product, model.const(b)))

        one, other = Model(), Model()
        theirs, kernels = one.run(one.quantize(build(one), y), U8)
        assert kernels == ["FakeQuantize", "FullyConnected:i8"]  # the input's, and everything else
        floats, _ = other.run(build(other), np.float32)
        same(ops.quantize(tensor(floats), *y.output()), theirs)


CONVOLUTIONS = {
    # input (C, H, W), outputs, kernel, stride, padding, groups
    "3x3": ((8, 9, 9), 8, (3, 3), 1, 1, 1), "strided": ((3, 12, 12), 16, (3, 3), 2, 1, 1), "1x1": ((16, 7, 7), 12, (1, 1), 1, 0, 1),
    "depthwise": ((16, 9, 9), 16, (3, 3), 1, 1, 16), "groups": ((16, 9, 9), 16, (3, 3), 1, 1, 4),
    "one channel": ((1, 14, 14), 16, (3, 3), 1, 1, 1), "stem": ((3, 16, 16), 8, (7, 7), 2, 3, 1),
}  # fmt: skip


class Drawn:
    """A convolution of near-tie data."""

    def __init__(self, case: str, x: Grid, y: Grid, rng: np.random.Generator, bias: bool = True) -> None:
        self.shape, n, size, self.stride, self.padding, self.groups = CONVOLUTIONS[case]
        self.x, self.y = x, y
        self.codes = draw(rng, x, (4, *self.shape), 40)
        self.weight = rng.integers(-9, 10, (n, self.shape[0] // self.groups, *size)).astype(I8)
        self.scale = near_tie_scale(rng, n, y, x.scale)
        bias_codes = rng.integers(-300, 300, n) * (x.scale * self.scale)
        self.bias = near(bias_codes, rng, n).astype(f32) if bias else None

    def build(self, model: Model) -> str:
        biases = [] if self.bias is None else [model.const(self.bias)]
        return model.op(
            "Conv", model.codes("x", self.codes, self.x), model.weight(self.weight, self.scale), *biases, strides=[self.stride] * 2,
            kernel_shape=self.weight.shape[2:], pads=[self.padding] * 4, group=self.groups,
        )  # fmt: skip

    @property
    def arguments(self) -> tuple[Any, ...]:
        one = (1, 1)
        return (
            tensor(self.codes), *self.x.numbers(), tensor(self.weight), tensor(self.scale), tensor(self.bias),
            [self.stride] * 2, [self.padding] * 2, one, self.groups,
        )  # fmt: skip


@pytest.mark.parametrize("y_kind", ["uint8 0", "uint8 128", "4 bits"])
@pytest.mark.parametrize("zero", [0, 117])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, zero: int, y_kind: str) -> None:
    """The ReLU of a convolution is the clamp at a zero point of 0."""
    rng = np.random.default_rng([zero, list(CONVOLUTIONS).index(case)])
    for relu in (False, True) if y_kind == "uint8 0" else (False,):
        sx, sy = scales(rng, 2)
        conv = Drawn(case, Grid(sx, zero), OUTPUTS[y_kind]._replace(scale=sy), rng)
        model = Model()
        out = conv.build(model)
        theirs, kernels = model.run(model.quantize(model.op("Relu", out) if relu else out, conv.y), U8)
        assert any(kind in kernels for kind in ("Convolution:i8", "GroupConvolution:i8"))
        same(ops.conv_requantize(*conv.arguments, *conv.y.output()), theirs)


@pytest.mark.parametrize("zero", [0, 117])
def test_convolution_without_bias(zero: int) -> None:
    rng = np.random.default_rng(zero)
    for case in CONVOLUTIONS:
        sx, sy = scales(rng, 2)
        conv, model = Drawn(case, Grid(sx, zero), Grid(sy), rng, bias=False), Model()
        theirs, _ = model.run(model.quantize(conv.build(model), conv.y), U8)
        same(ops.conv_requantize(*conv.arguments, *conv.y.output()), theirs)


@pytest.mark.parametrize("other_kind", INPUTS)
@pytest.mark.parametrize(("relu", "zero"), [(False, 0), (False, 117), (True, 0)])
def test_convolution_with_a_sum(relu: bool, zero: int, other_kind: str) -> None:
    """One kernel; the convolution's own output is not rounded."""
    rng = np.random.default_rng([relu, zero, len(other_kind)])
    for case in ("3x3", "1x1", "depthwise"):
        for bias in (True, False, True, False):
            sx, sy = scales(rng, 2)
            other = Grid(
                f32(sy * near(rng.choice([0.5, 0.25, 1.5]), rng, 1)[0]), INPUTS[other_kind][1], INPUTS[other_kind][0]
            )
            conv, model = Drawn(case, Grid(sx), Grid(sy, zero), rng, bias), Model()
            space = conv.shape[1:]
            summand = draw(rng, other, (4, len(conv.scale), *space))
            total = model.op("Add", conv.build(model), model.codes("other", summand, other))
            theirs, kernels = model.run(model.quantize(model.op("Relu", total) if relu else total, conv.y), U8)
            assert not {"Eltwise", "Subgraph"} & set(kernels)
            same(ops.conv_add_requantize(*conv.arguments, tensor(summand), *other.numbers(), *conv.y.output()), theirs)


@pytest.mark.parametrize("a_type", [I8, U8])
@pytest.mark.parametrize("y", [OUTPUTS["int8 0"], OUTPUTS["uint8 128"]], ids=["int8 0", "uint8 128"])
def test_product_of_activations(a_type: type, y: Grid) -> None:
    rng = np.random.default_rng([a_type is U8, y.zero])
    for _ in range(6):
        sa, sb = scales(rng, 2)
        a, b = Grid(sa, 0, a_type), Grid(sb, 0, I8)
        y = y._replace(scale=f32(np.float64(sa) * np.float64(sb) * 2 * (2 * rng.integers(10, 40) + 1)))
        left, right = draw(rng, a, (2, 3, 24, 16), 12), draw(rng, b, (2, 3, 16, 24), 12)
        model = Model(free=3)
        product = model.op("MatMul", model.codes("a", left, a), model.codes("b", right, b))
        theirs, kernels = model.run(model.quantize(product, y), y.type)
        assert "MatMul:i8" in kernels
        same(ops.matmul_requantize(tensor(left), *a.numbers(), tensor(right), *b.numbers(), *y.output()), theirs)


def test_product_of_activations_with_float_output() -> None:
    """Scores as attention computes them: the query's scale has the scaling folded in, the key is turned."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        sa, sb = scales(rng, 2)
        a, b, folded = Grid(sa, 0, I8), Grid(sb, 0, I8), f32(sa * f32(32**-0.5))
        left, right = draw(rng, a, (2, 3, 24, 16), 128), draw(rng, b, (2, 3, 24, 16), 63)
        model = Model(free=3)
        turned = model.op("Transpose", model.codes("b", right, b), perm=[0, 1, 3, 2])
        theirs, kernels = model.run(model.op("MatMul", model.codes("a", left, a, folded), turned), np.float32)
        assert "MatMul:i8" in kernels
        ours = ops.matmul(tensor(left), float(folded), 0, tensor(right).transpose(-1, -2), *b.numbers(), OV)
        same(ours, theirs)


@pytest.mark.parametrize("b_type", [U8, I8])
@pytest.mark.parametrize(
    "y", [OUTPUTS["uint8 0"], OUTPUTS["uint8 128"], OUTPUTS["int8 0"]], ids=["uint8 0", "uint8 128", "int8 0"]
)
def test_sum_behind_a_relu(b_type: type, y: Grid) -> None:
    """The sums that the formula covers; those of two signed tensors differ at ties in one set of scales of eight (not understood)."""
    rng = np.random.default_rng([b_type is U8, y.zero, y.type is I8])
    for _ in range(10):
        sa = scales(rng, 1)[0]
        a, b = Grid(sa), Grid(f32(near(sa * rng.choice([0.5, 1, 1.5, 3]), rng, 1)[0]), 0, b_type)
        y = y._replace(scale=f32(near(2 * sa * rng.choice([1, 1.5, 2]), rng, 1)[0]))
        left, right = draw(rng, a, (8, 4, 16, 16), 255), draw(rng, b, (8, 4, 16, 16), 255)
        model = Model()
        total = model.op("Add", model.codes("a", left, a), model.codes("b", right, b))
        theirs, _ = model.run(model.quantize(total, y), y.type)
        same(ops.add_requantize(tensor(left), *a.numbers(), tensor(right), *b.numbers(), *y.output()), theirs)


@pytest.mark.parametrize("side", [(2, 2), (7, 7), (4, 6), (3, 3), (8, 8)])
@pytest.mark.parametrize(
    "y", [OUTPUTS["uint8 0"], OUTPUTS["uint8 128"], OUTPUTS["int8 0"]], ids=["uint8 0", "uint8 128", "int8 0"]
)
def test_global_average_pool(side: tuple[int, int], y: Grid) -> None:
    rng = np.random.default_rng([*side, y.zero])
    for _ in range(4):
        x = Grid(scales(rng, 1)[0])
        y = y._replace(scale=f32(near(x.scale, rng, 1)[0]))
        codes, model = draw(rng, x, (16, 32, *side), 255), Model()
        theirs, _ = model.run(model.quantize(model.op("GlobalAveragePool", model.codes("x", codes, x)), y), y.type)
        same(ops.global_average_pool_requantize(tensor(codes), *x.numbers(), *y.output()), theirs)


# -- gradients ---------------------------------------------------------------------------------------------------------
def test_gradients_are_straight_through() -> None:
    """d level / dx = 1 / scale inside the range and 0 outside, whatever the engine rounds."""
    x = torch.linspace(-20, 20, 401, requires_grad=True)
    for zero, lo in ((0, -128), (117, 0), (0, 0)):
        y = Affine.of(0.1, zero, lo, lo + 255)
        levels = engine(OV).levels(x, y)
        (gradient,) = torch.autograd.grad(levels.sum(), x)
        t = torch.round(x.detach() / 0.1)
        inside = (t > lo - zero) & (t < lo + 255 - zero)
        outside = (t < lo - zero) | (t > lo + 255 - zero)
        # isc is 1 / scale up to two roundings
        assert torch.allclose(gradient[inside], torch.tensor(10.0), rtol=2.0**-22)
        assert not gradient[outside].any()


@pytest.mark.parametrize("zero", [0, 117])
@pytest.mark.parametrize(
    "name", ["linear_levels", "conv_levels", "conv_add_levels", "product_levels", "average_pool_levels"]
)
def test_gradients_reach_every_operand(name: str, zero: int) -> None:
    """Same gradient as ONNX Runtime's rule for the same operands, where that has one: both are straight-through."""
    y, p = Affine.of(0.05, zero, 0, 255), Affine.of(0.02, 3, 0, 255)
    acc = torch.arange(-40.0, 60.0).reshape(10, 10).requires_grad_()
    s32, bias = torch.full((10,), 0.01), torch.linspace(-0.2, 0.2, 10).requires_grad_()

    def levels(of: Engine) -> torch.Tensor:
        arguments: dict[str, tuple[Any, ...]] = {
            "linear_levels": (acc, s32, of.bias_term(bias, s32), y, 0), "conv_levels": (acc, s32, of.bias_term(bias, s32), y),
            "conv_add_levels": (acc, s32, bias, torch.ones(10, 10), p, y), "product_levels": (acc, torch.tensor(0.01), y),
            "average_pool_levels": (acc, 7, p, y),
        }  # fmt: skip
        return getattr(of, name)(*arguments[name])

    found = torch.autograd.grad(levels(engine(OV)).sum(), acc)[0]
    unit = {"average_pool_levels": 0.02 / 7}.get(name, 0.01)
    assert set(np.unique(np.round(found.numpy() / (unit / 0.05), 4))) <= {0.0, 1.0}
    assert found.any()
    if name != "conv_add_levels":
        expected = torch.autograd.grad(levels(engine("onnxruntime")).sum(), acc)[0]
        assert (
            torch.isclose(found, expected, rtol=1e-5)
        ).float().mean() > 0.95  # at the ends of the range the bias rounds otherwise
