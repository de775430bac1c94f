"""ONNX files, ours and ONNX Runtime's own: every weight reads as the engine reads it, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import qatana as qt
from qatana.errors import ArtifactError


class Small(nn.Module):
    """Table and two layers: rows that blocks of 32, 64 and 128 divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.last = nn.Embedding(40, 256), nn.Linear(256, 128), nn.Linear(128, 64)

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(self.table(ids))))


def engine_values(path: Path, name: str) -> Tensor:
    """What ONNX Runtime makes of the node that reads this initializer, alone: DequantizeLinear's output; the table, looked up row by
    row; the matrix, multiplied by the identity (each sum has one term that is not 0)."""
    model = onnx.load(str(path))
    values = {t.name: t for t in model.graph.initializer}
    node = next((n for n in model.graph.node if name in n.input and n.op_type in READ), None)
    if node is None:  # an int8 table: Gather, and a product with the row's scale
        codes, scale = (numpy_helper.to_array(values[key]) for key in (name, f"{name}_scale"))
        return torch.from_numpy(codes.astype(np.float32) * scale.reshape(-1, 1))
    inputs, feeds = [], {}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "MatMulNBits":
        feeds[node.input[0]] = np.eye(attributes["K"], dtype=np.float32)
        inputs.append(helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, [attributes["K"]] * 2))
        for attribute in [a for a in node.attribute if a.name == "accuracy_level"]:
            node.attribute.remove(attribute)  # 4 would quantize the identity
        del node.input[5:]  # the bias
    if node.op_type == "GatherBlockQuantized":
        rows = numpy_helper.to_array(values[node.input[0]]).shape[0]
        feeds[node.input[1]] = np.arange(rows, dtype=np.int64)
        inputs.append(helper.make_tensor_value_info(node.input[1], TensorProto.INT64, [rows]))
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    kept = [values[i] for i in node.input if i in values]
    alone = helper.make_model(
        helper.make_graph([node], "alone", inputs, [output], kept), opset_imports=model.opset_import
    )
    alone.ir_version = model.ir_version
    found = onnxruntime.InferenceSession(alone.SerializeToString()).run(None, feeds)[0]
    return torch.from_numpy(found.T.copy() if node.op_type == "MatMulNBits" else found)


READ = ("DequantizeLinear", "MatMulNBits", "GatherBlockQuantized")


def reads_as_the_engine(path: Path, at_least: int) -> qt.Checkpoint:
    checkpoint = qt.read_checkpoint(path)
    assert checkpoint.writer == "onnx"
    assert len(checkpoint.weights) >= at_least
    for name, stored in checkpoint.weights.items():
        assert torch.equal(stored.values(), engine_values(path, name)), name
    return checkpoint


@pytest.mark.parametrize("target", ["ort:int8", "ort:int4", "ort:int2", "openvino:int8"])
def test_our_own_files(target: str, tmp_path: Path) -> None:
    ids = [torch.randint(0, 40, (4, 7))] * 2
    recipe = qt.recipe(target)
    path = qt.export(qt.convert(qt.ptq(Small(), recipe, ids)), tmp_path / "model.onnx")
    reads_as_the_engine(path, 3)


def float_file(path: Path) -> Path:
    qt.export_float(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)).eval(), torch.randn(2, 64), path)
    return path


class Reader:
    """What onnxruntime.quantization calibrates on."""

    def __init__(self, name: str) -> None:
        generator = np.random.default_rng(0)
        self.batches = iter([{name: generator.standard_normal((4, 64)).astype(np.float32)} for _ in range(2)])

    def get_next(self) -> Any:
        return next(self.batches, None)


@pytest.mark.parametrize(
    ("weight", "per_channel"),
    [*((kind, each) for kind in ("QInt8", "QUInt8", "QInt4") for each in (False, True)), ("QFLOAT8E4M3FN", False)],
)
def test_quantize_static(weight: str, per_channel: bool, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    source = float_file(tmp_path / "float.onnx")
    name = onnx.load(str(source)).graph.input[0].name
    options = {"weight_type": QuantType[weight], "per_channel": per_channel, "quant_format": QuantFormat.QDQ}
    options["activation_type"] = QuantType.QUInt8
    if weight == "QFLOAT8E4M3FN":
        options |= {"activation_type": QuantType.QFLOAT8E4M3FN, "calibrate_method": _distribution()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(str(source), str(tmp_path / "q.onnx"), Reader(name), **options)
    reads_as_the_engine(tmp_path / "q.onnx", 2)


def _distribution() -> Any:
    from onnxruntime.quantization import CalibrationMethod

    return CalibrationMethod.Distribution


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
def test_blocks_of_four_bits(symmetric: bool, form: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        _matmul(), block_size=32, is_symmetric=symmetric, accuracy_level=0, quant_format=QuantFormat[form]
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "q.onnx"))
    reads_as_the_engine(tmp_path / "q.onnx", 1)


def _matmul() -> Any:
    weight = np.random.default_rng(1).standard_normal((64, 48)).astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 48])], [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def test_training_starts_from_a_file(tmp_path: Path) -> None:
    ids = [torch.randint(0, 40, (4, 7))] * 2
    artifact = qt.convert(qt.ptq(Small(), "ort:int4", ids))
    checkpoint = qt.read_checkpoint(qt.export(artifact, tmp_path / "model.onnx"))
    named = {f"{name.removesuffix('.weight')}.weight": stored for name, stored in checkpoint.weights.items()}
    model = qt.start_from(qt.Checkpoint("onnx", named), Small(), ids)
    for name, stored in named.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight_quantizer(layer.weight), stored.values())


def test_what_cannot_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no protobuf at all")
    with pytest.raises(ArtifactError, match="truncated or not ONNX"):
        qt.read_checkpoint(path)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    weight = numpy_helper.from_array(np.ones((4, 4), np.int8), "w")
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, [2, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, [2, 4])]
    onnx.save(helper.make_model(helper.make_graph([node], "g", inputs, outputs, [weight])), str(path))
    with pytest.raises(ArtifactError, match="w: int8 behind no DequantizeLinear"):
        qt.read_checkpoint(path)
