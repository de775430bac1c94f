"""Quantized weights that other libraries wrote, read back: codes and scales as they stand in the file, or float weights."""

from __future__ import annotations

from qatana.checkpoints.checkpoint import Checkpoint, Stored
from qatana.checkpoints.read import WRITERS, read_checkpoint

__all__ = ["WRITERS", "Checkpoint", "Stored", "read_checkpoint"]
