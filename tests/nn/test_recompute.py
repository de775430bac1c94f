"""What integer layers can compute again is not kept; gradients and everything around stay as they were."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qatana as qt
from qatana.nn import recompute
from tests.support.recompute import saved_bytes


class Gated(nn.Module):
    """down(silu(gate(x)) * up(x)), as Llama has it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 256), nn.Linear(64, 256), nn.Linear(256, 64)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


def prepared(seed: int = 0, target: str = "ort:int8") -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model, x = Gated(), torch.randn(128, 64)
    model = qt.prepare(model, qt.plan(model, qt.recipe(target), x, mode="modules"))
    qt.calibrate(model, [x])
    return model.train(), x


def gradients(model: nn.Module, x: Tensor, call: Any = None) -> list[Tensor]:
    model.zero_grad()
    (model if call is None else call)(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep everything, as without this module."""
    monkeypatch.setattr(recompute, "pays", lambda y, inner: False)


@pytest.mark.parametrize("target", ["ort:int8", "ort:int8-dynamic"])
def test_same_gradients_and_a_third_of_the_memory(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = prepared(target=target)
    lean, found = saved_bytes(model, x), gradients(model, x)
    kept(monkeypatch)
    full, expected = saved_bytes(model, x), gradients(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), "bit for bit"
    # kept before: gate, up, silu(gate) as floats of 128 x 256; now codes alone
    assert full - lean == 3 * 128 * 256 * 4


def test_a_weight_changed_between_the_passes_changes_nothing() -> None:
    """The gradient is that of what the forward pass multiplied: its codes, which are kept."""
    model, x = prepared()
    expected = gradients(model, x)
    model.zero_grad()
    loss = model(x).square().mean()
    with torch.no_grad():
        model.get_parameter("gate.weight").mul_(2)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_bias_changed_in_place_is_noticed() -> None:
    model, x = prepared()
    loss = model(x).square().mean()
    with torch.no_grad():
        model.get_parameter("gate.bias").add_(1)
    with pytest.raises(RuntimeError, match=r"a bias was modified in place"):
        loss.backward()


def test_other_changes_in_place_are_noticed_as_without_it() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x).sin()
            z = y * y
            y.add_(1)
            return z + y

    torch.manual_seed(0)
    model, x = Squared(), torch.randn(8, 64)
    model = qt.prepare(model, qt.plan(model, qt.recipe("ort:int8"), x, mode="modules"))
    qt.calibrate(model, [x])
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: it is at version 1, expected version 0"):
        model(x).sum().backward()


def test_checkpointing_deepcopy_compile_and_a_second_pass() -> None:
    model, x = prepared()
    expected = gradients(model, x)
    x.requires_grad_()
    checkpointed = gradients(model, x, lambda value: checkpoint(model, value, use_reentrant=False))
    x = x.detach()
    others = {
        "checkpointing": checkpointed,
        "deepcopy": gradients(copy.deepcopy(model), x),
        "twice": gradients(model, x),
    }
    for name, found in others.items():
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), name
    compiled = gradients(model, x, torch.compile(model, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


def test_an_error_in_the_forward_pass_leaves_no_hooks() -> None:
    model, x = prepared()
    with pytest.raises(RuntimeError):
        model(x[:, :10])
    autograd: Any = torch._C._autograd  # type: ignore[attr-defined]
    assert autograd._top_saved_tensors_default_hooks(False) is None


def test_outer_hooks_see_what_is_kept() -> None:
    model, x = prepared()
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        loss = model(x).square().mean()
    assert any(t.dtype == torch.int8 for t in seen)
    loss.backward()


def test_functional_transforms_run() -> None:
    model, x = prepared()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    y = torch.func.functional_call(model, parameters, (x,))
    assert torch.equal(y, model(x))


def test_layers_that_share_an_input_share_its_codes() -> None:
    model, x = prepared()
    names = {row.name: row.shares for row in model.qatana_plan.rows}  # type: ignore[union-attr]
    assert names["up.input"] == "gate.input"
    h = x + 0
    first: Any = model.get_submodule("gate")
    second: Any = model.get_submodule("up")
    assert first.input_quantizer.encode(h).codes is second.input_quantizer.encode(h).codes
    h.mul_(2)
    changed = second.input_quantizer.encode(h)
    assert torch.equal(changed.codes, first.input_quantizer.encode(h.clone()).codes)
    assert not torch.equal(changed.codes, first.input_quantizer.encode(x).codes)
