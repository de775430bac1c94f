"""Which parameter decays, at which rate."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qatana as qt
from qatana.errors import ModelError
from qatana.train import TrainingError, parameter_groups


class Tagger(nn.Module):
    """An embedding tied to the output layer, a norm, a convolution and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(40, 128), nn.LayerNorm(128)
        self.middle, self.frozen = nn.Linear(128, 128), nn.Linear(128, 128)
        self.conv, self.head = nn.Conv1d(128, 128, 3), nn.Linear(128, 40)
        self.head.weight = self.table.weight
        self.frozen.requires_grad_(False)

    def forward(self, ids):
        return self.head(self.frozen(self.middle(self.norm(self.table(ids)))))


def named(model: nn.Module, groups) -> dict[str, list[str]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in groups}


def test_float_model() -> None:
    model = Tagger()
    groups = parameter_groups(model, 1e-3, 0.1)
    assert named(model, groups) == {
        "weights": ["middle.weight", "conv.weight"],
        "plain": ["table.weight", "norm.weight", "norm.bias", "middle.bias", "conv.bias", "head.bias"],
    }
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(1e-3, 0.1), (1e-3, 0.0)]


def test_prepared_model_keeps_the_groups_and_adds_scales() -> None:
    model = Tagger()
    before = named(model, parameter_groups(model, 1.0, 0.1))
    ids = torch.arange(12).reshape(2, 6)
    model = qt.prepare(model, qt.plan(model, "ort:int4", {"ids": ids}, mode="modules"))
    groups = parameter_groups(model, 1.0, 0.1, scale_lr=0.01)
    found = named(model, groups)
    assert {k: found[k] for k in before} == before
    learned = [n for n, q in qt.quantizers(model).items() if q.learned]
    assert len(found["scales"]) == len(learned) > 0
    assert (groups[2]["lr"], groups[2]["weight_decay"]) == (0.01, 0.0)
    ids_of_all = [id(p) for g in groups for p in g["params"]]
    assert len(ids_of_all) == len(set(ids_of_all))
    torch.optim.AdamW(groups)


def test_untouched_rows_of_a_table_keep_their_bits(two_bits) -> None:
    """The reason why tables do not decay: rows that no batch holds stay as pretrained."""
    model = Tagger()
    before = model.table.weight.detach().clone()
    model.head = nn.Linear(128, 40)  # untied: only rows 0 and 1 get a gradient
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 0.5))
    model(torch.tensor([[0, 1]])).sum().backward()
    optimizer.step()
    assert torch.equal(model.table.weight[2:], before[2:])
    assert not torch.equal(model.table.weight[:2], before[:2])


def test_factors_make_groups_of_their_own() -> None:
    model = Tagger()
    groups = parameter_groups(model, 1e-3, 0.1, factors={"conv.*": 10, "*.bias": 2})
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in groups}
    assert found == {
        "weights": (1e-3, 0.1),
        "weights conv.*": (1e-2, 0.1),
        "plain": (1e-3, 0.0),
        "plain *.bias": (2e-3, 0.0),
        "plain conv.*": (1e-2, 0.0),
    }


def test_errors() -> None:
    with pytest.raises(TrainingError, match="lr=-1"):
        parameter_groups(nn.Linear(2, 2), -1, 0)
    with pytest.raises(TrainingError, match="weight_decay=nan"):
        parameter_groups(nn.Linear(2, 2), 1, float("nan"))
    with pytest.raises(ModelError, match="requires_grad_"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1, 0)
