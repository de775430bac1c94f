"""distillation_loss against PyTorch's KL divergence in float64, and its gradient in closed form."""

from __future__ import annotations

import pytest
import torch

from qatana.errors import DataError
from qatana.train import distillation_loss, hidden_state_loss


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_value(temperature: float) -> None:
    student, teacher = torch.randn(6, 9), torch.randn(6, 9)
    expected = torch.nn.functional.kl_div(
        (student.double() / temperature).log_softmax(-1),
        (teacher.double() / temperature).softmax(-1),
        reduction="batchmean",
    )
    found = distillation_loss(student, teacher, temperature=temperature)
    # float32 log-softmax of 9 classes: a few ulp of values around 1
    assert float(found) == pytest.approx(float(expected) * temperature**2, rel=1e-5)


def test_gradient_is_the_difference_of_probabilities() -> None:
    """d loss / d student logit = T (q - p) / positions   (Hinton et al. 2015, eq. 2, times T^2)."""
    student, teacher = (
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(5, 7, dtype=torch.float64),
    )
    distillation_loss(student, teacher, temperature=3.0).backward()
    expected = 3.0 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)).detach() / 5
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-6)  # computed in float32


def test_mask_selects_positions() -> None:
    student, teacher = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    chosen = mask.bool()
    expected = distillation_loss(student[chosen], teacher[chosen])
    assert float(distillation_loss(student, teacher, mask=mask)) == pytest.approx(
        float(expected), rel=1e-6
    )  # order of a sum


def test_masked_infinities_do_not_leak() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)
    spoiled = torch.cat([student[:1], torch.full((1, 3), float("inf"))])
    distillation_loss(spoiled, teacher, mask=torch.tensor([1, 0])).backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_nothing_to_learn_from() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    loss = distillation_loss(logits, torch.randn(2, 3), mask=torch.zeros(2))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_equal_logits_cost_nothing_and_half_precision_counts_in_float32() -> None:
    logits = torch.randn(4, 5).to(torch.bfloat16)
    loss = distillation_loss(logits, logits)
    assert loss.dtype == torch.float32
    assert float(loss) == 0.0


def test_errors() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(DataError, match="temperature=0"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0)
    with pytest.raises(DataError, match="one per position"):
        distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(3))


def test_hidden_states_by_layer_and_position() -> None:
    """|s - t|^2 / |t|^2 in float64, each position by its own size, the mean over layers and the positions that count."""
    torch.manual_seed(0)
    teacher = [torch.randn(2, 3, 8) * 10.0**k for k in (0, 3)]
    student = [(t + 0.1 * torch.randn_like(t)).requires_grad_() for t in teacher]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    loss = hidden_state_loss(student, teacher, mask=mask)
    noise = [
        ((s.detach().double() - t) ** 2).sum(-1) / (t.double() ** 2).sum(-1)
        for s, t in zip(student, teacher, strict=True)
    ]
    expected = float((torch.stack(noise).mean(0) * mask).sum() / 4)
    assert abs(float(loss.detach()) - expected) < 1e-6 * expected, "float32"
    loss.backward()
    assert all(s.grad is not None and not s.grad[mask == 0].any() and s.grad[mask == 1].all() for s in student)
    assert float(hidden_state_loss(teacher, teacher)) == 0.0
    assert float(hidden_state_loss(student, teacher, mask=torch.zeros(2, 3)).detach()) == 0.0
    with pytest.raises(DataError, match=r"hidden states of student and teacher differ: 2 of .* and 1 of"):
        hidden_state_loss(student, teacher[:1])
