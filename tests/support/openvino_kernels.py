"""OpenVINO's integer kernels, built node by node with onnx.helper: what OpenVINO's arithmetic is compared with.

Activations enter as floats that lie on a grid and pass a QuantizeLinear: without one OpenVINO would run the model in float. Every shape
is free, as in an exported file: with fixed shapes OpenVINO takes other kernels, with other roundings."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qatana.verify.engines import OpenVinoSession

f32 = np.float32


class Grid(NamedTuple):
    """Scale and zero point of codes of a type; `lo` and `hi` where the format is narrower than the type."""

    scale: np.float32
    zero: int = 0
    type: type = np.uint8
    narrow: tuple[int, int] | None = None

    @property
    def range(self) -> tuple[int, int]:
        return self.narrow or ((0, 255) if self.type is np.uint8 else (-128, 127))

    def real(self, codes: np.ndarray) -> np.ndarray:
        return (codes.astype(f32) - f32(self.zero)) * self.scale

    def numbers(self) -> tuple[float, int]:
        return float(self.scale), self.zero

    def output(self) -> tuple[float, int, int, int, str, str]:
        return *self.numbers(), *self.range, "openvino", "y"


class Model:
    """A graph that grows by calls; `run` gives one value and the kernels that computed it.

    free  how many dimensions of an input are free: by default the batch of images, and all but the last of other tensors"""

    def __init__(self, free: int | None = None) -> None:
        self.free = free
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: dict[str, np.ndarray] = {}

    def const(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def entry(self, name: str, x: np.ndarray) -> str:
        self.inputs[name] = x
        return name

    def quantize(self, x: str, grid: Grid) -> str:
        if grid.narrow is not None:
            x = self.op("Clip", x, *(self.const(f32(end - grid.zero) * grid.scale) for end in grid.narrow))
        return self.op("QuantizeLinear", x, self.const(grid.scale), self.const(grid.type(grid.zero)))

    def dequantize(self, codes: str, grid: Grid, scale: np.float32 | None = None) -> str:
        return self.op("DequantizeLinear", codes, self.const(scale or grid.scale), self.const(grid.type(grid.zero)))

    def codes(self, name: str, codes: np.ndarray, grid: Grid, scale: np.float32 | None = None) -> str:
        """Codes as they flow in a file: the float value behind QuantizeLinear and DequantizeLinear."""
        return self.dequantize(self.quantize(self.entry(name, grid.real(codes)), grid), grid, scale)

    def weight(self, codes: np.ndarray, scale: np.ndarray) -> str:
        zero = self.const(np.zeros(len(scale), np.int8))
        return self.op("DequantizeLinear", self.const(codes), self.const(scale), zero, axis=0)

    def _free(self, x: np.ndarray) -> int:
        return self.free if self.free is not None else 1 if x.ndim == 4 else x.ndim - 1

    def run(self, value: str, kind: type) -> tuple[np.ndarray, list[str]]:
        onnx_type = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8, np.float32: TensorProto.FLOAT}[kind]
        inputs = []
        for name, x in self.inputs.items():
            shape = [f"{name}{i}" if i < self._free(x) else n for i, n in enumerate(x.shape)]
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        graph = helper.make_graph(
            self.nodes, "graph", inputs, [helper.make_tensor_value_info(value, onnx_type, None)], self.constants
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        session = OpenVinoSession(model.SerializeToString(), threads=1)
        return session.run(self.inputs)[value], sorted(session.kernels())


def near_tie_scale(rng: np.random.Generator, n: int, y: Grid, x: np.float32) -> np.ndarray:
    """Weight scales under which one accumulator in a few lands on k + 0.5 of y, give or take the roundings of the scales."""
    multiplier = 0.5 / (2 * rng.integers(0, 5, n) + 1)
    return (multiplier * np.float64(y.scale) / np.float64(x)).astype(f32)


def near(scale: np.ndarray | np.float32, rng: np.random.Generator, size: int) -> np.ndarray:
    """1 +- a few ulp."""
    return (1 + rng.integers(-3, 4, size) * 2.0**-23) * scale
