"""gptq on whole models: which layers, from which inputs, and that what follows starts from the rounded weights."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatana as qt

RECIPE = qt.recipe("torch", weight="int4/group32 sym learned mse", input="int8/token")


class Net(nn.Module):
    """A table tied to the last layer, and two layers between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 96), nn.Linear(96, 32)
        self.last = nn.Linear(32, 50, bias=False)
        self.last.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.last(self.down(torch.relu(self.up(self.table(ids)))))


def batches() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randint(50, (8, 16)) for _ in range(4)]


def calibrated(recipe: qt.Recipe = RECIPE, model: nn.Module | None = None) -> Any:
    return qt.ptq(model or Net(), recipe, batches())


def test_outputs_come_nearer_to_the_float_models() -> None:
    model, truth = calibrated(), [Net()(x).detach() for x in batches()]

    def error() -> float:
        return sum(float((model(x).detach() - y).square().mean()) for x, y in zip(batches(), truth, strict=True))

    before = error()
    rows = qt.gptq(model, batches())
    assert [row.layer for row in rows] == ["up", "down", "last"]
    assert all(row.after < row.before for row in rows)
    assert error() < before


def test_sweeps_take_more_of_the_error_away() -> None:
    after = [{row.layer: row.after for row in qt.gptq(calibrated(), batches(), sweeps=sweeps)} for sweeps in (0, 3)]
    assert all(after[1][layer] <= after[0][layer] for layer in after[0])
    assert after[1]["down"] < after[0]["down"]
    with pytest.raises(ValueError, match="sweeps -1 is below 0"):
        qt.gptq(calibrated(), batches(), sweeps=-1)


def test_a_table_that_is_the_output_layer_too_stays_near_its_rows() -> None:
    """Tied, the weight is looked up as well: it is damped more and moves less."""
    found, tables = {}, []
    for damping in (0.01, 0.1, 100.0):
        model = calibrated()
        table, plain = model.table.weight, model.table.weight_quantizer(model.table.weight).detach()
        assert model.last.weight is table
        rounded = plain - table.detach()
        qt.gptq(model, batches(), damping=damping)
        assert model.last.weight is model.table.weight
        given = model.table.weight_quantizer(table).detach()
        tables.append(given)
        found[damping] = float((given - plain + rounded).norm() / rounded.norm())
    assert torch.equal(tables[0], tables[1]), "damped by 0.1 at least"
    assert 1 < found[0.01] < 2
    assert found[100.0] == pytest.approx(1, abs=0.02)  # X X^T counts for a hundredth: hardly anything is made up for


def test_weights_with_another_owner_stay() -> None:
    """Two linear layers want different roundings of the weight they share."""
    net = Net()
    net.table.weight = nn.Parameter(net.table.weight.detach().clone())
    net.up = nn.Linear(32, 32)
    net.down.weight = net.up.weight
    assert [row.layer for row in qt.gptq(calibrated(model=net), batches())] == ["last"]


def test_reported_errors_are_those_of_the_layers_outputs() -> None:
    """Plain weights and inputs, so that the layer's own output tells: |(W - W_hat) X|^2 / |W X|^2."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(100, 64)
    model: Any = qt.ptq(copy.deepcopy(net), qt.recipe("torch", weight="int3/group32 sym"), [x])
    y, plain = net(x), model(x)
    [row] = qt.gptq(model, [x])
    sizes = [float(((y - z).square().sum() / y.square().sum()).detach()) for z in (plain, model(x))]
    close = 1e-3  # float32 sums over 100 x 64 products, in another order
    assert [row.before, row.after] == pytest.approx(sizes, rel=close)


def test_weights_stand_where_the_others_want_them() -> None:
    """Rounding gives each its code, most stand off the grid, and none at the edge of its cell."""
    model = calibrated()
    qt.gptq(model, batches())
    for layer in (model.up, model.down):
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        scale, _ = quantizer.weight_parameters(weight)
        away = (quantizer.scheme.granularity.view(weight - quantizer(weight)) / scale).detach().abs()
        assert float(away.max()) < 0.491
        assert (
            0.05 < float(away.median()) < 0.25
        )  # spread evenly over the cells: 0.25; GPTQ leaves more of them near their codes


def test_the_integer_model_has_the_same_codes() -> None:
    model, x = calibrated(), batches()[0]
    qt.gptq(model, batches())
    assert torch.equal(qt.integer_model(copy.deepcopy(model))(x), model(x))


def test_a_transposed_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's layers hold W^T; the result is that of the layer that holds W. Little memory: a pass over the batches for each layer."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain: Any = nn.Sequential(nn.Linear(64, 32))
    swapped: Any = nn.Sequential(Conv1D(32, 64))
    x = torch.randn(50, 64)
    with torch.no_grad():
        swapped[0].weight.copy_(plain[0].weight.t())
        swapped[0].bias.copy_(plain[0].bias)
    monkeypatch.setattr(sys.modules["qatana.gptq"], "MEMORY", 1)
    one, other = (
        qt.ptq(model, qt.recipe("ort:int8").rule(weight="int8n/channel sym mse"), [x]) for model in (plain, swapped)
    )
    for model in (one, other):
        qt.gptq(model, [x])
    assert torch.equal(one[0].weight, other[0].weight.t())  # type: ignore[index]


def test_progress_and_limits() -> None:
    seen: list[tuple[int, int]] = []
    qt.gptq(calibrated(), batches(), batches=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]  # three batches, three layers


def test_a_layer_without_input_stays() -> None:
    class Idle(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return self.last(self.up(self.table(ids))[..., :32])

    model: Any = qt.calibrate(qt.prepare(Idle(), qt.plan(Idle(), RECIPE)))
    before = model.down.weight.detach().clone()
    assert [row.layer for row in qt.gptq(model, batches())] == ["up", "last"]
    assert torch.equal(model.down.weight, before)


def test_weights_that_are_all_zero_lose_nothing() -> None:
    net = Net()
    nn.init.zeros_(net.down.weight)
    assert qt.gptq(calibrated(model=net), batches())[1] == ("down", 0.0, 0.0)


def test_wrong_use() -> None:
    with pytest.raises(qt.DataError, match="no batch"):
        qt.gptq(calibrated(), [])
    with pytest.raises(ValueError, match="damping 0"):
        qt.gptq(calibrated(), batches(), damping=0)
    with pytest.raises(qt.ModelError, match="static or learned scale; the model has none"):
        qt.gptq(Net(), batches())
    with pytest.raises(qt.ModelError, match="the model has none"):
        qt.gptq(calibrated(qt.recipe("torch", weight="nf4/flat64")), batches())
    with pytest.raises(qt.ModelError, match="not calibrated"):
        qt.gptq(qt.prepare(Net(), qt.plan(Net(), RECIPE)), batches())
    linear: Any = qt.ptq(nn.Sequential(nn.Linear(32, 32)), RECIPE, [torch.randn(4, 32)])
    with pytest.raises(qt.DataError, match="NaN"):
        qt.gptq(linear, [torch.full((4, 32), float("nan"))])
