"""Distillation: the float model teaches the quantized one through its logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from qatana.errors import DataError


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
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    if mask is None:
        return divergence.mean() * temperature**2
    if mask.shape != divergence.shape:
        raise DataError(
            f"the mask has shape {tuple(mask.shape)}, the logits have positions {tuple(divergence.shape)}; "
            f"give one per position"
        )
    used = mask != 0
    return divergence.masked_fill(~used, 0.0).sum() / used.sum().clamp(min=1) * temperature**2
