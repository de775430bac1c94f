"""ONNX Runtime's integer kernels, built node by node with onnx.helper: what the integer operators are compared with.

Near-tie data. A requantized output is rint(value): formulas that differ by an ulp give the same code almost everywhere. `near_ties`
chooses an output scale for which outputs fall within a few ulp of k + 0.5, where a wrong formula shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

TYPES = {
    "float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
}  # fmt: skip
LEVELS = onnxruntime.GraphOptimizationLevel


def session(model: bytes | str, level: Any = LEVELS.ORT_ENABLE_ALL, optimized: str | None = None) -> Any:
    """A session on one thread; `optimized`: where to write the graph that really runs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = level
    options.log_severity_level = (
        3  # a graph written after layout changes warns that it fits this machine only: wanted here
    )
    if optimized is not None:
        options.optimized_model_filepath = optimized
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def proto(
    nodes: Sequence[Any], inputs: dict[str, np.ndarray], outputs: dict[str, str], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """A model: inputs by example array, outputs by dtype name, constants by value."""
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, TYPES[str(x.dtype)], x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info(name, TYPES[kind], None) for name, kind in outputs.items()],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def run(
    nodes: Sequence[Any], inputs: dict[str, np.ndarray], output: str, constants: dict[str, np.ndarray]
) -> np.ndarray:
    """One node list through ONNX Runtime; `output` is the dtype name of value "y"."""
    model = proto(nodes, inputs, {"y": output}, constants)
    return session(model.SerializeToString()).run(None, inputs)[0]


def f32(value: Any) -> Any:
    return np.float32(value)


def near_ties(products: np.ndarray, rng: np.random.Generator) -> np.float32:
    """An output scale s_y under which many products p (float64, exact accumulator times input scales) have p / s_y near k + 0.5.

    A product is picked, and s_y = p / (k + 0.5) for a small k: every product that is an odd multiple of it is then a tie up to rounding,
    and f32 rounding of s_y and of the multiplier spreads them over both sides."""
    pool = np.unique(np.abs(products[products != 0]))
    pick = float(pool[rng.integers(len(pool) // 4 + 1)])
    return f32(pick / (rng.integers(0, 3) + 0.5))


def tie_share(values: np.ndarray) -> float:
    """Share of values within 1e-5 of a half-integer: says that near-tie data are what they claim."""
    return float(np.mean(np.abs(np.abs(values - np.floor(values)) - 0.5) < 1e-5))
