"""qatana: train on the integers you ship.

recipe = qatana.recipe("ort:int8").skip("classifier")
plan = qatana.plan(model, recipe, example_inputs)
model = qatana.prepare(model, plan)
qatana.calibrate(model, loader)
...                                   # train, with qatana.Controller
artifact = qatana.convert(model)
qatana.export(artifact, "model.onnx")
qatana.verify(model, artifact, "model.onnx", batches).raise_on_difference()
"""

from qatana.artifact import Artifact
from qatana.calibrate import calibrate
from qatana.checkpoints import Checkpoint, read_checkpoint
from qatana.convert import convert, dequantize, integer_model
from qatana.errors import DataError, ModelError, QatanaError, RecipeError
from qatana.export import export, export_float
from qatana.gptq import gptq
from qatana.nn import quantize_gradients, register_layer
from qatana.numerics import Scheme, register_format, scheme
from qatana.prepare import equalize, plan, prepare, reorder
from qatana.ptq import ptq
from qatana.quantizer import Quantizer, quantizers
from qatana.recipe import TARGETS, Plan, Recipe, Rule, recipe, register_target
from qatana.report import ReportData, format_table, measure, render
from qatana.start import recipe_of, start_from
from qatana.train import (
    Controller,
    History,
    Training,
    TrainingError,
    distillation_loss,
    fit,
    parameter_groups,
    preset,
    training_of,
    watching,
)
from qatana.verify import Certificate, latency, open_file, run_file, verify

__version__ = "0.1.0"

__all__ = [
    "TARGETS",
    "Artifact",
    "Certificate",
    "Checkpoint",
    "Controller",
    "DataError",
    "History",
    "ModelError",
    "Plan",
    "QatanaError",
    "Quantizer",
    "Recipe",
    "RecipeError",
    "ReportData",
    "Rule",
    "Scheme",
    "Training",
    "TrainingError",
    "calibrate",
    "convert",
    "dequantize",
    "distillation_loss",
    "equalize",
    "export",
    "export_float",
    "fit",
    "format_table",
    "gptq",
    "integer_model",
    "latency",
    "measure",
    "open_file",
    "parameter_groups",
    "plan",
    "prepare",
    "preset",
    "ptq",
    "quantize_gradients",
    "quantizers",
    "read_checkpoint",
    "recipe",
    "recipe_of",
    "register_format",
    "register_layer",
    "register_target",
    "render",
    "reorder",
    "run_file",
    "scheme",
    "start_from",
    "training_of",
    "verify",
    "watching",
]
