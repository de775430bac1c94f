"""A few of the architectures of `python -m benchmarks.architectures`, one of each kind of layer; the command runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss", "wavlm", "convnext"])
def test_an_architecture_passes(model_type: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conv1D; experts and sinks; weight normalization and weights that a parent reads; convolutions by name."""
    monkeypatch.syspath_prepend(str(repository))
    from benchmarks.architecture import run
    from benchmarks.zoo import ARCHITECTURES

    (architecture,) = (a for a in ARCHITECTURES if a.model_type == model_type)
    outcome = run(model_type, architecture.family, architecture.make)
    assert outcome.passed, outcome
    assert not outcome.no_graph


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
