"""fit: the training loop. Resumed from a checkpoint, it ends with the bits of an uninterrupted run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qatana.errors import DataError, nearest
from qatana.numerics import workspace
from qatana.quantizer import quantizers
from qatana.train.checkpoint import Checkpoint, find, model_tensors, restore_model
from qatana.train.code_units import CodeUnits
from qatana.train.controller import Controller
from qatana.train.failure import TrainingError, diverged
from qatana.train.groups import parameter_groups
from qatana.train.history import History
from qatana.train.objective import Loss, Objective
from qatana.train.random_state import RandomState, seed
from qatana.train.training import Training
from qatana.train.watch import Watch, saturation


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    training: Training,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Train a model in place; returns what was recorded. The model is in eval mode afterwards.

    model       prepared and calibrated (PTQ start), or prepared, with training.float_steps; a plain float model
                trains as it is
    loader      an object with epoch(n) -> iterable of batches (and epoch(n, start=k), if it can skip), or an
                iterable that can be iterated again. A batch is a dict with "labels" or (inputs, labels)
    loss        loss(logits, labels) -> scalar; default: the model's own, else cross entropy
    teacher     float model for distillation (training.distillation or hidden_distillation above 0): a deep copy taken before `prepare`
    on_step     called with each step's record (see History), after the step
    checkpoint  folder: resumed from if it holds a checkpoint; replaced every training.checkpoint_every steps
                and after the last
    Raises: TrainingError if loss or gradients are not finite (parameters and the last checkpoint stay as after
    the last good step) or the checkpoint is of another model or training; DataError for an empty or used-up
    loader; ArtifactError for a bad folder."""
    run = Run(model, loader, training, loss, teacher, None if checkpoint is None else Path(checkpoint))
    was_trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        _freeze(model, training.frozen)
        run.start()
        run.train(on_step)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trainable[name])
        workspace.clear()  # buffers of steps, which nobody needs before the next training
    model.eval()
    return run.history


class Run:
    """One call of `fit`: the model, its optimizer, and where in the data and the schedule it stands."""

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], training: Training, loss: Loss | None, teacher:
        nn.Module | None,
        folder: Path | None,
    ) -> None:  # fmt: skip
        self.model, self.loader, self.training, self.folder = model, loader, training, folder
        self.total = training.total_steps(loader)
        self.objective = Objective(
            model, loss, teacher, training.distillation, training.temperature, training.hidden_distillation
        )
        self.teacher, self.device = teacher, next(model.parameters()).device
        self.step = self.epoch = self.batch = 0
        self.history, self.watch = History(), Watch(model)
        self.resumed: Checkpoint | None = None
        self.epoch_random = RandomState.now()

    def start(self) -> None:
        """Begin, or go on where the checkpoint stands."""
        place = None if self.folder is None else find(self.folder)
        saved = None if place is None else Checkpoint.load(place)
        if saved is not None:
            assert place is not None
            self._check_same(saved, place)
            restore_model(self.model, saved.model, place)
        elif self.training.seed is not None:
            seed(self.training.seed)
        self.controller = self._controller()
        self.optimizer = _optimizer(self.model, self.training)
        self.units = None if self.training.code_lr is None else CodeUnits(self.model)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        if saved is None:
            self.watch.begin()
        else:
            self._restore(saved)
        self.model.train()
        if self.teacher is not None:
            self.teacher.to(self.device).eval()

    def train(self, on_step: Callable[[dict[str, Any]], None] | None) -> None:
        """All steps that are left."""
        if self.step >= self.total:
            return
        every = self.training.checkpoint_every
        for batch in self._batches():
            self._one_step(batch)
            if self.folder is not None and (self.step == self.total or (every and self.step % every == 0)):
                self._save(self.folder)
            if on_step is not None:
                on_step(self.history.records[-1])
            if self.step >= self.total:
                return

    # -- one step
    # --------------------------------------------------------------------------------------------------
    def _one_step(self, batch: Any) -> None:
        rate = self.training.rate(self.step, self.total)
        for group, initial in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = initial * rate
        every = self.training.sample_every
        sampled = bool(every) and self.step % every == 0
        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.training.autocast is not None)
        with self.watch.sampling(sampled) as counts, half:
            loss, parts = self.objective(batch, self.device)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise self._diverged("loss", value, batch)
        loss.backward()
        norm = self._clip(batch)
        with nullcontext() if self.units is None else self.units.step():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        record = {
            "step": self.step + 1,
            "loss": value,
            "lr": self.training.lr * rate,
            "grad_norm": norm,
            **parts,
        }
        record |= {"phase": "float" if self.controller is None else self.controller.phase}
        record |= {"saturation": saturation(counts), "scale_drift": self.watch.drift() if sampled else None}
        if self.controller is not None:
            self.controller.step()
        self.step += 1
        self.history.records.append(record)

    def _clip(self, batch: Any) -> float:
        """The norm of all gradients, which are scaled down to training.clip if it is larger."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        value = float(norm)
        if not math.isfinite(value):
            error = self._diverged("gradient norm", value, batch)
            self.optimizer.zero_grad(set_to_none=True)
            raise error
        if self.training.clip is not None and value > self.training.clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.training.clip, norm)
        return value

    def _diverged(self, what: str, value: float, batch: Any) -> TrainingError:
        losses = [record["loss"] for record in self.history.records[-50:]]
        return diverged(self.step + 1, what, value, self.model, batch, losses)

    # -- the data
    # --------------------------------------------------------------------------------------------------
    def _batches(self) -> Iterator[Any]:
        """Batches without end, epoch after epoch; `batch` counts those of this epoch that were handed out."""
        while True:
            skipped, saved = self.batch, self.resumed
            if saved is not None:
                self.epoch_random = saved.random["epoch"]
                self.epoch_random.restore()  # a shuffling sampler draws its order when the epoch is opened
            else:
                self.epoch_random = RandomState.now()
            batches = _open(self.loader, self.epoch, skipped)
            if saved is not None:
                saved.random["step"].restore()
                self.resumed = None
            for batch in batches:
                self.batch += 1
                yield batch
            if self.batch == 0:
                raise DataError(
                    f"the training loader yielded no batch in epoch {self.epoch}; give data, or something "
                    f"that can be iterated "
                    f"again (a list, a DataLoader, an object with epoch(n)), not a generator"
                )
            self.epoch, self.batch = self.epoch + 1, 0

    # -- checkpoints
    # -----------------------------------------------------------------------------------------------
    def _save(self, folder: Path) -> None:
        state = {
            "training": self._fields(),
            "total_steps": self.total,
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "controller": None if self.controller is None else self.controller.state_dict(),
            "records": self.history.records,
        }
        random = {"epoch": self.epoch_random, "step": RandomState.now()}
        Checkpoint(state, model_tensors(self.model), self.optimizer.state_dict(), self.watch.start, random).save(folder)

    def _fields(self) -> dict[str, Any]:
        """The training's fields that its result depends on."""
        return self.training.model_dump(mode="json", exclude={"checkpoint_every"})

    def _check_same(self, saved: Checkpoint, place: Path) -> None:
        own: dict[str, Any] = {**self._fields(), "total_steps": self.total}
        theirs = {**saved.state["training"], "total_steps": saved.state["total_steps"]}
        for key, value in own.items():
            if theirs.get(key) != value:
                raise TrainingError(
                    f"{place} was written by a training with {key}={theirs.get(key)!r}, this one has "
                    f"{value!r}; "
                    f"resume with the same, or give another folder"
                )

    def _restore(self, saved: Checkpoint) -> None:
        self.step, self.epoch, self.batch = (saved.state[key] for key in ("step", "epoch", "batch"))
        self.history = History(saved.state["records"])
        self.optimizer.load_state_dict(saved.optimizer)
        self.watch.start = {name: scale.to(self.device) for name, scale in saved.start.items()}
        if self.controller is not None:
            self.controller.load_state_dict(saved.state["controller"])
        saved.random["step"].restore()
        self.resumed = saved

    def _controller(self) -> Controller | None:
        if not quantizers(self.model):
            return None
        t = self.training
        return Controller(
            self.model, self.total, float_steps=t.float_steps, freeze_ranges_at=t.freeze_ranges_at,
            freeze_batch_norm_at=t.freeze_batch_norm_at,
        )  # fmt: skip


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    t = training
    groups = parameter_groups(model, t.lr, t.weight_decay, t.scale_lr, code_lr=t.code_lr, factors=t.lr_factors)
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=training.lr, betas=training.betas, eps=training.eps, fused=True)


def _freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise TrainingError(f"frozen: '{pattern}' matches no parameter of the model{nearest(pattern, names[:200])}")
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def _open(loader: Any, epoch: int, start: int) -> Iterator[Any]:
    """The batches of an epoch from number `start` on."""
    if not hasattr(loader, "epoch"):
        batches = iter(loader)
    elif "start" in inspect.signature(loader.epoch).parameters:
        return iter(loader.epoch(epoch, start=start))
    else:
        batches = iter(loader.epoch(epoch))
    for _ in islice(batches, start):
        pass
    return batches
