"""Linear layers whose inputs have a scale per token: integers in training, the same integers when converted, one graph when compiled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qatana as qt
from qatana.nn.linear import Linear
from qatana.nn.stored import StoredLinear

WEIGHTS = ["int8/channel", "int4/group64", "int4/group64 sym learned"]


def prepared(weight: str, x: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 24)).to(dtype)
    recipe = qt.Recipe.from_dict({"target": "torch", "rules": [{"schemes": {"weight": weight, "input": "int8/token"}}]})
    model = qt.prepare(model, qt.plan(model, recipe, x))
    qt.calibrate(model, [x])
    return model


def multiplies_codes(model: nn.Module) -> list[bool]:
    return [m.by_rows for m in model.modules() if isinstance(m, Linear | StoredLinear)]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_the_integer_model_multiplies_the_same_codes(weight: str) -> None:
    x = torch.randn(3, 5, 128)
    model = prepared(weight, x)
    integers = qt.integer_model(model)
    assert multiplies_codes(model) == multiplies_codes(integers) == [True, True]
    assert torch.equal(integers(x), model(x))
    assert torch.equal(integers(x[:1, :1]), model(x[:1, :1]))  # one token, as in generation


@pytest.mark.parametrize("weight", WEIGHTS)
def test_one_graph(weight: str) -> None:
    x = torch.randn(3, 5, 128)
    model = prepared(weight, x)
    results: list[list[Tensor]] = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y, list(model.parameters()), torch.ones_like(y))])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


def test_other_dtypes_and_small_groups_multiply_floats() -> None:
    x = torch.randn(3, 5, 128)
    assert multiplies_codes(prepared("int8/channel", x.bfloat16(), torch.bfloat16)) == [False, False]
    small = prepared("int4/group32", x)
    assert multiplies_codes(small) == multiplies_codes(qt.integer_model(small)) == [False, False]


def test_codes_are_what_is_kept() -> None:
    """Between the passes live the codes of input and weight, 1 byte each, scales, and a bit for each weight that may be clipped."""
    x = torch.randn(64, 128, requires_grad=True)
    model = prepared("int4/group64", x.detach())
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model[0](x)  # type: ignore[index]
    scales = 64 * 4 + 64 * 2 * 4  # of 64 rows, and of 64 x 2 blocks
    zero_points, bits = 64 * 4, 64 * 128 // 8
    assert sum(kept.values()) == 2 * 64 * 128 + scales + zero_points + bits
