"""Per-tensor figures against closed forms, and what the report makes of them."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import Tensor, nn

import qatana as qt
from qatana.errors import DataError, ModelError
from qatana.report.data import ReportData
from qatana.report.measure import measure


class Net(nn.Module):
    """Two linear layers behind each other, as modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def _prepared(target: str = "ort:int8") -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """The float model, the PTQ model, and two batches."""
    torch.manual_seed(0)
    batches = [torch.randn(64, 32 if target == "ort:int4" else 16) for _ in range(2)]
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)) if target == "ort:int4" else Net()
    original = copy.deepcopy(model)
    model = qt.prepare(model, qt.plan(model, target, batches[0], mode="modules"))
    return original, qt.calibrate(model, batches), batches


def _layers(found: dict[str, list[dict]]) -> dict[str, dict]:
    return {row["name"]: row for row in found["layers"]}


def test_figures_of_a_known_grid() -> None:
    """Input k / 2 for k = -8 .. 7 on a grid of step 1 from -4 to 3: what rounds, clips and is zero is counted by hand."""
    original, model, _ = _prepared()
    quantizer = qt.quantizers(model)["a.input"]
    quantizer.scale.fill_(1.0)
    quantizer.zero_point.fill_(4.0)
    quantizer.scheme = quantizer.scheme.with_(format=qt.scheme("uint3").format)
    x = (torch.arange(16) - 8) / 2
    row = _layers(measure(original, model, None, [x.repeat(4, 1)]))["a.input"]
    x_hat = [max(-4, min(3, round(float(v)))) for v in x]  # Python rounds half to even, as the equation does
    signal = sum(float(v) ** 2 for v in x)
    noise = sum((float(v) - h) ** 2 for v, h in zip(x, x_hat, strict=True))
    assert row["sqnr_ptq"] == pytest.approx(10 * math.log10(signal / noise), abs=1e-9)  # float64 sums of the same terms
    assert row["saturation"] == 1 / 16  # 3.5 alone: it rounds to 4
    assert row["zeros"] == 3 / 16  # -0.5, 0, 0.5
    assert row["sqnr_qat"] is None
    assert row["bits"] == 3


def test_a_weight_on_its_grid_is_exact_and_gaussian_noise_follows_the_step() -> None:
    original, model, batches = _prepared()
    layer = model.get_submodule("a")
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-63, 64, layer.weight.shape))
        layer.weight[:, 0] = 63  # the scale of each channel is then 1
    rows = _layers(measure(original, model, None, batches))
    assert rows["a.weight"]["sqnr_ptq"] == "Infinity"
    assert rows["a.weight"]["saturation"] == 0
    # A uniform quantizer of step s adds noise of power s^2 / 12 to what lies well inside its range.
    x, scale = torch.cat(batches), float(qt.quantizers(model)["a.input"].scale)
    expected = 10 * math.log10(float(x.square().mean()) / (scale**2 / 12))
    assert rows["a.input"]["sqnr_ptq"] == pytest.approx(
        expected, abs=0.5
    )  # clipping by the MSE range costs some tenths


def test_ptq_and_qat_stand_side_by_side() -> None:
    original, model, batches = _prepared()
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.get_submodule("a").weight.mul_(1 + 0.2 * torch.rand(32, 16))
    found = measure(original, model, trained, batches, histograms=["a.weight", "b.input"], variant="int8")
    alone = _layers(measure(original, model, None, batches))
    after = _layers(measure(original, trained, None, batches))
    for name, row in _layers(found).items():
        assert (row["sqnr_ptq"], row["sqnr_qat"]) == (alone[name]["sqnr_ptq"], after[name]["sqnr_ptq"])
    stages = {h["layer"]: [s["stage"] for s in h["stages"]] for h in found["histograms"]}
    assert stages == {"a.weight": ["float", "ptq", "qat"], "b.input": ["ptq", "qat"]}
    weight = next(h for h in found["histograms"] if h["layer"] == "a.weight")
    assert all(sum(s["counts"]) == 32 * 16 for s in weight["stages"])
    assert weight["stages"][0]["counts"] == weight["stages"][1]["counts"]  # calibration left the weights alone
    data = ReportData.model_validate({"title": "x", "created": "2026-01-01T00:00:00Z"} | json.loads(json.dumps(found)))
    assert {row.variant for row in data.layers} == {"int8"}


def test_nothing_is_changed() -> None:
    original, model, batches = _prepared()
    model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    output = model(batches[0])
    measure(original, model, None, iter(batches))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(model(batches[0]), output)
    assert not any({"observe", "activation_levels"} & set(q.__dict__) for q in qt.quantizers(model).values())


def test_ranges_at_run_time_have_no_saturation() -> None:
    original, model, batches = _prepared("ort:int4")
    rows = _layers(measure(original, model, None, batches, histograms=2))
    assert rows["0.input"]["saturation"] is None
    assert rows["0.input"]["sqnr_ptq"] > 35  # 8 bits, a scale per 32 values
    assert 10 < rows["0.weight"]["sqnr_ptq"] < 30  # 4 bits: about 6 dB a bit


def test_what_cannot_be_measured() -> None:
    original, model, batches = _prepared()
    with pytest.raises(DataError, match="measure got no batch"):
        measure(original, model, None, [])
    with pytest.raises(ModelError, match="no quantizers"):
        measure(original, original, None, batches)
    with pytest.raises(ModelError, match=r"no quantizer is called 'c\.weight'"):
        measure(original, model, None, batches, histograms=["c.weight"])
