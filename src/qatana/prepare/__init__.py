"""Plan -> QAT model: `plan` looks and decides, `prepare` replaces layers, `restore` puts the float ones back."""

from qatana.prepare.prepare import plan, prepare

__all__ = ["plan", "prepare"]
