"""Where labels and logits are found, and which positions teach."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from qatana.errors import DataError
from qatana.train import TrainingError, distillation_loss, hidden_state_loss
from qatana.train.objective import Objective, find_labels, logits_of, position_mask

TINY = {"vocab_size": 10, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def test_labels() -> None:
    assert find_labels({"x": 1, "labels": 2}, 0) == 2
    assert find_labels({"x": 1, "label": 3}, 0) == 3
    assert find_labels((1, 2), 1) == 2
    assert find_labels((1, 2, 3), 2) == 3
    assert find_labels(({"x": 1}, 2), 0) == 2
    assert find_labels((1,), 1) is None
    assert find_labels(torch.zeros(2), 1) is None


def test_logits() -> None:
    x = torch.zeros(2)
    assert all(logits_of(o) is x for o in (x, (x, 1), {"logits": x}, SimpleNamespace(logits=x)))
    with pytest.raises(DataError, match="without logits"):
        logits_of({"loss": x})


def test_positions_with_a_label_teach() -> None:
    logits, labels = torch.zeros(1, 4, 9), torch.tensor([[-100, 3, 0, -100]])
    attention = torch.tensor([[1, 1, 1, 0]])
    mask = position_mask(logits, labels, attention, is_causal=False)
    assert mask is not None
    assert mask.tolist() == [[False, True, True, False]]
    causal = position_mask(logits, labels, attention, is_causal=True)  # position i predicts label i + 1
    assert causal is not None
    assert causal.tolist() == [[True, True, False, False]]
    assert position_mask(logits, None, attention, is_causal=False) is attention
    assert position_mask(torch.zeros(1, 9), torch.tensor([1]), attention, is_causal=False).tolist() == [True]  # type: ignore[union-attr]
    assert position_mask(torch.zeros(1, 9), torch.tensor([0.5, 1.0]), None, is_causal=False) is None


def test_the_models_own_loss_is_used_where_it_has_one() -> None:
    class Own(nn.Module):
        def forward(self, x, labels=None):
            return {"loss": (x * 3).sum(), "logits": x}

    batch = {"x": torch.ones(2, 4), "labels": torch.zeros(2, dtype=torch.long)}
    loss, parts = Objective(Own(), None, None, 0.0, 1.0)(batch, torch.device("cpu"))
    assert float(loss) == 24.0
    assert parts == {}
    mine, _ = Objective(Own(), lambda logits, labels: logits.sum(), None, 0.0, 1.0)(batch, torch.device("cpu"))
    assert float(mine) == 8.0


def test_hidden_states_teach_besides_logits() -> None:
    """loss = d * KL + h * noise, each as its own function gives it; without d the labels' loss stays whole."""
    torch.manual_seed(0)
    model = BertForTokenClassification(BertConfig(**TINY)).eval()
    teacher = BertForTokenClassification(BertConfig(**TINY)).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[0, 1, -100]])}
    with torch.no_grad():
        outs = [m(input_ids=batch["input_ids"], output_hidden_states=True) for m in (model, teacher)]
        mask = batch["labels"] != -100
        noise = hidden_state_loss(*(out.hidden_states[1:] for out in outs), mask=mask)
        divergence = distillation_loss(*(out.logits for out in outs), mask=mask)
        task = model(**batch).loss
    cpu = torch.device("cpu")
    loss, parts = Objective(model, None, teacher, 1.0, 1.0, 3.0)(batch, cpu)
    assert torch.equal(loss.detach(), divergence + 3 * noise)
    assert parts == {"distillation_loss": float(divergence), "hidden_loss": float(noise)}
    loss, parts = Objective(model, None, teacher, 0.0, 1.0, 0.5)(batch, cpu)
    assert torch.equal(loss.detach(), task + 0.5 * noise)
    assert set(parts) == {"task_loss", "hidden_loss"}


def test_hidden_states_have_to_be_there() -> None:
    class Logits(nn.Module):
        def forward(self, x, output_hidden_states=False):
            return {"logits": x}

    with pytest.raises(DataError, match="hidden_distillation needs hidden states and dict has none"):
        Objective(Logits(), None, Logits(), 1.0, 1.0, 1.0)({"x": torch.ones(2, 4)}, torch.device("cpu"))
    with pytest.raises(TrainingError, match=r"hidden_distillation=1\.0 needs a teacher"):
        Objective(Logits(), None, None, 0.0, 1.0, 1.0)
