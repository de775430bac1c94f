"""A few of the architectures of `python -m benchmarks.architectures`, one of each kind of layer; the command runs all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "wavlm", "convnext", "vilt", "detr"])
def test_an_architecture_passes(model_type: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv1D; experts and sinks; weight normalization and weights that a parent reads; convolutions by name; patches in random
    order; a backbone without attention."""
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.architecture import run
    from benchmarks.zoo import ARCHITECTURES

    (architecture,) = (a for a in ARCHITECTURES if a.model_type == model_type)
    outcome = run(model_type, architecture.family, architecture.make)
    assert outcome.passed, outcome
    assert bool(outcome.no_graph) == (model_type == "vilt")  # its forward depends on the values of the pixel mask


def test_an_output_that_vanished_is_a_failure(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros equal zeros: such a row would pass whatever the layers compute."""
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.architecture import run

    def make() -> tuple[nn.Module, dict[str, Any]]:
        layer = nn.Linear(4, 4)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return nn.Sequential(layer), {"input": torch.randn(2, 4)}

    outcome = run("zeros", "none", make)
    assert not outcome.passed
    assert outcome.error == "float: the largest output is 0e+00: nothing is left to compare"


def test_every_family_has_several_and_no_name_twice(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.zoo import ARCHITECTURES

    names = [a.model_type for a in ARCHITECTURES]
    families = {a.family: sum(b.family == a.family for b in ARCHITECTURES) for a in ARCHITECTURES}
    assert len(names) == len(set(names)) >= 40
    assert set(families) == {
        "encoder",
        "decoder",
        "mixture of experts",
        "encoder-decoder",
        "vision",
        "audio",
        "multimodal",
    }
    assert min(families.values()) >= 4
