"""Plan -> QAT model: `plan` looks and decides, `prepare` replaces layers. Before both, `equalize` may flatten a float model's channels."""

from qatana.prepare.equalize import Equalized, equalize
from qatana.prepare.prepare import plan, prepare

__all__ = ["Equalized", "equalize", "plan", "prepare"]
