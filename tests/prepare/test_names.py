"""Planning by module names alone, weights in common, plans as text, scales that need no data, and the way back to float."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qatana as qt


class Tied(nn.Module):
    """A table whose weight is also the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle, self.last = nn.Embedding(40, 64), nn.Linear(64, 64), nn.Linear(64, 40, bias=False)
        self.last.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.middle(self.table(ids))))


IDS = torch.arange(12).reshape(2, 6)
RECIPE = qt.recipe("torch", weight="int4/group32 sym learned mse", input="int8/token")


def prepared(recipe: qt.Recipe = RECIPE) -> nn.Module:
    model = Tied()
    return qt.calibrate(qt.prepare(model, qt.plan(model, recipe)))


def test_names_alone_give_the_plan_of_a_run() -> None:
    by_names, by_run = qt.plan(Tied(), RECIPE), qt.plan(Tied(), RECIPE, IDS)
    assert [(r.name, r.scheme) for r in by_names.rows] == [(r.name, r.scheme) for r in by_run.rows]
    model = Tied()
    assert torch.equal(prepared()(IDS), qt.calibrate(qt.prepare(model, by_run), [IDS])(IDS))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (qt.recipe("ort:int8"), "ort:int8 shares ranges, which one run of the model shows"),
        (qt.recipe("torch", key="int8/token"), "a rule quantizes 'key' of attention"),
    ],
)
def test_names_do_not_suffice_everywhere(recipe: qt.Recipe, message: str) -> None:
    with pytest.raises(qt.ModelError, match=message):
        qt.plan(Tied(), recipe)


def test_a_prepared_model_is_not_planned_again() -> None:
    with pytest.raises(qt.ModelError, match="Tied is quantized already, for torch"):
        qt.plan(prepared(), RECIPE)


def test_a_weight_in_common_has_one_quantizer_and_one_place() -> None:
    model = prepared()
    assert model.last.weight_quantizer is model.table.weight_quantizer
    assert not any(name.startswith("last.weight_quantizer") for name in model.state_dict())
    optimizer = torch.optim.SGD(qt.parameter_groups(model, 0.1, 0.0))
    model(IDS).square().mean().backward()
    optimizer.step()
    integer = qt.integer_model(model)
    assert torch.equal(integer(IDS), model.eval()(IDS))
    assert integer.last.weight is integer.table.weight
    assert [n for n in integer.state_dict() if n.endswith("codes")] == ["table.weight.codes", "middle.weight.codes"]
    twin = copy.deepcopy(integer)
    assert twin.last.weight is twin.table.weight
    assert twin.last.weight is not integer.last.weight


def test_other_schemes_stay_apart() -> None:
    model = prepared(RECIPE.rule("table", weight="int8/channel"))
    assert model.last.weight_quantizer is not model.table.weight_quantizer


def test_the_artifact_holds_a_weight_in_common_once(tmp_path) -> None:
    model = prepared()
    with pytest.raises(qt.ModelError, match="made by names alone; give convert"):
        qt.convert(model)
    artifact = qt.convert(model, IDS)
    assert sum(name.endswith("codes") for name in artifact.tensors) == 2
    artifact.save(tmp_path / "artifact")
    assert torch.equal(qt.Artifact.load(tmp_path / "artifact")(IDS), model.eval()(IDS))


def test_a_plan_comes_back_from_text() -> None:
    plan = qt.plan(Tied(), RECIPE.skip("middle"))
    again = qt.Plan.from_compact(plan.recipe, plan.compact())
    kept = [(r.name, r.module, r.kind, r.role, r.scheme, r.shares) for r in plan.quantized]
    assert [(r.name, r.module, r.kind, r.role, r.scheme, r.shares) for r in again.rows] == kept
    assert again.compact() == plan.compact()
    a, b = Tied(), Tied()
    qt.calibrate(qt.prepare(a, plan))
    qt.calibrate(qt.prepare(b, again))
    assert list(a.state_dict()) == list(b.state_dict())
    assert torch.equal(a(IDS), b(IDS))


def test_static_ranges_need_data() -> None:
    model = Tied()
    qt.prepare(model, qt.plan(model, qt.recipe("torch", weight="int8/channel", input="int8")))
    with pytest.raises(qt.ModelError, match=r"middle\.input: its range comes from data"):
        qt.calibrate(model)


@pytest.mark.parametrize("integer", [False, True])
def test_dequantized_weights_are_those_that_were_multiplied(integer: bool) -> None:
    """Without quantized inputs the float model computes the same sums."""
    model = prepared(qt.recipe("torch", weight="int4/group32"))
    expected = model(IDS)
    back = qt.dequantize(qt.integer_model(model) if integer else model)
    assert torch.equal(back(IDS), expected)
    assert type(back.middle) is nn.Linear
    assert type(back.table) is nn.Embedding
    assert back.last.weight is back.table.weight
    assert not qt.quantizers(back)
    assert qt.plan(back, RECIPE).quantized  # a float model again


def test_what_cannot_be_dequantized_is_named() -> None:
    with pytest.raises(qt.ModelError, match="is not quantized"):
        qt.dequantize(Tied())
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    x = torch.randn(4, 8)
    model = qt.ptq(model, "ort:int8", [x])
    with pytest.raises(qt.ModelError, match="0: IntegerLinear has no way back to float"):
        qt.dequantize(qt.integer_model(model))


def test_watching_counts_codes_at_the_ends() -> None:
    """Rows of one number at the end of its range and one within: int8 per tensor, [-127, 127], scale 1."""
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
    recipe = qt.recipe("torch", weight=None).rule("0", input="int8n/tensor sym static minmax")
    model = qt.calibrate(qt.prepare(model, qt.plan(model, recipe)), [torch.tensor([[127.0, 1.0]])])
    with qt.watching(model) as share:
        assert share() is None
        model(torch.tensor([[127.0, 1.0], [-500.0, 2.0]]))
        assert share() == 0.5
    model(torch.tensor([[127.0, 127.0]]))
    assert share() == 0.5
