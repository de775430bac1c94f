"""Plan -> QAT model: `plan` looks and decides, `prepare` replaces layers. Before both, `equalize` may flatten a float model's channels, and
`reorder` sort them."""

from qatana.prepare.equalize import Equalized, equalize
from qatana.prepare.prepare import plan, prepare
from qatana.prepare.reorder import Reordered, reorder

__all__ = ["Equalized", "Reordered", "equalize", "plan", "prepare", "reorder"]
