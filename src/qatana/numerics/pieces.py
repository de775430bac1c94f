"""Tensors are walked in pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

PIECE = 65536
"""Elements walked at a time: 256 KB of float32, so that a piece, its result and a temporary lie in a 1 MB cache."""


def pieces(stack: Tensor) -> Iterator[slice]:
    """Slices of the first dimension, of about PIECE elements each."""
    rows = max(1, PIECE * stack.shape[0] // max(1, stack.numel()))
    return (slice(start, start + rows) for start in range(0, stack.shape[0], rows))
