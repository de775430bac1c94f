"""Distillation: the float model teaches the quantized one through its logits, and its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatana.errors import DataError

PIECE = 1 << 19
"""Logits worked on at a time. Those of a vocabulary fill hundreds of megabytes: whole tensors would go through memory a dozen times."""


class _Divergence(torch.autograd.Function):
    """KL(p || q) at each position, float32;   d KL / d student = (q - p) / T, kept in the student's dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        classes = student.shape[-1]
        rows, taught = student.reshape(-1, classes), teacher.reshape(-1, classes)
        found = torch.empty(len(rows), dtype=torch.float32, device=student.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(rows) if wanted else None
        size = max(1, PIECE // max(1, classes))
        for start in range(0, len(rows), size):
            piece = slice(start, start + size)
            log_q = F.log_softmax(rows[piece].float() / temperature, dim=-1)
            log_p = F.log_softmax(taught[piece].float() / temperature, dim=-1)
            p = log_p.exp()
            found[piece] = (p * (log_p - log_q)).sum(-1)
            if gradient is not None:
                gradient[piece] = log_q.exp_().sub_(p).div_(temperature)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.shape = student.shape
        return found.reshape(student.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        factor = outer.reshape(-1, 1)
        inner = (gradient * factor.to(gradient.dtype)).masked_fill_(
            factor == 0, 0.0
        )  # what a mask leaves out may be infinite
        return inner.reshape(ctx.shape), None, None


def distillation_loss(
    student_logits: Tensor, teacher_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """T^2 * mean over unmasked positions of KL(teacher || student), in float32.

    KL = sum_c p_c (log p_c - log q_c),  p = softmax(teacher / T), q = softmax(student / T);  T^2 keeps the size
    of the gradients when T changes.
    Shapes: logits (*positions, classes); mask (*positions), nonzero where a position counts. Returns a float32
    scalar, 0 if none counts; the teacher gets no gradient.
    Raises: DataError for shapes that do not match or temperature <= 0.   Reference: Hinton et al. 2015, 2."""
    if student_logits.shape != teacher_logits.shape:
        raise DataError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} "
            f"differ in shape; "
            f"the teacher is the float model of the student"
        )
    if not temperature > 0:
        raise DataError(f"temperature={temperature} must be above 0")
    divergence: Tensor = _Divergence.apply(student_logits, teacher_logits.detach(), temperature)  # type: ignore[assignment]
    if mask is None:
        return divergence.mean() * temperature**2
    if mask.shape != divergence.shape:
        raise DataError(
            f"the mask has shape {tuple(mask.shape)}, the logits have positions {tuple(divergence.shape)}; "
            f"give one per position"
        )
    used = mask != 0
    return divergence.masked_fill(~used, 0.0).sum() / used.sum().clamp(min=1) * temperature**2


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor | None = None) -> Tensor:
    """Mean over layers and unmasked positions of |s - t|^2 / |t|^2, in float32: the share of noise in what each layer hands on.

    Shapes: a tensor (*positions, width) per layer; mask (*positions), nonzero where a position counts. Returns a float32 scalar, 0 if none
    counts; the teacher gets no gradient. Each position is divided by its own size, since a few are hundreds of times as large as others.
    Raises: DataError for other numbers of layers or shapes.   Reference: Jiao et al. 2020 (TinyBERT), eq. 8, without its scale."""
    if [s.shape for s in student] != [t.shape for t in teacher] or not student:
        raise DataError(
            f"hidden states of student and teacher differ: {len(student)} of {[tuple(s.shape) for s in student[:1]]} and "
            f"{len(teacher)} of {[tuple(t.shape) for t in teacher[:1]]}; the teacher is the float model of the student"
        )
    used = torch.ones(student[0].shape[:-1], device=student[0].device) if mask is None else (mask != 0).float()
    noise = [_noise(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
    return (torch.stack(noise).mean(0) * used).sum() / used.sum().clamp(min=1)


def _noise(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=1e-12)
