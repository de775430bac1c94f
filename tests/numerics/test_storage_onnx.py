"""raw_data of every narrow ONNX element type against onnx.helper, and QuantizeLinear / DequantizeLinear of its reference
evaluator, blocked ones too. (onnx 1.23.2, opset 28: int2, uint2, float6 and E8M0 scales are in it.)"""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.tensors import minilm
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics import storage
from qatana.numerics.formats import FloatFormat

FLOATS = {
    "float4e2m1": FloatFormat(2, 1),
    "float6e2m3": FloatFormat(2, 3),
    "float6e3m2": FloatFormat(3, 2),
    "float8e4m3fn": FloatFormat(4, 3, "fn"),
    "float8e5m2": FloatFormat(5, 2, "ieee"),
}
INTEGERS = ("int8", "uint8", "int4", "uint4", "int2", "uint2")


def initializer(codes: Tensor, element: str, name: str = "codes") -> onnx.TensorProto:
    """Our raw_data under the type's name; onnx itself checks its length."""
    raw = bytes(storage.pack_onnx(codes, element).tolist())
    return helper.make_tensor(name, getattr(TensorProto, element.upper()), codes.shape, raw, raw=True)


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Codes of a numpy or ml_dtypes array as they are stored one to a byte."""
    return array.view(np.uint8) if array.dtype.itemsize == 1 else array


def every_code(element: str, shape: tuple[int, ...]) -> Tensor:
    format = storage.ELEMENTS[element]
    count = int(np.prod(shape))
    return (torch.arange(count) % (format.hi - format.lo + 1) + format.lo).to(format.dtype).reshape(shape)


@pytest.mark.parametrize("element", storage.ELEMENTS)
@pytest.mark.parametrize("shape", [(16, 16), (3, 5), (7,), (1, 1), (2, 3, 11), (0, 4)])
def test_raw_data_is_read_and_written_by_onnx(element: str, shape: tuple[int, ...]) -> None:
    codes = every_code(element, shape)
    tensor = initializer(codes, element)
    theirs = numpy_helper.to_array(tensor)
    if element in FLOATS or element == "float8e8m0":
        assert np.array_equal(as_bytes(theirs), codes.numpy())
    else:
        assert np.array_equal(theirs.astype(np.int16), codes.numpy().astype(np.int16))
    assert numpy_helper.from_array(theirs).raw_data == tensor.raw_data
    raw = (
        torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.uint8)
        if tensor.raw_data
        else torch.empty(0, dtype=torch.uint8)
    )
    assert torch.equal(storage.unpack_onnx(raw, element, shape), codes)


def run(op: str, inputs: dict[str, np.ndarray | onnx.TensorProto], output: int, **attributes: int) -> np.ndarray:
    """One node of opset 28 in the reference evaluator; a TensorProto is an initializer."""
    graph = helper.make_graph(
        [helper.make_node(op, list(inputs), ["y"], **attributes)],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in inputs.items()
            if isinstance(value, np.ndarray)
        ],
        [helper.make_tensor_value_info("y", output, None)],
        [value for value in inputs.values() if isinstance(value, onnx.TensorProto)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 28)])
    feeds = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    return ReferenceEvaluator(model).run(None, feeds)[0]


def blocked_scale(x: Tensor, largest: float, block: int) -> Tensor:
    return x.unflatten(-1, (-1, block)).abs().amax(-1) / torch.tensor(largest)


@pytest.mark.parametrize("element", INTEGERS)
@pytest.mark.parametrize("block", [32, 128])
def test_integers_blocked(element: str, block: int) -> None:
    """Codes of QuantizeLinear, packed by us as an initializer, read by DequantizeLinear: values are (code - zero) * scale."""
    x, format = minilm()[:32], storage.ELEMENTS[element]
    scale = blocked_scale(x, max(format.hi, -format.lo) if format.signed else (format.hi + 1) / 2, block)
    zero = torch.full(scale.shape, 0 if format.signed else (format.hi + 1) // 2, dtype=format.dtype)
    inputs = {"x": x.numpy(), "scale": scale.numpy(), "zero": initializer(zero, element, "zero")}
    codes = run("QuantizeLinear", inputs, getattr(TensorProto, element.upper()), axis=1, block_size=block)
    view = x.unflatten(-1, (-1, block))
    ours = (view / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1)
    ours = ours.clamp(format.lo, format.hi).flatten(-2).to(format.dtype)
    assert np.array_equal(codes.astype(np.int16), ours.numpy().astype(np.int16))
    inputs = {"codes": initializer(ours, element), "scale": scale.numpy(), "zero": initializer(zero, element, "zero")}
    values = run("DequantizeLinear", inputs, TensorProto.FLOAT, axis=1, block_size=block)
    levels = ours.float().unflatten(-1, (-1, block)) - zero.unsqueeze(-1).float()
    assert np.array_equal(values, (levels * scale.unsqueeze(-1)).flatten(-2).numpy())


@pytest.mark.parametrize("element", FLOATS)
@pytest.mark.parametrize("block", [16, 32])
def test_floats_blocked(element: str, block: int) -> None:
    x, format = minilm()[:32], FLOATS[element]
    scale = blocked_scale(x, format.largest, block)
    zero = initializer(torch.zeros(scale.shape, dtype=torch.uint8), element, "zero")
    codes = run("QuantizeLinear", {"x": x.numpy(), "scale": scale.numpy(), "zero": zero},
                getattr(TensorProto, element.upper()), axis=1, block_size=block)  # fmt: skip
    t = (x.unflatten(-1, (-1, block)) / scale.unsqueeze(-1)).flatten(-2)
    ours = format.encode(format.round_(t.clone()))
    assert np.array_equal(as_bytes(codes), ours.numpy())
    inputs = {"codes": initializer(ours, element), "scale": scale.numpy(), "zero": zero}
    values = run("DequantizeLinear", inputs, TensorProto.FLOAT, axis=1, block_size=block)
    levels = format.decode(ours).unflatten(-1, (-1, block))
    assert np.array_equal(values, (levels * scale.unsqueeze(-1)).flatten(-2).numpy())


@pytest.mark.parametrize("element", ["int8", "int4", "int2", "float8e4m3fn", "float4e2m1"])
def test_per_channel_and_per_tensor(element: str) -> None:
    x = minilm()[:31]
    format = FLOATS.get(element)
    largest = format.largest if format else storage.ELEMENTS[element].hi
    for scale, attributes in ((x.abs().amax(1) / largest, {"axis": 0}), (x.abs().amax() / largest, {})):
        wide = scale.unsqueeze(1) if scale.ndim else scale
        if format:
            codes = format.encode(format.round_(x / wide))
            levels = format.decode(codes)
        else:
            integer = storage.ELEMENTS[element]
            codes = (x / wide).round().clamp(integer.lo, integer.hi).to(torch.int8)
            levels = codes.float()
        values = run(
            "DequantizeLinear", {"codes": initializer(codes, element), "scale": scale.numpy()}, 1, **attributes
        )
        assert np.array_equal(values, (levels * wide).numpy())


def test_errors_name_cause_and_remedy() -> None:
    with pytest.raises(SchemeError, match="unknown ONNX element type 'int3'; did you mean '"):
        storage.pack_onnx(torch.zeros(4), "int3")
    with pytest.raises(SchemeError, match=r"codes 0\.\.16 do not fit uint4"):
        storage.pack_onnx(torch.tensor([0, 16]), "uint4")
    with pytest.raises(SchemeError, match="2 bytes a row cannot hold 9 codes of 4 bits"):
        storage.unpack_onnx(torch.zeros(2, dtype=torch.uint8), "int4", (3, 3))
