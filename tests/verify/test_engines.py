"""Files in ONNX Runtime and OpenVINO, and what the optimized graph says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from verify.conftest import CLASSES, Deployed

from qatana.errors import ArtifactError, DataError, SchemeError
from qatana.numerics import IntFormat, nbits
from qatana.verify import latency, open_file, run_file
from qatana.verify.operators import _bounded

pytestmark = pytest.mark.engine
ENGINES = ["onnxruntime", "openvino"]


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    """y = relu(a) + b, through an inner value "inner"."""
    nodes = [helper.make_node("Relu", ["a"], ["inner"]), helper.make_node("Add", ["inner", "b"], ["y"])]
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in "ab"]
    graph = helper.make_graph(nodes, "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(tmp_path / "f.onnx")
    )
    return tmp_path / "f.onnx"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_runs_and_shows_inner_values(float_file: Path, engine: str) -> None:
    a, b = torch.tensor([[-1.0, 0.0, 2.0]]), np.array([[1.0, 1.0, 1.0]], dtype=np.float32)
    session = open_file(float_file, engine, threads=1, expose=["inner"])
    found = session.run({"a": a, "b": b, "unused": b})
    assert session.outputs == ["y", "inner"]
    assert found["inner"].tolist() == [[0, 0, 2]]
    assert found["y"].tolist() == [[1, 1, 3]]
    assert run_file(float_file, {"a": a, "b": b}, engine)["y"].tolist() == [[1, 1, 3]]
    assert latency(float_file, {"a": a, "b": b}, engine, rounds=3) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_what_does_not_fit_is_said(float_file: Path, tmp_path: Path, engine: str) -> None:
    session = open_file(float_file, engine)
    ones = np.ones((2, 3), dtype=np.float32)
    with pytest.raises(DataError, match="needs input 'b'"):
        session.run({"a": ones})
    with pytest.raises(DataError, match="cannot run the file on this batch"):
        session.run({"a": ones, "b": np.ones((2, 4), dtype=np.float32)})
    with pytest.raises(ArtifactError, match="does not exist"):
        open_file(tmp_path / "gone.onnx", engine)
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"cannot load .*bad\.onnx"):
        open_file(tmp_path / "bad.onnx", engine)


def test_an_unknown_engine(float_file: Path) -> None:
    with pytest.raises(SchemeError, match="unknown engine 'onnxruntme'; did you mean 'onnxruntime'"):
        open_file(float_file, "onnxruntme")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_deployed_file_runs(cnn: Deployed, engine: str) -> None:
    images = cnn.batches[0][0]
    (logits,) = run_file(cnn.path, {"input": images}, engine).values()
    assert logits.shape == (16, CLASSES)
    # Integer formulas of the two engines differ by one step of a code at most, here by less than the logits' spread.
    assert np.abs(logits - cnn.artifact(images).numpy()).max() < 0.1 * np.ptp(logits)


@pytest.mark.parametrize(("quantized", "expected"), [(True, []), (False, ["Conv 'y'"])])
def test_a_convolution_between_dequantize_and_float(tmp_path: Path, quantized: bool, expected: list[str]) -> None:
    """With a QuantizeLinear behind it the convolution is QLinearConv; without, it runs in float (measured; see the engine's notes)."""
    constants = {"s": np.float32(0.1), "z": np.uint8(0), "w": np.ones((4, 3, 1, 1), dtype=np.int8), "wz": np.int8(0)}
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "s", "z"], ["xf"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["wf"]),
        helper.make_node("Conv", ["xf", "wf"], ["y"]),
    ]
    if quantized:
        nodes.append(helper.make_node("QuantizeLinear", ["y", "s", "z"], ["codes"]))
    out = ("codes", TensorProto.UINT8) if quantized else ("y", TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, 3, 4, 4])],
        [helper.make_tensor_value_info(*out, None)], [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    path = tmp_path / "conv.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    session = open_file(path, "onnxruntime")
    assert session.float_products() == expected
    assert session.kernels()["QLinearConv"] == int(quantized)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_bound_holds_every_order_of_sums_and_no_other_weight(bits: int) -> None:
    """Both known orders (AVX2, AVX512) lie within; one weight code more does not."""
    x = torch.randn(5, 128)
    codes = torch.randint(0, 2**bits - 1, (6, 4, 32), dtype=torch.uint8)
    scale = torch.rand(6, 4) + 0.1
    exact, bound = _bounded(x, codes, scale, None, bits)
    for isa in nbits.ISAS:
        y = nbits.matmul_nbits(x, codes, scale, None, None, bits=bits, block_size=32, isa=isa)
        assert bool(((y - exact).abs() <= bound).all())
    changed = codes.clone()
    changed[2, 1, 7] += 1
    moved = _bounded(x, changed, scale, None, bits)[0]
    assert bool(((moved - exact)[:, 2].abs() > bound[:, 2]).any())
    assert IntFormat(bits, signed=False).hi >= int(changed.max())
