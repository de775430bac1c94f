"""Controller: when each thing of a training with quantization begins and ends.

    step 0 ............ float_steps ................ freeze_ranges_at .......... total_steps
    | quantizers off    | fake quantization, ranges followed | ranges frozen     |
    | BatchNorm statistics move ............ freeze_batch_norm_at | stay         |   (Krishnamoorthi 2018, 3.2.2)

Any loop can use it: make one before training, call `step()` after each optimizer step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from qatana.errors import ModelError
from qatana.nn.conv import Conv
from qatana.nn.settle import settle_weights
from qatana.quantizer import Quantizer, agree, quantizers
from qatana.quantizer.ranges import MOMENTUM
from qatana.train.failure import TrainingError

OBSERVED = 32  # float steps, the last ones before quantization starts, that ranges are taken from
SETTLE_EVERY = 10  # steps between two updates of scales whose ranges are followed


class Controller:
    """Drives the quantizers and BatchNorm layers of a prepared model through `total_steps` steps.

    float_steps           steps with quantizers off; over the last ones ranges are observed, and all scales are
                          set when quantization starts
    freeze_ranges_at      until then static activation ranges follow the data by a moving average; 0: they stay
                          as calibrated; None: to the end
    freeze_batch_norm_at  from then on BatchNorm uses and keeps its running statistics, also in train mode;
                          None: never
    Under torch.distributed every process has one and steps it; ranges take in the batches of all.
    Each is a number of steps (int) or a share of total_steps (float from 0 to 1). A calibrated model with
    float_steps=0 starts quantized, with the scales it has (PTQ start).
    State: the number of steps done; all else follows from it, or is a buffer of the model (save that too).
    Raises: TrainingError for values that make no schedule; ModelError for a model without quantizers, or one
    that is not calibrated and has no float steps to be calibrated in."""

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        float_steps: int | float = 0,
        freeze_ranges_at: int | float | None = 0,
        freeze_batch_norm_at: int | float | None = 2 / 3,
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise TrainingError(f"total_steps={total_steps!r} must be an integer of at least 1")
        self.model, self.total_steps = model, total_steps
        self.float_steps = _steps("float_steps", float_steps, total_steps)
        never = total_steps + 1
        self.freeze_ranges_at = (
            never if freeze_ranges_at is None else _steps("freeze_ranges_at", freeze_ranges_at, total_steps)
        )
        self.freeze_batch_norm_at = (
            never if freeze_batch_norm_at is None else _steps("freeze_batch_norm_at", freeze_batch_norm_at, total_steps)
        )
        if self.float_steps >= total_steps:
            raise TrainingError(
                f"float_steps={float_steps!r} leaves no quantized step of {total_steps}; use less, or train "
                f"the float model without qatana"
            )
        self._quantizers = quantizers(model)
        if not self._quantizers:
            raise ModelError("the model has no quantizers; call qatana.prepare(model, plan) first")
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._handles: list[RemovableHandle] = []
        self._step = 0
        if self.float_steps == 0:
            self._check_calibrated()
        self._apply()

    @property
    def current_step(self) -> int:
        """Optimizer steps done."""
        return self._step

    @property
    def quantizing(self) -> bool:
        """Whether the next step runs with fake quantization."""
        return self._step >= self.float_steps

    @property
    def observing(self) -> bool:
        """Whether the next step observes activation ranges."""
        if not self.quantizing:
            return self._step >= self.float_steps - OBSERVED
        return self._step < self.freeze_ranges_at

    @property
    def batch_norm_frozen(self) -> bool:
        """Whether BatchNorm statistics stand still in the next step."""
        return self._step >= self.freeze_batch_norm_at

    @property
    def phase(self) -> str:
        """What the next step does, in words: "float", "quantized", then ", ranges followed" and ", batch norm
        frozen"."""
        parts = ["quantized" if self.quantizing else "float"]
        if self.observing and self._followed():
            parts.append("ranges followed" if self.quantizing else "ranges observed")
        if self._norms and self.batch_norm_frozen:
            parts.append("batch norm frozen")
        return ", ".join(parts)

    def step(self) -> None:
        """One optimizer step was done: settle what is due and set all switches for the next one."""
        if self.observing:
            agree([q.range for q in self._followed() if q.range is not None])
            self._forget()
        self._step += 1
        if self._step == self.float_steps:
            self._settle(everything=True)
        elif self.quantizing and self.float_steps < self._step <= self.freeze_ranges_at:
            since = self._step - self.float_steps
            if since % SETTLE_EVERY == 0 or self._step in (self.freeze_ranges_at, self.total_steps):
                self._settle(everything=False)
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """Plain integers (JSON): the step and the schedule. Ranges and scales are in the model's own
        state_dict."""
        return {"step": self._step, **self._schedule()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; load the model's state_dict too. Raises: TrainingError if it belongs
        to another schedule."""
        for key, value in self._schedule().items():
            if key not in state or state[key] != value:
                raise TrainingError(
                    f"the saved controller has {key}={state.get(key)!r}, this one {value}; resume with the "
                    f"same schedule or start anew"
                )
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise TrainingError(
                f"the saved controller has step={step!r}, which is no number of steps; the state is damaged"
            )
        self._step = step
        self._apply()

    # -- inside
    # ----------------------------------------------------------------------------------------------------
    def _schedule(self) -> dict[str, int]:
        names = ("total_steps", "float_steps", "freeze_ranges_at", "freeze_batch_norm_at")
        return {name: getattr(self, name) for name in names}

    def _followed(self) -> list[Quantizer]:
        """Quantizers whose range is observed: static activations; learned ones only until training moves
        their scales."""
        return [q for q in self._quantizers.values() if q.range is not None and not (q.learned and self.quantizing)]

    def _check_calibrated(self) -> None:
        name = next((name for name, q in self._quantizers.items() if not bool(q.calibrated)), None)
        if name is not None:
            raise ModelError(
                f"{name}: not calibrated; run qatana.calibrate(model, loader) first, or give float_steps to "
                f"observe ranges in"
            )

    @torch.no_grad()
    def _forget(self) -> None:
        """Make histograms moving averages too: what they hold counts (1 - MOMENTUM) as much at the next
        batch."""
        for quantizer in self._followed():
            if quantizer.range is not None and quantizer.range.has_histogram:
                quantizer.range.histogram.mul_(1 - MOMENTUM)

    def _settle(self, everything: bool) -> None:
        """Set activation scales from their ranges; with `everything`, those of weights too."""
        if everything:
            settle_weights(self.model)
        for quantizer in self._followed():
            quantizer.settle()

    def _apply(self) -> None:
        followed = set(self._followed()) if self.observing else set()
        for quantizer in self._quantizers.values():
            quantizer.enabled = self.quantizing
            quantizer.observing = quantizer.following = quantizer in followed
        for module in self.model.modules():
            if isinstance(module, Conv):
                module.freeze_batch_norm = self.batch_norm_frozen
        if self.batch_norm_frozen and not self._handles:
            self._handles = [norm.register_forward_pre_hook(_stay_in_eval) for norm in self._norms]
        elif not self.batch_norm_frozen and self._handles:
            for handle in self._handles:
                handle.remove()
            self._handles = []


def _stay_in_eval(module: nn.Module, _inputs: Any) -> None:
    """A hook, since loops (the HF Trainer at every step) call model.train(), which would thaw the
    statistics."""
    module.training = False


def _steps(name: str, value: int | float, total: int) -> int:
    """Steps from a count (int) or a share of the total (float). Raises: TrainingError naming the value."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TrainingError(f"{name}={value!r} must be a number of steps (int) or a share of them (float from 0 to 1)")
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise TrainingError(
                f"{name}={value!r} is a float, so a share of the {total} steps: it must lie between 0 and 1"
            )
        return round(value * total)
    if not 0 <= value <= total:
        raise TrainingError(f"{name}={value} must lie between 0 and total_steps={total}")
    return value
