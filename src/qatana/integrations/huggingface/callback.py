"""Quantization-aware training inside the Hugging Face Trainer: a callback for schedule and metrics, a distillation loss.

    callback = QatanaCallback(freeze_batch_norm_at=0.7)
    distill = Distillation(model, teacher, share=0.5)                 # optional
    groups = qatana.parameter_groups(model, lr=5e-5, weight_decay=0.01)
    trainer = Trainer(model, args, callbacks=[callback], compute_loss_func=distill,
                      optimizers=(torch.optim.AdamW(groups), None), ...)

The Trainer's own optimizer would decay learned scales, hence `parameter_groups`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qatana as qt
from qatana.errors import require

require("transformers", "hf")

from transformers import TrainerCallback  # noqa: E402
from transformers.trainer_callback import ExportableState  # noqa: E402

IGNORE = -100


class QatanaCallback(TrainerCallback, ExportableState):
    """Drives a `qatana.Controller` over the Trainer's optimizer steps.

    float_steps, freeze_ranges_at, freeze_batch_norm_at    as in `qatana.Controller`: steps (int) or shares of
    max_steps (float). The state goes into each checkpoint's trainer_state.json, and a training resumed from it
    goes on with it; scales and ranges are in the model's state_dict, which the Trainer saves.
    Each log entry gets "qatana/quantizing", "qatana/observing" (0 or 1) and "qatana/saturation", the share of codes at an end of
    their range, sampled in the step that is logged. `report_through(trainer)` hands them to TensorBoard, W&B and whatever else
    `report_to` names.
    Raises: TrainingError, ModelError as the Controller does, when training begins; ModelError after the first step if the loss passed a
    quantized output head by (see `_Head`)."""

    def __init__(
        self,
        float_steps: int | float = 0,
        freeze_ranges_at: int | float | None = 0,
        freeze_batch_norm_at: int | float | None = 2 / 3,
    ) -> None:
        self.schedule = {
            "float_steps": float_steps,
            "freeze_ranges_at": freeze_ranges_at,
            "freeze_batch_norm_at": freeze_batch_norm_at,
        }
        self.controller: qt.Controller | None = None
        self.metrics: dict[str, float] = {}
        self._sampling, self._share = ExitStack(), _nothing
        self._head: _Head | None = None

    def report_through(self, trainer: Any) -> QatanaCallback:
        """Stand before the reporters, which write a log entry as soon as they see it; the Trainer puts them first. Returns itself."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._sampling.close()  # after a training that an error ended
        self.controller = qt.Controller(kwargs["model"], state.max_steps, **self.schedule)
        saved = state.stateful_callbacks.get(type(self).__name__) if state.global_step else None
        if isinstance(saved, list):
            saved = saved[0]
        if saved and saved["attributes"]["saved"]:
            self.controller.load_state_dict(saved["attributes"]["saved"])
        self._head = (
            None if args.torch_compile else _Head(kwargs["model"])
        )  # a compiled graph has no place to listen at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        every = max(1, int(state.logging_steps or 1))
        logged = args.logging_strategy == "steps" and (state.global_step + 1) % every == 0
        if logged and not args.torch_compile:
            self._share = self._sampling.enter_context(qt.watching(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.controller is not None
        if self._head is not None:
            self._head.check()
            self._head = None
        self.metrics = {
            "qatana/quantizing": float(self.controller.quantizing),
            "qatana/observing": float(self.controller.observing),
        }
        self._sampling.close()
        share = self._share()
        self.metrics |= {} if share is None else {"qatana/saturation": share}
        self._share = _nothing
        self.controller.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is not None and "loss" in logs:
            logs.update(self.metrics)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(self.metrics)

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into trainer_state.json."""
        saved = None if self.controller is None else self.controller.state_dict()
        return {"args": dict(self.schedule), "attributes": {"saved": saved}}


class _Head:
    """Whether the output head runs in the first step, if it is quantized. A loss that multiplies by its weight itself, in pieces, passes
    its quantizers by, and trains another model than the one that ships."""

    def __init__(self, model: Any) -> None:
        find = getattr(model, "get_output_embeddings", None)
        head = None if find is None else find()
        self.ran, self._handle = True, None
        if isinstance(head, nn.Module) and qt.quantizers(head):
            self.ran, self._handle = False, head.register_forward_hook(self._note)

    def _note(self, *_: Any) -> None:
        self.ran |= torch.is_grad_enabled()

    def check(self) -> None:
        """Raises: ModelError."""
        if self._handle is not None:
            self._handle.remove()
        if not self.ran:
            raise qt.ModelError(
                "the output head is quantized and did not run in the first step: a loss that reads its weight itself (TRL's and Liger's "
                "fused heads) passes its quantizers by. Keep the head float, QatanaConfig(..., modules_to_not_convert=['lm_head']), or "
                "compute the loss from the model's logits, as transformers.Trainer.compute_loss does"
            )


def _nothing() -> float | None:
    return None


class Distillation:
    """A `compute_loss_func`:  (1 - share) * cross entropy + share * T^2 KL(teacher || student).

    The Trainer hands over outputs and labels only, so a hook on the model keeps the inputs of the last forward
    for the teacher. Both terms are sums over the labelled positions divided by `num_items_in_batch`, so gradient
    accumulation stays exact.
    Shapes: logits (B, classes) or (B, T, classes); labels (B,) or (B, T), -100 where a position does not count.
    Raises: DataError if the batch has no labels."""

    def __init__(self, model: nn.Module, teacher: nn.Module, *, share: float = 0.5, temperature: float = 1.0) -> None:
        self.teacher, self.share, self.temperature = teacher.eval(), share, temperature
        self.is_causal = type(model).__name__.endswith("ForCausalLM")
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._handle = model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dropped = ("labels", "num_items_in_batch")
        self._inputs = (args, {name: value for name, value in kwargs.items() if name not in dropped})

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one batch, a scalar."""
        if labels is None:
            raise qt.DataError(
                "distillation mixes with the task's loss and needs 'labels' in each batch; add them to the data set"
            )
        (args, kwargs), self._inputs = self._inputs, ((), {})
        logits = outputs["logits"]
        with torch.no_grad():
            taught = self.teacher.to(logits.device)(*args, **kwargs)["logits"]
        if self.is_causal:
            labels = F.pad(labels[..., 1:], (0, 1), value=IGNORE)
        used = labels != IGNORE
        task = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="sum")
        divergence = qt.distillation_loss(logits, taught, mask=used, temperature=self.temperature) * used.sum()
        items = used.sum() if num_items_in_batch is None else num_items_in_batch
        return ((1 - self.share) * task + self.share * divergence) / items

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()
