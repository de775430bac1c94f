"""Training with quantization in the loop: schedule, groups, distillation, presets, a loop that resumes exactly."""

from qatana.train.code_units import CodeUnits
from qatana.train.controller import Controller
from qatana.train.distill import distillation_loss, hidden_state_loss
from qatana.train.failure import TrainingError
from qatana.train.fit import fit
from qatana.train.groups import parameter_groups
from qatana.train.history import History
from qatana.train.training import Training, preset, training_of
from qatana.train.watch import watching

__all__ = [
    "CodeUnits",
    "Controller",
    "History",
    "Training",
    "TrainingError",
    "distillation_loss",
    "fit",
    "hidden_state_loss",
    "parameter_groups",
    "preset",
    "training_of",
    "watching",
]
