"""Trained layer -> integer layer -> Artifact."""

from qatana.convert.convert import convert, integer_model
from qatana.convert.dequantize import dequantize

__all__ = ["convert", "dequantize", "integer_model"]
