"""The integer operators against ONNX Runtime's own kernels: every output equal, on random and on near-tie data.

Weights lie in [-63, 63]: without VNNI, x86 kernels add u8 x s8 products in pairs of saturating 16-bit integers, which 8-bit weights
overflow. Each test looks into the optimized graph for the integer kernel it claims to meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from support.compare import same, tensor
from support.kernels import f32, proto, session, tie_share

ops = torch.ops.qatana
ENGINE = "onnxruntime"
pytestmark = pytest.mark.engine


class Grid(NamedTuple):
    """Scale and zero point of a uint8 tensor."""

    scale: np.float32
    zero: int

    def constants(self, name: str) -> dict[str, np.ndarray]:
        return {f"{name}_s": np.asarray(self.scale, np.float32), f"{name}_z": np.asarray(self.zero, np.uint8)}

    def numbers(self) -> tuple[float, int]:
        return float(self.scale), self.zero


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], **attributes)


def dq(name: str) -> Any:
    return node("DequantizeLinear", f"{name} {name}_s {name}_z", f"{name}_f")


def kernel(
    tmp_path: Path,
    nodes: list[Any],
    inputs: dict[str, np.ndarray],
    output: str,
    constants: dict[str, np.ndarray],
    expected: str,
) -> np.ndarray:
    """What ONNX Runtime gives, once its optimized graph is seen to hold the operator `expected`."""
    model, optimized = proto(nodes, inputs, {"y": output}, constants), tmp_path / "optimized.onnx"
    running = session(model.SerializeToString(), optimized=str(optimized))
    kinds = {n.op_type for n in onnx.load(str(optimized)).graph.node}
    assert expected in kinds, kinds
    return running.run(None, inputs)[0]


def weight_constants(
    weight: np.ndarray, scale: np.ndarray, bias: np.ndarray | None, x_scale: np.float32
) -> dict[str, np.ndarray]:
    n = len(scale)
    out = {"w": weight, "w_s": scale, "w_z": np.zeros(n, np.int8)}
    if bias is not None:
        out |= {"b": bias, "b_s": (x_scale * scale).astype(np.float32), "b_z": np.zeros(n, np.int32)}
    return out


def weight_nodes(bias: bool) -> list[Any]:
    out = [node("DequantizeLinear", "w w_s w_z", "w_f", axis=0)]
    return [*out, node("DequantizeLinear", "b b_s b_z", "b_f", axis=0)] if bias else out


def draw_weight(
    rng: np.random.Generator, shape: tuple[int, ...], x: Grid, y: Grid, near: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Weight codes and scales. Near ties: small codes, and scales for which the multiplier is about 1 / (2 q), q odd, so that one
    accumulator in 2 q lands on k + 0.5, give or take the roundings of the scales."""
    high = 3 if near else 63
    weight = rng.integers(-high, high + 1, shape).astype(np.int8)
    multiplier = 0.5 / (2 * rng.integers(0, 5, shape[0]) + 1) if near else rng.uniform(0.3, 1.5, shape[0]) / 60
    scale = (multiplier * np.float64(y.scale) / np.float64(x.scale)).astype(np.float32)
    return weight, scale


def grids(rng: np.random.Generator) -> tuple[Grid, Grid]:
    a, b = rng.uniform(0.003, 0.2, 2).astype(np.float32)
    return Grid(a, int(rng.integers(0, 256))), Grid(b, int(rng.integers(0, 256)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("requantize", [True, False])
def test_linear(tmp_path: Path, seed: int, requantize: bool) -> None:
    rng, near, bias = np.random.default_rng(seed), seed % 2 == 1, seed % 3 != 2
    x, y = grids(rng)
    m, k, n = 257, int(rng.integers(5, 90)), int(rng.integers(3, 70))
    codes = rng.integers(0, 256, (m, k)).astype(np.uint8)
    weight, scale = draw_weight(rng, (n, k), x, y, near)
    b = rng.integers(-900, 900, n).astype(np.int32) if bias else None
    nodes = [
        dq("x"),
        *weight_nodes(bias),
        node("Gemm", "x_f w_f b_f" if bias else "x_f w_f", "g" if requantize else "y", transB=1),
    ]
    constants = x.constants("x") | weight_constants(weight, scale, b, x.scale)
    head = (tensor(codes), *x.numbers(), tensor(weight), tensor(scale), tensor(b))
    if not requantize:
        theirs = kernel(tmp_path, nodes, {"x": codes}, "float32", constants, "QGemm")
        same(ops.linear(*head, ENGINE), theirs)
        return
    nodes.append(node("QuantizeLinear", "g q_s q_z", "y"))
    theirs = kernel(tmp_path, nodes, {"x": codes}, "uint8", constants | y.constants("q"), "QGemm")
    same(ops.linear_requantize(*head, *y.numbers(), 0, 255, ENGINE, "y"), theirs)
    if near and bias:
        acc = (codes.astype(np.int64) - x.zero) @ weight.T.astype(np.int64) + b
        value = acc * (np.float64(x.scale) * scale) / np.float64(y.scale)
        assert tie_share(value) > 0.03  # the data are what they claim to be
        sums = f32(acc - b) * (x.scale * scale) + f32(b) * (x.scale * scale)
        naive = np.clip(np.rint(sums.astype(np.float32) / y.scale) + y.zero, 0, 255)
        assert (naive != theirs).any()  # and they can tell: dequantize, add, quantize is not the kernel


def test_linear_beyond_24_bits(tmp_path: Path) -> None:
    """|acc| up to 20 million: float32 cannot hold every such integer, so the operator has to leave it."""
    rng = np.random.default_rng(5)
    k = 1400
    codes = rng.integers(250, 256, (33, k)).astype(np.uint8)
    weight = rng.integers(50, 64, (7, k)).astype(np.int8)
    scale, b = rng.uniform(0.001, 0.002, 7).astype(np.float32), rng.integers(-9, 9, 7).astype(np.int32)
    x = Grid(f32(0.01), 1)
    assert int(((codes.astype(np.int64) - 1) @ weight.T.astype(np.int64)).max()) > 2**24
    nodes = [dq("x"), *weight_nodes(True), node("Gemm", "x_f w_f b_f", "y", transB=1)]
    theirs = kernel(
        tmp_path,
        nodes,
        {"x": codes},
        "float32",
        x.constants("x") | weight_constants(weight, scale, b, x.scale),
        "QGemm",
    )
    same(ops.linear(tensor(codes), *x.numbers(), tensor(weight), tensor(scale), tensor(b), ENGINE), theirs)


CONVOLUTIONS = {
    # input (C, *space), outputs, kernel, stride, padding, dilation, groups
    "2d": ((6, 9, 11), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "2d pointwise": ((8, 7, 7), 12, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2d strided": ((3, 12, 12), 8, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "2d dilated, one-sided": ((4, 12, 13), 5, (3, 1), (1, 2), (2, 0), (2, 1), 1),
    "2d groups": ((8, 9, 9), 12, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    "2d depthwise": ((8, 9, 9), 8, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "2d depthwise x 2": ((6, 9, 9), 12, (3, 3), (2, 2), (1, 1), (1, 1), 6),
    "2d stem": ((3, 16, 16), 8, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "1d": ((5, 40), 7, (5,), (2,), (2,), (1,), 1),
    "1d depthwise dilated": ((8, 40), 8, (3,), (1,), (2,), (2,), 8),
}


@pytest.mark.parametrize("near", [False, True], ids=["random", "near ties"])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(tmp_path: Path, case: str, near: bool) -> None:
    shape, n, size, stride, padding, dilation, groups = CONVOLUTIONS[case]
    rng = np.random.default_rng(list(CONVOLUTIONS).index(case))
    x, y = grids(rng)
    codes = rng.integers(0, 256, (4, *shape)).astype(np.uint8)
    weight, scale = draw_weight(rng, (n, shape[0] // groups, *size), x, y, near)
    b = None if case == "2d groups" else rng.integers(-500, 500, n).astype(np.int32)
    nodes = [
        dq("x"),
        *weight_nodes(b is not None),
        node(
            "Conv", "x_f w_f" if b is None else "x_f w_f b_f", "c", kernel_shape=size, strides=stride,
            pads=[*padding, *padding], dilations=dilation, group=groups,
        ),
        node("QuantizeLinear", "c q_s q_z", "y"),
    ]  # fmt: skip
    constants = x.constants("x") | weight_constants(weight, scale, b, x.scale) | y.constants("q")
    theirs = kernel(tmp_path, nodes, {"x": codes}, "uint8", constants, "QLinearConv")
    ours = ops.conv_requantize(
        tensor(codes), *x.numbers(), tensor(weight), tensor(scale), tensor(b), stride, padding, dilation, groups,
        *y.numbers(), 0, 255, ENGINE, "y",
    )  # fmt: skip
    same(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("requantize", [True, False])
def test_product_of_activations(tmp_path: Path, seed: int, requantize: bool) -> None:
    """u8 x u8, both of all 256 codes: exact without VNNI too."""
    rng, near = np.random.default_rng(seed), seed % 2 == 1
    a, b = grids(rng)
    width = 4 if near else 256
    left = np.clip(a.zero + rng.integers(-width, width, (2, 3, 17, 24)), 0, 255).astype(np.uint8)
    right = np.clip(b.zero + rng.integers(-width, width, (2, 3, 24, 19)), 0, 255).astype(np.uint8)
    multiplier = 1 / 6 if near else 1 / 3000
    y = Grid(f32(np.float64(a.scale) * np.float64(b.scale) / multiplier), 128)
    nodes = [dq("a"), dq("b"), node("MatMul", "a_f b_f", "p" if requantize else "y")]
    constants = a.constants("a") | b.constants("b")
    head = (tensor(left), *a.numbers(), tensor(right), *b.numbers())
    if not requantize:
        theirs = kernel(tmp_path, nodes, {"a": left, "b": right}, "float32", constants, "MatMulIntegerToFloat")
        same(ops.matmul(*head, ENGINE), theirs)
        return
    nodes.append(node("QuantizeLinear", "p q_s q_z", "y"))
    theirs = kernel(tmp_path, nodes, {"a": left, "b": right}, "uint8", constants | y.constants("q"), "QLinearMatMul")
    same(ops.matmul_requantize(*head, *y.numbers(), 0, 255, ENGINE, "y"), theirs)


@pytest.mark.parametrize("seed", range(8))
def test_add(tmp_path: Path, seed: int) -> None:
    """The zero point lies inside the rounding here, and sums are fused multiply-adds: only ties tell."""
    rng, near = np.random.default_rng(seed), seed % 2 == 1
    a, b = grids(rng)
    y = Grid(f32(rng.uniform(1, 2) * (a.scale + b.scale)), int(rng.integers(0, 256)))
    if near:  # both ratios about 1/2 or 1/4, some ulp off: a quarter to a half of the sums are ties
        y = Grid(f32(2 * a.scale * (1 + rng.integers(-3, 4) * 2.0**-23)), y.zero)
        b = Grid(f32(a.scale * rng.choice([0.5, 1.0, 1.5]) * (1 + rng.integers(-3, 4) * 2.0**-23)), b.zero)
    left, right = (rng.integers(0, 256, (3, 8, 20, 20)).astype(np.uint8) for _ in "ab")
    nodes = [dq("a"), dq("b"), node("Add", "a_f b_f", "s"), node("QuantizeLinear", "s q_s q_z", "y")]
    constants = a.constants("a") | b.constants("b") | y.constants("q")
    theirs = kernel(tmp_path, nodes, {"a": left, "b": right}, "uint8", constants, "QLinearAdd")
    ours = ops.add_requantize(
        tensor(left), *a.numbers(), tensor(right), *b.numbers(), *y.numbers(), 0, 255, ENGINE, "y"
    )
    same(ours, theirs)
    if near:
        value = ((left - f32(a.zero)) * a.scale + (right - f32(b.zero)) * b.scale) / y.scale
        assert tie_share(value.astype(np.float64)) > 0.05
        assert (np.clip(np.rint(value) + y.zero, 0, 255) != theirs).any()  # the data tell the zero point's place


def test_add_then_relu(tmp_path: Path) -> None:
    """With the output's zero point at the lowest code the ReLU is the saturation, and the engine drops it."""
    rng = np.random.default_rng(0)
    a, b = grids(rng)
    y = Grid(f32(a.scale + b.scale), 0)
    left, right = (rng.integers(0, 256, (3, 8, 20, 20)).astype(np.uint8) for _ in "ab")
    nodes = [
        dq("a"),
        dq("b"),
        node("Add", "a_f b_f", "s"),
        node("Relu", "s", "r"),
        node("QuantizeLinear", "r q_s q_z", "y"),
    ]
    constants = a.constants("a") | b.constants("b") | y.constants("q")
    theirs = kernel(tmp_path, nodes, {"a": left, "b": right}, "uint8", constants, "QLinearAdd")
    ours = ops.add_requantize(
        tensor(left), *a.numbers(), tensor(right), *b.numbers(), *y.numbers(), 0, 255, ENGINE, "y"
    )
    same(ours, theirs)


@pytest.mark.parametrize("seed", range(6))
def test_global_average_pool(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = grids(rng)
    side = (2, 7, 4, 5, 8, 3)[seed]
    if seed % 2 == 0:  # multiplier about 1 / n for an even n: sums that are odd multiples of n / 2 are near ties
        y = Grid(f32(x.scale * (1 + rng.integers(-2, 3) * 2.0**-23)), y.zero)
    codes = rng.integers(0, 256, (16, 64, side, side)).astype(np.uint8)
    nodes = [dq("x"), node("GlobalAveragePool", "x_f", "p"), node("QuantizeLinear", "p q_s q_z", "y")]
    theirs = kernel(
        tmp_path, nodes, {"x": codes}, "uint8", x.constants("x") | y.constants("q"), "QLinearGlobalAveragePool"
    )
    same(ops.global_average_pool_requantize(tensor(codes), *x.numbers(), *y.numbers(), 0, 255, ENGINE, "y"), theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_dynamic_linear(tmp_path: Path, seed: int, bias: bool) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.normal(0, 1, (5, 9, 32)) + seed).astype(np.float32)
    weight = rng.integers(-63, 64, (20, 32)).astype(np.int8)
    scale = rng.uniform(0.001, 0.01, 20).astype(np.float32)
    b = rng.normal(0, 1, 20).astype(np.float32) if bias else None
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["c", "s", "z"]),
        node("MatMulInteger", "c w z", "acc"),
        node("Cast", "acc", "f", to=1),
        node("Mul", "s w_s", "m"),
        node("Mul", "f m", "p" if bias else "y"),
    ]
    constants = {"w": np.ascontiguousarray(weight.T), "w_s": scale}
    if b is not None:
        nodes.append(node("Add", "p b", "y"))
        constants["b"] = b
    theirs = kernel(tmp_path, nodes, {"x": x}, "float32", constants, "DynamicQuantizeMatMul")
    same(ops.dynamic_linear(tensor(x), tensor(weight), tensor(scale), tensor(b)), theirs)


@pytest.mark.parametrize(("bits", "size"), [(8, 0), (4, 32), (2, 64), (4, 128)])
def test_embedding(tmp_path: Path, bits: int, size: int) -> None:
    """Gather, Cast, Mul for whole rows; GatherBlockQuantized on bytes packed by hand for blocks."""
    rng = np.random.default_rng(bits)
    rows, width = 30, 128
    ids = rng.integers(0, rows, (3, 7)).astype(np.int64)
    if bits == 8:
        table, scale = (
            rng.integers(-127, 128, (rows, width)).astype(np.int8),
            rng.uniform(0.001, 1, (rows, 1)).astype(np.float32),
        )
        nodes = [
            node("Gather", "t ids", "g"),
            node("Cast", "g", "c", to=1),
            node("Gather", "s ids", "r"),
            node("Mul", "c r", "y"),
        ]
        theirs = kernel(tmp_path, nodes, {"ids": ids}, "float32", {"t": table, "s": scale}, "Gather")
        same(ops.embedding(tensor(ids), tensor(table), tensor(scale), 8, width), theirs)
        return
    codes = rng.integers(0, 2**bits, (rows, width)).astype(np.uint8)
    per_byte = 8 // bits
    packed = sum(codes[:, i::per_byte] << (bits * i) for i in range(per_byte)).astype(np.uint8)
    scale = rng.uniform(0.001, 1, (rows, width // size)).astype(np.float32)
    gather = helper.make_node(
        "GatherBlockQuantized", ["t", "ids", "s"], ["y"], domain="com.microsoft",
        gather_axis=0, quantize_axis=1, block_size=size, bits=bits,
    )  # fmt: skip
    theirs = kernel(tmp_path, [gather], {"ids": ids}, "float32", {"t": packed, "s": scale}, "GatherBlockQuantized")
    same(ops.embedding(tensor(ids), tensor(packed), tensor(scale), bits, size), theirs)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (2, 64)])
def test_block_linear_to_the_order_of_sums(tmp_path: Path, bits: int, size: int) -> None:
    """MatMulNBits adds the same exact integers in another order; numerics.nbits reproduces that order bit for bit."""
    rng = np.random.default_rng(bits)
    rows, k, n = 6, 128, 24
    x = rng.normal(0, 1, (rows, k)).astype(np.float32)
    codes = rng.integers(0, 2**bits, (n, k // size, size)).astype(np.uint8)
    per_byte = 8 // bits
    packed = sum(codes[..., i::per_byte] << (bits * i) for i in range(per_byte)).astype(np.uint8)
    scale, b = rng.uniform(0.01, 0.1, (n, k // size)).astype(np.float32), rng.normal(0, 1, n).astype(np.float32)
    matmul = helper.make_node(
        "MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=size, accuracy_level=4,
    )  # fmt: skip
    theirs = kernel(
        tmp_path, [matmul], {"x": x}, "float32", {"w": packed, "s": scale.reshape(-1), "b": b}, "MatMulNBits"
    )
    ours = ops.block_linear(tensor(x), tensor(packed), tensor(scale), tensor(b), bits, size).numpy()
    w_hat = ((codes.astype(np.float64) - 2 ** (bits - 1)) * scale[..., None]).reshape(n, k)
    offset = (
        np.abs(w_hat).max() + 2 ** (bits - 1) * scale.max()
    )  # the engine adds unsigned codes, then subtracts the zero point
    bound = (
        (k + 8) * 2.0**-24 * np.abs(x).sum(1, keepdims=True) * offset
    )  # one rounding of 2^-24 for each of k + 8 additions
    assert (np.abs(ours - theirs) <= 2 * bound).all()
    assert (
        np.abs(ours - x.astype(np.float64) @ w_hat.T - b).max() > bound.max()
    )  # int8 activations: not the float product


@pytest.mark.parametrize("seed", range(4))
def test_quantize_on_ties_and_extremes(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    _, y = grids(rng)
    ties = ((np.arange(-400, 400) + 0.5) * np.float64(y.scale)).astype(np.float32)
    x = np.concatenate(
        [ties, np.nextafter(ties, f32(9)), np.nextafter(ties, f32(-9)), f32([np.inf, -np.inf, 3.4e38, 0.0])]
    )
    theirs = kernel(
        tmp_path, [node("QuantizeLinear", "x q_s q_z", "y")], {"x": x}, "uint8", y.constants("q"), "QuantizeLinear"
    )
    same(ops.quantize(tensor(x), *y.numbers(), 0, 255, ENGINE, "y"), theirs)


SAMPLES = {
    "quantize": (torch.randn(2, 5), 0.1, 3, 0, 255, ENGINE, "y"),
    "dequantize": (torch.randint(0, 255, (2, 5), dtype=torch.uint8), 0.1, 3),
    "linear": (
        torch.randint(0, 255, (2, 3, 5), dtype=torch.uint8), 0.1, 3, torch.ones(4, 5, dtype=torch.int8), torch.ones(4), None, ENGINE,
    ),
    "conv_requantize": (
        torch.randint(0, 255, (2, 3, 9, 8), dtype=torch.uint8), 0.1, 3, torch.ones(4, 3, 3, 2, dtype=torch.int8), torch.ones(4),
        torch.ones(4, dtype=torch.int32), [2, 1], [1, 0], [2, 1], 1, 0.1, 3, 0, 15, ENGINE, "y",
    ),
    "matmul": (torch.ones(2, 3, 5, dtype=torch.uint8), 0.1, 3, torch.ones(2, 5, 4, dtype=torch.uint8), 0.1, 3, ENGINE),
    "add_requantize": (
        torch.ones(2, 1, 5, dtype=torch.uint8), 0.1, 3, torch.ones(3, 5, dtype=torch.int8), 0.1, 3, 0.1, 3, -128, 127, ENGINE, "y",
    ),
    "global_average_pool_requantize": (torch.ones(2, 3, 5, 4, dtype=torch.uint8), 0.1, 3, 0.1, 3, 0, 255, ENGINE, "y"),
    "embedding": (torch.ones(2, 3, dtype=torch.int64), torch.ones(9, 4, dtype=torch.uint8), torch.ones(9, 2), 4, 4),
    "dynamic_linear": (torch.randn(2, 5), torch.ones(4, 5, dtype=torch.int8), torch.ones(4), torch.ones(4)),
    "block_linear": (torch.randn(2, 3, 64), torch.ones(4, 2, 16, dtype=torch.uint8), torch.ones(4, 2), None, 4, 32),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_shapes_and_dtypes_are_known_without_running(name: str) -> None:
    """What torch.export asks: the fake kernel's shape and dtype are those of the real one, and nothing is mutated."""
    torch.library.opcheck(getattr(ops, name).default, SAMPLES[name], test_utils=("test_schema", "test_faketensor"))
