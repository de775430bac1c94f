"""What an exported file computes in the real engines, and what ONNX Runtime makes of its graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from support.kernels import session

FLOAT_PRODUCTS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


def optimized(path: Path, folder: Path) -> list[Any]:
    """Nodes of the graph that ONNX Runtime really runs."""
    target = folder / "optimized.onnx"
    session(str(path), optimized=str(target))
    return list(onnx.load(str(target)).graph.node)


def outputs(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """First output in ONNX Runtime."""
    return session(str(path)).run(None, inputs)[0]


def codes(path: Path, inputs: dict[str, np.ndarray], wanted: set[str]) -> dict[str, np.ndarray]:
    """Values of the file that are named like quantizers, as ONNX Runtime computes them."""
    model = onnx.load(str(path))
    made = [name for node in model.graph.node for name in node.output if name in wanted]
    have = {output.name for output in model.graph.output}
    model.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.UINT8, None) for n in made if n not in have)
    return dict(zip(made, session(model.SerializeToString()).run(made, inputs), strict=True))


def metadata(path: Path) -> dict[str, Any]:
    found = {entry.key: entry.value for entry in onnx.load(str(path)).metadata_props}
    return json.loads(found["qatana"])


def openvino_outputs(path: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """First output in OpenVINO, in float32: on CPUs with bfloat16 it would compute in that, and 2-bit products then give nothing."""
    import openvino

    config = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(path), "CPU", config)
    return compiled(inputs)[0]
