"""The graph of an artifact is traced once more, not twice, and still becomes what it was."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from support.files import outputs
from support.flows import bert, cnn
from torch import Tensor, nn

import qatana as qt
from qatana.export import onnx_model

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each graph that torch decomposes meanwhile."""
    program, done = torch.export.ExportedProgram, []
    before = program.run_decompositions

    def run(self, *args, **kwargs):
        done.append(1)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(program, "run_decompositions", run)
    return done


def canonical(model: onnx.ModelProto) -> list[tuple]:
    """Nodes with values named in order of appearance and constants by content: two files are equal if these are."""
    names: dict[str, str] = {}
    constants = {
        t.name: (t.data_type, *t.dims, onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer
    }

    def name(value: str) -> object:
        return constants.get(value) or names.setdefault(value, f"value {len(names)}")

    return [
        (
            *(node.domain, node.op_type, sorted(a.SerializeToString() for a in node.attribute)),
            *map(name, (*node.input, "->", *node.output)),
        )
        for node in model.graph.node
    ]


@pytest.mark.parametrize("kind", ["functional", "mixed", "ort:int8", "ort:int8-dynamic", "ort:int4"])
def test_a_graph_is_not_decomposed_and_its_file_is_the_same(
    kind: str, decompositions: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = (bert if ":" in kind else cnn)(kind).artifact
    decompositions.clear()
    quick = onnx_model(artifact)
    assert not decompositions
    monkeypatch.setattr(import_module("qatana.export.program"), "_is_mutable", lambda target: True)
    slow = onnx_model(artifact)
    assert decompositions
    assert canonical(quick) == canonical(slow)
    for part in ("input", "output"):
        assert [x.SerializeToString() for x in getattr(quick.graph, part)] == [
            x.SerializeToString() for x in getattr(slow.graph, part)
        ]
    assert quick.metadata_props[0].value == slow.metadata_props[0].value


class Behind(nn.Module):
    """A linear layer, then a function that stays float."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    "function", [lambda x: F.rms_norm(x, (8,)), lambda x: F.threshold(x, 0.1, 20.0)], ids=["rms_norm", "threshold"]
)
def test_an_operator_without_onnx_form_is_decomposed(
    function: Callable[[Tensor], Tensor], decompositions: list[int], tmp_path: Path
) -> None:
    """torch 2.13 has no translation of these two, but one of what they consist of."""
    example = torch.randn(4, 8)
    model = Behind(function)
    model = qt.prepare(model, qt.plan(model, "ort:int8", example))
    qt.calibrate(model, [example])
    artifact = qt.convert(model)
    decompositions.clear()
    path = qt.export(artifact, tmp_path / "model.onnx")
    assert decompositions
    with torch.no_grad():
        expected = model(example).numpy()
    # the function in float32 in two programs: a few roundings of a value of size 1
    np.testing.assert_allclose(outputs(path, {"input": example.numpy()}), expected, atol=1e-6)
