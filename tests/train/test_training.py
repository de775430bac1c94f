"""Training: validation, schedule, presets."""

from __future__ import annotations

import json

import pytest

from qatana.errors import DataError, RecipeError
from qatana.train import Training, preset


def test_cosine_with_warmup_in_closed_form() -> None:
    t = Training(steps=110, lr=1.0, warmup=10, schedule="cosine", final_lr=0.2)
    assert [t.rate(s, 110) for s in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert t.rate(10, 110) == 1.0
    # cos at 0, 60, 90, 120 degrees: rate = 0.2 + 0.8 (1 + cos) / 2; cos is rounded in float64
    for step, expected in ((10 + 100 / 3, 0.8), (60, 0.6), (10 + 200 / 3, 0.4), (110, 0.2)):
        assert t.rate(step, 110) == pytest.approx(expected, rel=1e-12)  # type: ignore[arg-type]


def test_linear_constant_and_shares() -> None:
    linear = Training(steps=100, lr=1.0, warmup=0.2, schedule="linear")
    assert (linear.rate(19, 100), linear.rate(20, 100), linear.rate(60, 100)) == (1.0, 1.0, 0.5)
    constant = Training(steps=100, lr=1.0, warmup=0, schedule="constant")
    assert {constant.rate(s, 100) for s in (0, 50, 99)} == {1.0}


def test_one_is_a_step_and_one_point_zero_is_all_of_them() -> None:
    assert isinstance(Training(steps=3, lr=1.0, warmup=1).warmup, int)
    assert isinstance(Training(steps=3, lr=1.0, warmup=1.0).warmup, float)


def test_json_both_ways() -> None:
    t = preset("sgd", float_lr=0.1, lr_factors={"head*": 3.0}, frozen=("table.*",), scale_lr=1e-4)
    assert Training(**json.loads(t.model_dump_json())) == t


def test_total_steps() -> None:
    assert Training(steps=7, lr=1.0).total_steps(iter(())) == 7
    assert Training(epochs=1.5, lr=1.0).total_steps([0] * 5) == 8
    with pytest.raises(DataError, match="no length"):
        Training(epochs=1.0, lr=1.0).total_steps(iter(()))
    with pytest.raises(DataError, match="empty"):
        Training(epochs=1.0, lr=1.0).total_steps([])


def test_presets_are_those_of_the_literature() -> None:
    sgd = preset("image-classification", float_lr=0.2, float_steps_done=5000)
    assert (sgd.optimizer, sgd.lr, sgd.steps, sgd.momentum, sgd.schedule) == ("sgd", 0.002, 500, 0.9, "cosine")
    adamw = preset("transformer", float_lr=3e-4, float_steps_done=880)
    assert (adamw.optimizer, adamw.steps, adamw.warmup) == ("adamw", 88, 0.1)
    assert adamw.lr == pytest.approx(3e-5, rel=1e-12)
    assert preset("adamw", steps=5).steps == 5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stepz": 1}, "unknown key 'stepz' in a training; did you mean 'steps'"),
        ({"lr": -1}, "training.lr=-1: input should be greater than 0"),
        ({"lr": float("nan")}, "training.lr=nan"),
        ({"optimizer": "adam"}, "training.optimizer='adam': input should be 'adamw' or 'sgd'"),
        ({"warmup": 1.5}, "training.warmup=1.5: must be a number of steps"),
        ({"float_steps": -3}, "training.float_steps=-3: must be a number of steps"),
        ({"distillation": 2}, "training.distillation=2"),
        ({"steps": 1, "epochs": 1}, "exactly one of steps and epochs"),
        ({"steps": 0}, "training.steps=0"),
    ],
)
def test_bad_fields_are_named(fields, message) -> None:
    with pytest.raises(RecipeError, match=message) as raised:
        preset("adamw", **fields)
    assert "\n" not in str(raised.value)


def test_unknown_preset() -> None:
    with pytest.raises(RecipeError, match="did you mean 'adamw'"):
        preset("adamv")
