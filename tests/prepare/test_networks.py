"""plan and prepare on convolutional networks in every style: nothing is lost, nothing is changed until quantizers are on."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from support.networks import CASES, images, network
from torch import Tensor, nn

import qatana as qt
from qatana.nn.conv import Conv
from qatana.nn.elementwise import Add, GlobalAveragePool
from qatana.nn.linear import Linear

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def prepared(case: str) -> tuple[nn.Module, nn.Module]:
    """(float model, prepared twin with the same weights)."""
    plan = qt.plan(model := network(case), "ort:int8", images(case, 2))
    return network(case), qt.prepare(model, plan)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_lists_every_tensor(case: str) -> None:
    model = network(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = qt.plan(model, "ort:int8", images(case, 2))
    roles = {row.name: row for row in plan.rows}
    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            assert {f"{name}.weight", f"{name}.input"} <= set(roles)
            assert roles[f"{name}.weight"].elements == module.weight.numel()
        if isinstance(module, NORMS) and module.affine:
            assert name in plan.folds.values() or f"{name}.weight" in roles
    adds = [row for row in plan.rows if row.type == "Add"]
    assert len(adds) == 3 * {
        "functional": 2,
        "bottleneck": 3,
        "mixed": 2,
        "1d": 1,
        "control-flow": 1,
        "pre-activation": 2,
    }.get(case, 2)
    assert sum(row.name.endswith(".output") and "Pool" in row.type for row in plan.rows) == 1
    assert all(row.scheme is not None for row in plan.rows if "bn" not in row.name)
    assert all(roles[row.shares].scheme == row.scheme for row in plan.rows if row.shares)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training


@pytest.mark.parametrize("case", CASES)
def test_prepared_and_off_is_the_float_model(case: str) -> None:
    float_model, model = prepared(case)
    x = images(case, 5, seed=3)
    with torch.no_grad():
        # folding multiplies weights before the sum instead of after it: float32 roundings
        torch.testing.assert_close(model(x), float_model(x), rtol=1e-5, atol=1e-5)
    training = images(case, 6, seed=4)
    # the batch's own statistics amplify roundings where a channel hardly varies
    torch.testing.assert_close(model.train()(training), float_model.train()(training), rtol=1e-4, atol=1e-4)
    for name, value in float_model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_parameters_keep_names_and_storage(case: str) -> None:
    model = network(case)
    parameters, keys = dict(model.named_parameters()), set(model.state_dict())
    ready = qt.prepare(model, qt.plan(model, "ort:int8", images(case, 2)))
    assert {name: id(p) for name, p in ready.named_parameters()} == {name: id(p) for name, p in parameters.items()}
    assert {key for key in ready.state_dict() if "_quantizer" not in key} == keys
    assert ready.load_state_dict(network(case).state_dict(), strict=False).unexpected_keys == []


@pytest.mark.parametrize("case", CASES)
def test_every_layer_found_its_integer_form(case: str) -> None:
    _, model = prepared(case)
    kinds = {type(module) for module in model.modules()}
    assert not kinds & set(LAYERS)
    assert {Conv, Add, GlobalAveragePool, Linear} <= kinds


@pytest.mark.parametrize("case", CASES)
def test_training_reaches_every_parameter_and_moves_statistics(case: str) -> None:
    _, model = prepared(case)
    qt.calibrate(model, [images(case, 8, seed=5)])
    running = {k: v.clone() for k, v in model.state_dict().items() if "running" in k}
    model.train()
    model(images(case, 8, seed=6)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(torch.isfinite(parameter.grad).all()), name
        assert float(parameter.grad.abs().sum()) > 0 or "bias" in name, name  # a bias before a norm has no gradient
    assert all(not torch.equal(v, model.state_dict()[k]) for k, v in running.items())


def test_training_learns_like_the_float_model() -> None:
    """The same steps from the same weights: quantization noise may cost a little of the loss, not the descent."""
    float_model, model = prepared("functional")
    x, target = images("functional", 16, seed=6), torch.randint(0, 5, (16,))
    qt.calibrate(model, [x])

    def descend(network: nn.Module) -> tuple[float, float]:
        optimizer = torch.optim.SGD(network.train().parameters(), lr=0.05)
        losses = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    (first, last), (_, float_last) = descend(model), descend(float_model)
    assert float_last < 0.9 * first
    assert first - last > 0.9 * (first - float_last)


def test_copies_and_files_of_a_prepared_model() -> None:
    _, model = prepared("functional")
    x = images("functional", 4)
    qt.calibrate(model, [x])
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert set(twin.state_dict()) == set(model.state_dict())
        assert not {id(p) for p in twin.parameters()} & {id(p) for p in model.parameters()}
        assert torch.equal(qt.convert(twin)(x), expected)
        twin.train()(x)  # its statistics are its own
        assert torch.equal(model(x), expected)


def test_state_travels_to_a_fresh_prepared_model() -> None:
    _, model = prepared("functional")
    x = images("functional", 4)
    qt.calibrate(model, [x])
    other = network("functional", seed=77)
    fresh = qt.prepare(other, qt.plan(other, "ort:int8", x))
    fresh.load_state_dict(model.state_dict())
    for quantizer in qt.quantizers(fresh).values():
        quantizer.enabled = True
    assert torch.equal(fresh(x), model(x))


class Dropping(nn.Module):
    """Dropout as a function, with the module's own switch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.conv(x)), 0.5, self.training)
        return self.head(x.mean([2, 3]))


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode_after_prepare(training: bool) -> None:
    model, x = Dropping().train(training), torch.randn(4, 3, 8, 8)
    ready = qt.prepare(model, qt.plan(model, "ort:int8", x))
    assert ready.training == training
    ready.eval()
    assert torch.equal(ready(x), ready(x))
    ready.train()
    assert not torch.equal(ready(x), ready(x))


def test_a_norm_without_running_statistics_stays_float() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()  # fmt: skip
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    ready = qt.prepare(model, plan := qt.plan(model, "ort:int8", x))
    assert plan.folds == {}
    # the same operators in the same order: a rounding or two of the convolution's kernel choice
    torch.testing.assert_close(ready(x), expected, rtol=1e-5, atol=1e-5)
    qt.calibrate(ready, [x])
    assert bool(torch.isfinite(ready(x)).all())


def test_capture_by_export_takes_a_batch_of_one() -> None:
    model = network("control-flow")
    ready = qt.prepare(model, qt.plan(model, "ort:int8", images("control-flow", 1)))
    x = images("control-flow", 3)
    # as above
    torch.testing.assert_close(ready(x), network("control-flow")(x), rtol=1e-5, atol=1e-5)


def test_modules_that_the_forward_does_not_call_keep_their_state() -> None:
    model = network("functional")
    model.auxiliary = nn.Linear(3, 3)
    keys = set(model.state_dict())
    ready = qt.prepare(model, qt.plan(model, "ort:int8", images("functional", 2)))
    assert keys <= set(ready.state_dict())


def test_example_inputs_may_carry_labels() -> None:
    model, x = network("functional"), images("functional", 4)
    ready = qt.prepare(model, qt.plan(model, "ort:int8", (x, torch.tensor([0, 1, 2, 3]))))
    qt.calibrate(ready, [(x, torch.tensor([0, 1, 2, 3]))])
    assert torch.equal(qt.convert(ready)(x), ready(x))


def test_a_layer_called_twice_stays_float_and_says_so() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(F.relu(self.conv(x))).mean([2, 3]))

    plan = qt.plan(Twice(), "ort:int8", torch.randn(2, 3, 6, 6))
    row = plan.row("conv.weight")
    assert row is not None
    assert (row.scheme, row.reason) == (None, "called more than once")


def test_skip_leaves_layers_float_and_the_rest_consistent() -> None:
    model, x = network("functional"), images("functional", 6)
    plan = qt.plan(model, qt.recipe("ort:int8").skip("block1.conv2", "linear", "conv"), x)
    # "conv" names the stem and every module called conv? No: a bare name is a whole name or the last part of one
    floats = {row.module for row in plan.rows if row.scheme is None}
    assert floats == {"conv", "block1.conv2", "linear"}
    ready = qt.calibrate(qt.prepare(model, plan), [x])
    ready.eval()
    assert torch.equal(qt.convert(ready)(x), ready(x))
    assert isinstance(ready.get_submodule("conv"), nn.Conv2d)
