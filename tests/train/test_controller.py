"""What the Controller switches on and off, and when."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from qatana.errors import ModelError
from qatana.nn.conv import Conv
from qatana.quantizer import quantizers
from qatana.train import Controller, TrainingError


def run(model: nn.Module, images, controller: Controller, steps: int) -> None:
    model.train()
    for i in range(steps):
        model(images[i % len(images)][0])
        controller.step()


def switches(model: nn.Module) -> tuple[set[bool], set[bool]]:
    found = quantizers(model).values()
    return {q.enabled for q in found}, {q.observing for q in found if q.range is not None}


def test_a_calibrated_model_starts_quantized_with_its_own_scales(cnn) -> None:
    model = cnn()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    controller = Controller(model, 10)
    assert controller.phase == "quantized"
    assert switches(model) == ({True}, {False})
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_phases_follow_the_schedule(cnn, images) -> None:
    model = cnn(calibrated=False)
    controller = Controller(model, 100, float_steps=40, freeze_ranges_at=0.6, freeze_batch_norm_at=0.7)
    seen = {}
    model.train()
    for i in range(100):
        seen.setdefault(controller.phase, i)
        model(images[i % 5][0])
        controller.step()
    # Ranges are observed over the last 32 float steps: from 40 - 32 on.
    assert seen == {
        "float": 0,
        "float, ranges observed": 8,
        "quantized, ranges followed": 40,
        "quantized": 60,
        "quantized, batch norm frozen": 70,
    }


def test_float_warmup_really_is_float(cnn, images) -> None:
    model = cnn()
    controller = Controller(model, 10, float_steps=3)
    assert switches(model) == ({False}, {True})
    run(model, images, controller, 3)
    assert switches(model) == ({True}, {False})


def test_an_evaluation_between_steps_moves_no_range(cnn, images) -> None:
    model = cnn()
    controller = Controller(model, 100, freeze_ranges_at=0.5)
    run(model, images, controller, 3)
    assert controller.phase == "quantized, ranges followed"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    with torch.no_grad():
        model(10 * images[0][0])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.train()
    model(10 * images[0][0])
    after = model.state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before if ".range." in k)


def test_scales_after_warmup_are_those_of_calibration_on_the_same_batches(two_bits, vectors) -> None:
    """Weights that did not move get the scales that calibrate gives them, though none was calibrated before."""
    expected, model = two_bits(), two_bits(calibrated=False)
    run(model, vectors, Controller(model, 10, float_steps=2), 2)
    for name, quantizer in quantizers(expected).items():
        assert torch.equal(quantizers(model)[name].scale, quantizer.scale), name
        assert bool(quantizers(model)[name].calibrated)


def test_followed_ranges_move_until_frozen(cnn, images) -> None:
    model = cnn()
    controller = Controller(model, 40, freeze_ranges_at=20, freeze_batch_norm_at=None)
    scale = lambda: {n: float(q.scale) for n, q in quantizers(model).items() if q.range is not None}  # noqa: E731
    wide = [(3 * x, y) for x, y in images]
    start = scale()
    run(model, wide, controller, 20)
    frozen = scale()
    name = next(iter(start))  # the image's own quantizer: three times the range, so in the end thrice the scale
    assert frozen[name] > 1.5 * start[name]
    run(model, images, controller, 10)
    assert scale() == frozen


def test_histogram_forgets_by_the_momentum(cnn, images) -> None:
    """After n batches of as many elements, calibration's share of the histogram is (1 - m)^n: n = 8, m = 0.05."""
    model = cnn()
    range_ = next(q.range for q in quantizers(model).values() if q.range is not None)  # of the image: seen once a batch
    one_batch = images[0][0].numel()
    assert float(range_.histogram.sum()) == one_batch * len(images)
    run(model, images, Controller(model, 100, freeze_ranges_at=50), 8)
    expected = one_batch * (len(images) * 0.95**8 + sum(0.95**k for k in range(1, 9)))
    assert float(range_.histogram.sum()) == pytest.approx(expected, rel=1e-9)  # float64 sums


def test_frozen_batch_norm_survives_model_train(cnn, images) -> None:
    model = cnn()
    controller = Controller(model, 10, freeze_batch_norm_at=2)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    stats = lambda: [n.running_mean.clone() for n in norms if n.running_mean is not None]  # noqa: E731
    start = stats()
    run(model, images, controller, 2)
    moved = stats()
    assert not any(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    run(model, images, controller, 5)  # calls model.train() first
    assert all(torch.equal(a, b) for a, b in zip(moved, stats(), strict=True))
    assert all(m.freeze_batch_norm for m in model.modules() if isinstance(m, Conv))


def test_a_norm_that_no_convolution_folds_is_frozen_too() -> None:
    import qatana as qt

    model = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    x = torch.randn(16, 32)
    model = qt.calibrate(qt.prepare(model, qt.plan(model, "ort:int8-dynamic", x)), [x])
    controller = Controller(model, 4, freeze_batch_norm_at=1)
    norm = model[1]
    model.train()
    model(x)
    mean = norm.running_mean.clone()
    controller.step()
    model.train()
    model(x * 5)
    assert torch.equal(norm.running_mean, mean)
    assert not norm.training
    controller.load_state_dict(controller.state_dict() | {"step": 0})  # thawed when it goes back
    model.train()
    model(x)
    assert norm.training


def test_a_frozen_model_still_copies_and_pickles(cnn, images) -> None:
    model = cnn()
    Controller(model, 10, freeze_batch_norm_at=0)
    copied = copy.deepcopy(model).eval()
    assert torch.equal(copied(images[0][0]), model.eval()(images[0][0]))
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert pickle.loads(pickle.dumps(norm)).eps == norm.eps  # noqa: S301


def test_state_resumes_exactly(cnn, images) -> None:
    kwargs = {"float_steps": 4, "freeze_ranges_at": 30, "freeze_batch_norm_at": 12}
    whole, first = cnn(calibrated=False), cnn(calibrated=False)
    run(whole, images, Controller(whole, 40, **kwargs), 25)
    controller = Controller(first, 40, **kwargs)
    run(first, images, controller, 10)
    saved = json.loads(json.dumps(controller.state_dict()))
    second = cnn(calibrated=False)
    resumed = Controller(second, 40, **kwargs)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(saved)
    second.train()
    for i in range(10, 25):
        second(images[i % 5][0])
        resumed.step()
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.phase == "quantized, ranges followed, batch norm frozen"


def test_state_of_another_schedule_is_refused(cnn) -> None:
    state = Controller(cnn(), 10).state_dict()
    with pytest.raises(TrainingError, match="total_steps=10, this one 12"):
        Controller(cnn(), 12).load_state_dict(state)
    with pytest.raises(TrainingError, match="step=-1"):
        Controller(cnn(), 10).load_state_dict(state | {"step": -1})
    with pytest.raises(TrainingError, match="total_steps=None"):
        Controller(cnn(), 10).load_state_dict({"step": 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"total_steps": 0}, "total_steps=0"),
        ({"total_steps": 2.5}, "total_steps=2.5"),
        ({"total_steps": True}, "total_steps=True"),
        ({"float_steps": -1}, "float_steps=-1 must lie between"),
        ({"float_steps": 10}, "leaves no quantized step"),
        ({"float_steps": 1.0}, "leaves no quantized step"),
        ({"float_steps": 1.5}, "a share of the 10 steps"),
        ({"float_steps": float("nan")}, "float_steps=nan"),
        ({"float_steps": "half"}, "float_steps='half'"),
        ({"freeze_ranges_at": 11}, "freeze_ranges_at=11 must lie between 0 and total_steps=10"),
        ({"freeze_batch_norm_at": True}, "freeze_batch_norm_at=True"),
        ({"freeze_batch_norm_at": -0.1}, "freeze_batch_norm_at=-0.1"),
    ],
)
def test_nonsense_is_refused_by_name(cnn, kwargs, message) -> None:
    with pytest.raises(TrainingError, match=message):
        Controller(cnn(), **{"total_steps": 10, **kwargs})


def test_models_that_cannot_train_quantized(cnn) -> None:
    with pytest.raises(ModelError, match="no quantizers"):
        Controller(nn.Linear(2, 2), 10)
    with pytest.raises(ModelError, match="not calibrated"):
        Controller(cnn(calibrated=False), 10)
