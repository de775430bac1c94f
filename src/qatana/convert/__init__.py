"""Trained layer -> integer layer -> Artifact."""

from qatana.convert.convert import convert, integer_model

__all__ = ["convert", "integer_model"]
