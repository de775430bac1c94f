"""One file per target, reading the Artifact alone."""

from qatana.export.float_file import export_float
from qatana.export.onnx_file import export, onnx_model

__all__ = ["export", "export_float", "onnx_model"]
