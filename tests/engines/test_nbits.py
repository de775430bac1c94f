"""numerics.nbits against the engine it describes: every float32 output equal, on random and on adversarial data."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qatana import hardware
from qatana.errors import SchemeError
from qatana.numerics import nbits
from qatana.numerics.nbits import matmul_nbits

measured = pytest.mark.skipif(hardware.isa() not in nbits.ISAS, reason="evaluation order not measured on this CPU")
# (rows, columns, outputs): one row; even and odd rows; ragged columns; outputs % 4 of 1, 2, 3; rows % 128 == 1.
SHAPES = [(1, 320, 71), (2, 96, 10), (3, 1000, 64), (8, 256, 33), (33, 768, 35), (129, 384, 67)]
CASES = [(bits, block) for bits in (2, 4, 8) for block in (32, 64, 128)] + [(4, 256)]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (..., n) to bytes (..., n * bits / 8), the first code in the lowest bits (operator specification)."""
    per = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, per).astype(np.uint32)
    return (parts << (bits * np.arange(per, dtype=np.uint32))).sum(-1).astype(np.uint8)


def engine_outputs(
    x: Tensor, codes: Tensor, scales: Tensor, zero_points: Tensor | None, bias: Tensor | None, bits: int, threads: int
) -> Tensor:
    outputs, blocks, block_size = codes.shape
    constants = {"B": packed(codes.numpy(), bits), "scales": scales.numpy().reshape(-1)}
    names = ["x", "B", "scales", "", "", ""]
    if zero_points is not None:
        padded = np.zeros((outputs, -(-blocks * bits // 8) * 8 // bits), np.uint8)
        padded[:, :blocks] = zero_points.numpy()
        constants["zero_points"], names[3] = packed(padded, bits).reshape(-1), "zero_points"
    if bias is not None:
        constants["bias"], names[5] = bias.numpy(), "bias"
    columns = x.shape[-1]
    node = helper.make_node(
        "MatMulNBits", names, ["y"], domain="com.microsoft", K=columns, N=outputs, bits=bits,
        block_size=block_size, accuracy_level=4,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "matmul_nbits",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def problem(
    shape: tuple[int, int, int], bits: int, block: int, seed: int, kind: str, zero_points: bool, bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    rows, columns, outputs = shape
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-columns // block)
    x = torch.randn(rows, columns, generator=draw) * 10 ** (6 * float(torch.rand((), generator=draw)) - 3)
    if kind == "ties":  # x * (127 / 63.5) is k + 0.5 for odd multiples of a quarter
        x = torch.randint(-254, 255, (rows, columns), generator=draw) / 4
    elif kind == "zeros":
        x[:, : columns // 2] = 0
    elif kind == "outliers":
        x[torch.rand(rows, columns, generator=draw) < 0.01] = 1e4
    codes = torch.randint(0, 2**bits, (outputs, blocks, block), generator=draw, dtype=torch.uint8)
    if kind == "extreme":  # every product at its largest: an int16 pair sum that saturated would show
        x, codes = torch.where(x > 0, 1.0, -1.0), torch.where(codes > 2 ** (bits - 1), 2**bits - 1, 0)
        x, codes = x.abs() if seed % 2 else x, codes.to(torch.uint8)
    scales = torch.rand(outputs, blocks, generator=draw) * 0.015 + 0.005
    middles = torch.randint(0, 2**bits, (outputs, blocks), generator=draw, dtype=torch.uint8)
    offset = torch.randn(outputs, generator=draw)
    return x, codes, scales, middles if zero_points else None, offset if bias else None


@measured
@pytest.mark.engine
@pytest.mark.parametrize(("bits", "block"), CASES)
@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "outliers", "extreme"])
def test_every_output_equals_the_engine(bits: int, block: int, kind: str) -> None:
    isa = nbits.detect_isa()
    for seed, shape in enumerate(SHAPES):
        threads = 1 + seed % 2
        case = problem(shape, bits, block, seed, kind, zero_points=seed % 3 != 0, bias=seed % 2 == 0)
        expected = engine_outputs(*case, bits, threads)
        actual = matmul_nbits(*case, bits=bits, block_size=block, isa=isa, threads=threads)
        assert int((actual != expected).sum()) == 0, f"{bits} bits, block {block}, {kind}, {shape}"


@measured
@pytest.mark.engine
@pytest.mark.parametrize("bits", [2, 4])
def test_zero_points_do_not_matter_for_being_given(bits: int) -> None:
    """One row, with and without zero points, each as the engine does it (AVX2 orders the two differently)."""
    for zero_points in (True, False):
        case = problem((1, 768, 130), bits, 32, 5, "normal", zero_points, True)
        actual = matmul_nbits(*case, bits=bits, block_size=32, isa=nbits.detect_isa())
        assert torch.equal(actual, engine_outputs(*case, bits, 1))


@pytest.mark.parametrize("isa", nbits.ISAS)
@pytest.mark.parametrize(("bits", "block"), [(bits, block) for bits in (2, 4, 8) for block in (32, 64, 128)])
def test_within_rounding_of_the_equation(isa: str, bits: int, block: int) -> None:
    """Both orders give the sum of the equation: exact integers, float64 reference, float32 error bound.

    Bound: each of at most 64 roundings errs by 2^-24 of the largest partial sum, and no partial sum exceeds the
    sum of magnitudes of unsigned products and zero-point terms."""
    for seed, shape in enumerate([(1, 320, 7), (5, 352, 9), (2, 64, 5)]):
        x, codes, scales, middles, bias = problem(shape, bits, block, seed, "normal", True, True)
        assert middles is not None
        assert bias is not None
        padded = torch.nn.functional.pad(x, (0, codes.shape[1] * block - x.shape[1]))
        blocks = padded.reshape(len(x), -1, block)
        largest = blocks.abs().amax(-1, keepdim=True)
        levels = torch.round(blocks * (torch.full_like(largest, 127) / largest)).double()
        step = (largest / 127).double()
        weights = (codes.double() - middles.double()[:, :, None]) * scales.double()[:, :, None]
        reference = (levels * step).flatten(1) @ weights.flatten(1).T + bias
        unsigned = (codes.double() + middles.double()[:, :, None]) * scales.double()[:, :, None]
        magnitude = (levels * step).abs().flatten(1) @ unsigned.flatten(1).T + bias.abs()
        actual = matmul_nbits(x, codes, scales, middles, bias, bits=bits, block_size=block, isa=isa)
        assert bool(((actual - reference).abs() <= 64 * 2.0**-24 * magnitude).all())


def test_fma_rounds_once_where_float64_lands_on_a_midpoint() -> None:
    """(1 + 2^-23) + 2^-24 * (1 - 2^-46): float64 gives the midpoint, which would round up; the sum is below it."""
    a, b, c = 2.0**-12 * (1 + 2.0**-23), 2.0**-12 * (1 - 2.0**-23), 1 + 2.0**-23
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    below, above = Fraction(c), Fraction(1 + 2.0**-22)
    assert exact - below < above - exact
    for sign in (1.0, -1.0):
        result = nbits._fma(torch.tensor([sign * a]), torch.tensor([b]), torch.tensor([sign * c]))
        assert result.item() == sign * c


def test_leading_dimensions_are_rows() -> None:
    x, codes, scales, middles, bias = problem((6, 64, 5), 4, 32, 1, "normal", True, True)
    options = {"bits": 4, "block_size": 32, "isa": "avx2"}
    flat = matmul_nbits(x, codes, scales, middles, bias, **options)
    assert torch.equal(
        matmul_nbits(x.reshape(2, 3, 64), codes, scales, middles, bias, **options), flat.reshape(2, 3, 5)
    )


def test_no_rows_and_no_gradient() -> None:
    _, codes, scales, _, _ = problem((1, 64, 5), 4, 32, 1, "normal", False, False)
    x = torch.zeros(0, 64, requires_grad=True)
    out = matmul_nbits(x, codes, scales, bits=4, block_size=32, isa="avx2")
    assert out.shape == (0, 5)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"isa": "sse2"}, "isa 'sse2' was not measured"),
        ({"bits": 3}, "3 bits in blocks of 32"),
        ({"block_size": 48}, "blocks of 48"),
        ({"x": torch.zeros(1, 97)}, r"give \(N, 4, 32\)"),
        ({"scales": torch.ones(5, 3)}, "scales has shape"),
        ({"zero_points": torch.ones(5, 3, dtype=torch.uint8)}, "zero_points has shape"),
        ({"bias": torch.ones(4)}, "bias has shape"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "x": torch.zeros(1, 64), "codes": torch.zeros(5, 2, 32, dtype=torch.uint8), "scales": torch.ones(5, 2),
        "bits": 4, "block_size": 32, "isa": "avx2",
    }  # fmt: skip
    with pytest.raises(SchemeError, match=message):
        matmul_nbits(**(good | change))  # type: ignore[arg-type]


def test_2_bits_in_blocks_of_256_have_no_integer_kernel() -> None:
    codes = torch.zeros(5, 1, 256, dtype=torch.uint8)
    with pytest.raises(SchemeError, match="no known integer kernel"):
        matmul_nbits(torch.zeros(1, 256), codes, torch.ones(5, 1), bits=2, block_size=256, isa="avx2")


def test_an_unmeasured_machine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "isa", lambda: "avxvnni")
    with pytest.raises(SchemeError, match="on 'avxvnni' is not known"):
        nbits.detect_isa()
