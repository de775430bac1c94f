"""The float model as an ONNX file, by torch's own exporter: what a quantized file is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatana.batch import split_inputs
from qatana.errors import ExportError, require
from qatana.export.program import quiet
from qatana.files import replacing

OPSET = 21


class _Logits(nn.Module):
    """A model called with its inputs by position, returning its logits."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Any:
        count = len(inputs) - len(self.names)
        out = self.model(*inputs[:count], **dict(zip(self.names, inputs[count:], strict=True)))
        return out["logits"] if hasattr(out, "items") and "logits" in out else out


def export_float(model: nn.Module, example_inputs: Any, path: str | Path) -> Path:
    """Write a float model as ONNX, optimized by torch.onnx, weights inside the file. Returns the path.

    example_inputs  one batch, as for `plan`. The batch and, for token ids, the sequence stay free; inputs are called
                    as in
                    the files of `export`: by keyword, or "input"
    Raises: ExportError if torch cannot export it; ArtifactError if the path cannot be written."""
    require("onnxscript", "onnx")
    args, kwargs = split_inputs(example_inputs, model)
    inputs = tuple(torch.cat([x, x]) if x.shape[0] == 1 else x for x in (*args, *kwargs.values()))
    positional = ["input"] if len(args) == 1 else [f"input_{i}" for i in range(len(args))]
    free = torch.export.Dim.DYNAMIC
    shapes = tuple({0: free, 1: free} if x.ndim == 2 and not x.is_floating_point() else {0: free} for x in inputs)
    was_training = model.training
    try:
        with torch.no_grad(), quiet():
            program: Any = torch.onnx.export(
                _Logits(model.eval(), list(kwargs)),
                inputs,
                dynamo=True,
                dynamic_shapes=(shapes,),
                input_names=[*positional, *kwargs],
                output_names=["logits"],
                opset_version=OPSET,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        line = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"torch.onnx cannot export {type(model).__name__}: {line}") from error
    finally:
        model.train(was_training)
    path = Path(path)
    with replacing(path) as temporary:
        temporary.write_bytes(program.model_proto.SerializeToString())
    return path
