"""Objective: batch -> loss. Finds labels and logits, and mixes in the teacher."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatana.batch import LABELS, move, split_inputs
from qatana.errors import DataError
from qatana.train.distill import distillation_loss, hidden_state_loss
from qatana.train.failure import TrainingError

IGNORE = -100
Loss = Callable[[Any, Any], Tensor]


class Objective:
    """loss = (1 - d) * task + d * T^2 KL(teacher || student) + h * noise of the hidden states; d, T and h from the training.

    task  `loss(logits, labels)` if given; else the model's own loss if it takes `labels` (Hugging Face); else
          cross entropy over the last dimension of the logits, label -100 ignored
    With d = 1 the labels are not looked at, but for which positions count.
    The KL is the mean over positions whose label counts, where labels are per position; else over those of the
    attention mask.
    Hidden states are those that a Hugging Face model returns with `output_hidden_states`, the embedding's aside.
    Raises: TrainingError for a teacher without distillation or the reverse; DataError for missing labels or hidden states."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        teacher: nn.Module | None,
        share: float,
        temperature: float,
        hidden: float = 0.0,
    ) -> None:
        if (teacher is not None) != (share > 0 or hidden > 0):
            have = (
                "a teacher is given but distillation is 0"
                if teacher is not None
                else f"{f'distillation={share}' if share else f'hidden_distillation={hidden}'} needs a teacher"
            )
            raise TrainingError(f"{have}; give both, e.g. distillation=0.5 and teacher=a deep copy of the float model")
        self.model, self.loss, self.teacher = model, loss, teacher
        self.share, self.temperature, self.hidden = share, temperature, hidden
        self.takes_labels = loss is None and "labels" in inspect.signature(model.forward).parameters
        self.is_causal = type(model).__name__.endswith("ForCausalLM")

    def __call__(self, batch: Any, device: torch.device) -> tuple[Tensor, dict[str, float]]:
        """The loss, a scalar that can be differentiated, and its parts for the record."""
        args, kwargs = move(split_inputs(batch, self.model), device)
        labels = find_labels(batch, len(args))
        labels = labels.to(device) if isinstance(labels, Tensor) else labels
        taught_alone = self.share == 1  # what the labels say counts for nothing: it is not computed
        if self.hidden:
            kwargs |= {"output_hidden_states": True}
        own_loss = self.takes_labels and labels is not None and bool(kwargs) and not taught_alone
        outputs = self.model(*args, **kwargs, labels=labels) if own_loss else self.model(*args, **kwargs)
        logits = logits_of(outputs)
        task = None if taught_alone else outputs["loss"] if own_loss else self._task(logits, labels)
        if self.teacher is None:
            assert task is not None
            return task, {}
        with torch.no_grad():
            taught = self.teacher(*args, **kwargs)
        mask = position_mask(logits, labels, kwargs.get("attention_mask"), self.is_causal)
        total, parts = torch.zeros((), device=logits.device), {}
        if task is not None:
            total, parts = (1 - self.share) * task, {"task_loss": float(task.detach())}
        if self.share:
            divergence = distillation_loss(logits, logits_of(taught), mask=mask, temperature=self.temperature)
            total, parts = total + self.share * divergence, parts | {"distillation_loss": float(divergence.detach())}
        if self.hidden:
            noise = hidden_state_loss(*map(hidden_states_of, (outputs, taught)), mask=mask)
            total, parts = total + self.hidden * noise, parts | {"hidden_loss": float(noise.detach())}
        return total, parts

    def _task(self, logits: Tensor, labels: Any) -> Tensor:
        if labels is None:
            raise DataError("the batch has no labels: yield (inputs, labels), or a dict with a 'labels' tensor")
        if self.loss is not None:
            return self.loss(logits, labels)
        return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE)


def find_labels(batch: Any, inputs_taken: int) -> Any:
    """Labels of a batch: under "labels" or "label" of a mapping, else the first entry of a tuple behind the
    model's inputs."""
    if hasattr(batch, "items"):
        return next((batch[key] for key in LABELS[:2] if key in batch), None)
    if isinstance(batch, (tuple, list)):
        taken = max(1, inputs_taken)
        return batch[taken] if len(batch) > taken else None
    return None


def logits_of(outputs: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an object with .logits, or a tuple that starts with
    them."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if hasattr(outputs, "get") else getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, (tuple, list)) and outputs:
        found = outputs[0]
    if not isinstance(found, Tensor):
        raise DataError(
            f"the model returned {type(outputs).__name__} without logits; return a tensor or an object with .logits"
        )
    return found


def hidden_states_of(outputs: Any) -> list[Tensor]:
    """What each layer handed on: the hidden states of a Hugging Face model's output but the first, the embedding's.
    Raises: DataError if there are none."""
    found = getattr(outputs, "hidden_states", None)
    if not found:
        raise DataError(
            f"hidden_distillation needs hidden states and {type(outputs).__name__} has none: it takes models that return them with "
            f"output_hidden_states=True (transformers); set it to 0 for others"
        )
    return list(found[1:])


def position_mask(logits: Tensor, labels: Any, attention_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """Which positions of the logits count, or None for all: those with a label (of the next token in a causal
    model)."""
    positions = logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.shape == positions and not labels.is_floating_point():
        return (F.pad(labels[..., 1:], (0, 1), value=IGNORE) if is_causal else labels) != IGNORE
    return attention_mask if attention_mask is not None and attention_mask.shape == positions else None
