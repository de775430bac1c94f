"""Schemas of the two ONNX Runtime contrib operators that hold packed weights, so that exporter and checker know them.

Reference: the "com.microsoft" operator documentation of ONNX Runtime (MatMulNBits, GatherBlockQuantized)."""

from __future__ import annotations

import functools
from typing import Any

from qatana.errors import require

DOMAIN = "com.microsoft"


@functools.cache
def opset() -> Any:
    """The onnxscript opset "com.microsoft" 1, with both schemas registered."""
    defs = require("onnx", "onnx").defs
    for schema in (_matmul_nbits(defs), _gather_block_quantized(defs)):
        if not defs.has(schema.name, DOMAIN):
            defs.register_schema(schema)
    return require("onnxscript", "onnx").values.Opset(DOMAIN, 1)


def _schema(defs: Any, name: str, inputs: str, attributes: dict[str, int], constraints: dict[str, list[str]]) -> Any:
    """inputs: "A:T1 zero_points?:T3", in order; "?" marks optional ones. The output is Y of type T1."""
    kind = defs.OpSchema
    parameters = []
    for item in inputs.split():
        label, _, type_ = item.partition(":")
        option = kind.FormalParameterOption.Optional if label.endswith("?") else kind.FormalParameterOption.Single
        parameters.append(kind.FormalParameter(label.rstrip("?"), type_, param_option=option))
    return kind(
        name,
        DOMAIN,
        1,
        inputs=parameters,
        outputs=[kind.FormalParameter("Y", "T1")],
        type_constraints=[(t, [f"tensor({k})" for k in kinds], "") for t, kinds in constraints.items()],
        attributes=[kind.Attribute(key, kind.AttrType.INT, "", required=False) for key in attributes],
    )


def _matmul_nbits(defs: Any) -> Any:
    return _schema(
        defs,
        "MatMulNBits",
        "A:T1 B:T2 scales:T1 zero_points?:T3 g_idx?:T4 bias?:T1",
        dict.fromkeys(("K", "N", "bits", "block_size", "accuracy_level"), 0),
        {"T1": ["float"], "T2": ["uint8"], "T3": ["uint8", "float"], "T4": ["int32"]},
    )


def _gather_block_quantized(defs: Any) -> Any:
    return _schema(
        defs,
        "GatherBlockQuantized",
        "data:T3 indices:T4 scales:T1 zero_points?:T3",
        dict.fromkeys(("gather_axis", "quantize_axis", "block_size", "bits"), 0),
        {"T1": ["float"], "T3": ["uint8", "int4", "uint4"], "T4": ["int32", "int64"]},
    )
