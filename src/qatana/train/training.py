"""Training: every choice of a training with quantization in one validated value, and the presets of the
literature."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qatana.errors import DataError, RecipeError, nearest

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
When = Count | Share
"""A number of steps (int) or a share of all steps (float)."""


class Training(BaseModel):
    """How long, how fast, and what happens when. Frozen; keys of a job file.

    steps, epochs     length: exactly one of them. An epoch is one pass over the loader
    lr, optimizer     "adamw" (betas, eps) or "sgd" (momentum)
    weight_decay      of matrices only (see parameter_groups)
    warmup, schedule, final_lr    lr rises linearly over `warmup` (steps or share), then falls to final_lr * lr
    code_lr           rate of weights whose scale is learned, in codes: they, all learned scales and norms' weights are stepped in their own
                      units (see CodeUnits), so that scale_lr counts in shares of a scale (None: all in their absolute size, at lr)
    scale_lr          rate of learned scales, and with code_lr of norms' weights, in shares of themselves (None: lr)
    lr_factors        {name pattern: multiple of its rate}
    frozen            name patterns of parameters that do not train
    clip              largest gradient norm (None: no clipping)
    autocast          "bfloat16": forward passes (the teacher's too) run under torch.autocast. Losses, gradients, optimizer and scales stay
                      float32; what is judged and converted afterwards runs without it
    distillation      share d of the loss: (1 - d) * task + d * T^2 KL(teacher || student), T = temperature
    hidden_distillation   h of + h * noise of the hidden states (`hidden_state_loss`), for models of transformers
    float_steps, freeze_ranges_at, freeze_batch_norm_at    see Controller
    seed              of torch, NumPy and Python, set when the training starts (None: left alone)
    sample_every      steps between two samples of saturation and scale drift (0: never)
    checkpoint_every  steps between two checkpoints (0: only after the last step)"""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: Annotated[int, Field(ge=1)] | None = None
    epochs: Positive | None = None
    lr: Positive
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    warmup: When = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: Share = 0.0
    code_lr: Positive | None = None
    scale_lr: NotNegative | None = None
    lr_factors: dict[str, NotNegative] = {}
    frozen: tuple[str, ...] = ()
    clip: Positive | None = 1.0
    autocast: Literal["bfloat16"] | None = None
    distillation: Share = 0.0
    hidden_distillation: NotNegative = 0.0
    temperature: Positive = 1.0
    float_steps: When = 0
    freeze_ranges_at: When | None = 0
    freeze_batch_norm_at: When | None = 2 / 3
    seed: Count | None = 0
    sample_every: Count = 10
    checkpoint_every: Count = 100

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"give exactly one of steps and epochs, not steps={self.steps}, epochs={self.epochs}")
        if self.code_lr is not None and self.float_steps:
            raise ValueError(
                f"code_lr={self.code_lr} with float_steps={self.float_steps}: before their scales are known, weights have no codes to be "
                f"stepped by; start from a calibrated model (float_steps=0) or leave code_lr out"
            )
        return self

    def total_steps(self, loader: Any) -> int:
        """Optimizer steps over this loader. Raises: DataError if epochs are asked for and the loader has no
        length, or is empty."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        if not hasattr(loader, "__len__"):
            raise DataError("the loader has no length, so epochs cannot be counted; give `steps` instead")
        if len(loader) == 0:
            raise DataError("the training loader is empty; check the data path, the split and the batch size")
        return max(1, math.ceil(self.epochs * len(loader)))

    def rate(self, step: int, total: int) -> float:
        """Multiple of lr at `step`, counted from 0, of `total`:  (step + 1) / w for step < w (warm-up), then
        with
        x = (step - w) / (total - w):  f + (1 - f) * {(1 + cos(pi x)) / 2, 1 - x, 1}  for cosine, linear,
        constant; f = final_lr."""
        warm = self.warmup if isinstance(self.warmup, int) else round(self.warmup * total)
        if step < warm:
            return (step + 1) / warm
        x = min(1.0, (step - warm) / max(1, total - warm))
        falling = {"cosine": (1 + math.cos(math.pi * x)) / 2, "linear": 1 - x, "constant": 1.0}[self.schedule]
        return self.final_lr + (1 - self.final_lr) * falling


PRESETS: dict[str, dict[str, Any]] = {
    # Wu et al. 2020 (arXiv 2004.09602), section 5: 10 % of the epochs, cosine from 1 % of the initial rate,
    # SGD with momentum;
    # statistics of BatchNorm frozen over the last third (Krishnamoorthi 2018, section 3.2.2, and
    # torchvision's QAT reference).
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-4, "schedule": "cosine", "warmup": 0.0,
    "clip": None,
            "freeze_batch_norm_at": 2 / 3},
    # The rate and the warm-up of BERT fine-tuning (Devlin et al. 2019, appendix A.3) as Q8BERT and I-BERT
    # keep them for QAT.
    "adamw": {"optimizer": "adamw", "weight_decay": 0.01, "schedule": "cosine", "warmup": 0.1, "clip": 1.0},
}  # fmt: skip
KINDS = {
    "cnn": "sgd",
    "image-classification": "sgd",
    "transformer": "adamw",
    "token-classification": "adamw",
    "text-classification": "adamw",
}
_WHEN = ("warmup", "float_steps", "freeze_ranges_at", "freeze_batch_norm_at")
FLOAT_LR = {"sgd": 0.1, "adamw": 5e-4}  # where the caller does not say what the float model was trained with
RATE = {"sgd": 0.01, "adamw": 0.1}  # of the float rate
BUDGET = 0.1  # of the float steps


def preset(
    name: str, *, float_lr: float | None = None, float_steps_done: int | None = None, **changes: Any
) -> Training:
    """The usual training for a model that starts from its best calibrated (PTQ) state.

    name     "sgd", "adamw", or a kind of model or task: "cnn", "transformer", "image-classification" ...
    float_lr, float_steps_done    rate and length of the float training: QAT takes 1 % (sgd) or 10 % (adamw) of
             the rate and 10 % of the steps. Where not known: rates of 0.1 and 5e-4, and one epoch
    changes  fields of Training that differ
    Raises: RecipeError naming the field, the value and what is allowed."""
    key = KINDS.get(name, name)
    if key not in PRESETS:
        raise RecipeError(f"unknown training preset '{name}'{nearest(name, [*PRESETS, *KINDS])}")
    fields = dict(PRESETS[key], lr=RATE[key] * (FLOAT_LR[key] if float_lr is None else float_lr))
    if "steps" not in changes and "epochs" not in changes:
        fields |= {"epochs": 1.0} if float_steps_done is None else {"steps": max(1, round(BUDGET * float_steps_done))}
    return training_of(fields | changes)


def training_of(fields: dict[str, Any]) -> Training:
    """A Training from plain data (a job file). Raises: RecipeError in one line, with the nearest key for an
    unknown one."""
    for key in fields:
        if key not in Training.model_fields:
            raise RecipeError(f"unknown key '{key}' in a training{nearest(key, Training.model_fields)}")
    try:
        return Training.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "steps"
        message = first["msg"].removeprefix("Value error, ")
        if where in _WHEN:
            message = "must be a number of steps (int) or a share of them (float from 0 to 1)"
        given = f"={first['input']!r}" if first["loc"] else ""
        raise RecipeError(f"training.{where}{given}: {message[:1].lower()}{message[1:]}") from error
