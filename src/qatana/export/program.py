"""An Artifact's graph as an ONNX program, by torch.onnx.

torch.onnx traces a graph twice: torch.export captures it, then `run_decompositions` breaks up operators that have no ONNX form. With
symbolic shapes the second costs more than all the rest together (a BERT of 6 layers: 3.3 of 5.6 s), and an artifact's graph was
exported before and rarely has such an operator. So it is translated as captured, and decomposed only if that fails."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from qatana.artifact import Artifact
from qatana.errors import ExportError
from qatana.export.translations import OPSET, table

aten = torch.ops.aten

SYNONYMS = {aten.__and__.Tensor: aten.bitwise_and.Tensor, aten.__or__.Tensor: aten.bitwise_or.Tensor}
"""Operators without an ONNX form that are others by definition: no reason to decompose a whole graph."""


def onnx_program(artifact: Artifact) -> Any:
    """torch.onnx's ONNXProgram of an artifact. Raises: ExportError if an operator has no translation."""
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple({int(axis): dynamic for axis in x["dynamic"]} for x in artifact.config["inputs"])
    names = [x["name"] for x in artifact.config["inputs"]]
    with torch.no_grad():
        captured = torch.export.export(
            artifact.graph_module.eval(), artifact.example_inputs(), dynamic_shapes=shapes, strict=False
        )
    for node in captured.graph.nodes:
        node.target = SYNONYMS.get(node.target, node.target) if node.op == "call_function" else node.target
    if not any(_is_mutable(node.target) for node in captured.graph.nodes):
        captured.run_decompositions = lambda *_, **__: captured  # type: ignore[method-assign]
        try:
            return _translate(captured, names)
        except torch.onnx.OnnxExporterError:
            del captured.run_decompositions
    try:
        return _translate(captured, names)
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise ExportError(f"the graph has no ONNX form: {str(cause).strip().splitlines()[0]}") from error


def _is_mutable(target: Any) -> bool:
    """Whether a node changes its input in place: only `run_decompositions` turns such a graph into one of values."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _translate(captured: Any, names: list[str]) -> Any:
    return torch.onnx.export(
        captured, dynamo=True, custom_translation_table=table(), input_names=names, opset_version=OPSET, optimize=False,
        verbose=False,
    )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporter's progress lines and third-party warnings to itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
