"""Our tensors beside an engine's arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def tensor(x: np.ndarray | None) -> Any:
    """None stays None: an operator's optional argument."""
    return None if x is None else torch.from_numpy(x)


def same(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Equal in shape, dtype and every element."""
    assert ours.shape == theirs.shape
    assert str(ours.dtype).removeprefix("torch.") == str(theirs.dtype)
    different = int((ours.numpy() != theirs).sum())
    assert different == 0, f"{different} of {theirs.size} differ"
