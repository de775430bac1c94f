"""A quantizer that several layers share is one module with one name: what saves a model sees each tensor once."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.flows import bert_batch, bert_model, cnn
from torch import nn

import qatana as qt
from qatana.quantizer import Quantizer


def prepared(kind: str) -> nn.Module:
    """A calibrated model."""
    if kind == "cnn":
        return copy.deepcopy(cnn("functional").model)
    model = bert_model()
    model = qt.prepare(model, qt.plan(model, "ort:int8", bert_batch()))
    return qt.calibrate(model, [bert_batch(1)])


def uses(model: nn.Module) -> dict[str, list[Quantizer]]:
    """Quantizer's name -> what stands in the slots that refer to it."""
    found: dict[str, list[Quantizer]] = {}
    for layer in model.modules():
        for slot in dir(layer):
            quantizer = getattr(layer, slot) if slot.endswith("_quantizer") else None
            if isinstance(quantizer, Quantizer):
                found.setdefault(quantizer.name, []).append(quantizer)
    return found


@pytest.mark.parametrize("kind", ["cnn", "bert"])
def test_a_state_dict_names_each_tensor_once(kind: str, tmp_path: Path) -> None:
    model = prepared(kind)
    assert max(len(slots) for slots in uses(model).values()) >= 2
    save_file(model.state_dict(), tmp_path / "model.safetensors")  # raises for tensors that share memory
    saved = load_file(tmp_path / "model.safetensors")
    quantizers = qt.quantizers(model)
    assert sum(key.endswith(".calibrated") for key in saved) == len(quantizers)


@pytest.mark.parametrize("kind", ["cnn", "bert"])
def test_sharing_survives_a_copy(kind: str) -> None:
    """The slots of the copy refer to the copy's quantizers, all layers to the same."""
    before = prepared(kind)
    model = copy.deepcopy(before)
    found = qt.quantizers(model)
    assert set(uses(model)) == set(found)
    for name, slots in uses(model).items():
        assert all(slot is found[name] for slot in slots)
        assert found[name] is not qt.quantizers(before)[name]


def test_a_hugging_face_model_saves_itself(tmp_path: Path) -> None:
    """By its own method, with no callback; another prepared model takes what was saved."""
    model = prepared("bert")
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    saved = load_file(tmp_path / "model.safetensors")
    other = bert_model()
    other = qt.prepare(other, qt.plan(other, "ort:int8", bert_batch()))
    other.load_state_dict(saved)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
