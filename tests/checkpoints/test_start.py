"""QAT that starts on the grid of a checkpoint: weights read back as its library reads them, and train from there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.llama import tiny_llama
from support.written import write_bitsandbytes, write_compressed
from torch import nn

import qatana as qt
from qatana.checkpoints.checkpoint import Stored
from qatana.errors import ModelError
from qatana.numerics import quantize_by
from qatana.report.formats import entries

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.quantization import preset_name_to_scheme

UP = "model.layers.0.mlp.up_proj"


def batches() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 96, (2, 8), generator=generator), "use_cache": False} for _ in range(2)]


def starts_and_trains(checkpoint: qt.Checkpoint, model: Any) -> Any:
    """Every weight of the checkpoint reads back as it stands there; one step moves it; the artifact computes the same."""
    before = model.state_dict()
    started = qt.start_from(checkpoint, model, batches())
    for name, stored in checkpoint.weights.items():
        layer = started.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.weight_quantizer(layer.weight), stored.values()), name
    batch = batches()[0]
    started.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(bool(p.grad.any()) for p in started.parameters() if p.grad is not None)
    assert before.keys() <= started.state_dict().keys()
    ids = {"input_ids": batch["input_ids"]}
    assert torch.equal(qt.convert(started)(**ids), started.eval()(**batch).logits)
    return started


@pytest.mark.parametrize("preset", ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "NVFP4A16", "MXFP4A16"])
def test_compressed_tensors(tmp_path: Path, preset: str) -> None:
    write_compressed(tmp_path, preset_name_to_scheme(preset, ["Linear"]), tiny_llama())
    starts_and_trains(qt.read_checkpoint(tmp_path), tiny_llama())


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes(tmp_path: Path, double: bool) -> None:
    config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double}
    write_bitsandbytes(tmp_path, tiny_llama(), torch.float32, **config)
    starts_and_trains(qt.read_checkpoint(tmp_path / "bits"), tiny_llama())


FORMATS = [e.name for e in entries() if not e.name.endswith("/token") and e.name != "uint8/tensor"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str) -> None:
    """As a reader would find it: codes and parameters in the shape of the scheme's stack, and no more than what reads codes back."""
    torch.manual_seed(0)
    model, scheme = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 2)), qt.scheme(name)
    codes, parameters = quantize_by(model[0].weight, scheme)
    stored = Stored(scheme, codes, parameters, (64, 256), torch.float32)
    started = qt.start_from(qt.Checkpoint("gguf", {"0.weight": stored}), model, [torch.randn(4, 256)])
    assert str(started[0].weight_quantizer.scheme.format) == str(scheme.format)
    assert torch.equal(started[0].weight_quantizer(started[0].weight), stored.values())
    started(torch.randn(4, 256)).sum().backward()
    assert bool(started[0].weight.grad.any())


def test_another_recipe_takes_the_scales_that_fit() -> None:
    model, scheme = tiny_llama(), qt.scheme("int4/group128")
    weight = model.get_submodule(UP).weight.detach()
    codes, parameters = quantize_by(weight * 0.5, scheme)
    stored = Stored(scheme, codes, parameters, tuple(weight.shape), torch.float32)
    recipe = qt.recipe("torch", weight="int4/group128 sym learned mse", input="int8/token").skip("lm_head")
    started = qt.start_from(qt.Checkpoint("gguf", {f"{UP}.weight": stored}), model, batches(), recipe=recipe)
    layer = started.get_submodule(UP)
    assert torch.equal(layer.weight_quantizer(layer.weight), stored.values())
    assert layer.weight_quantizer.learned
    assert layer.input_quantizer is not None


def test_a_foreign_model_is_refused() -> None:
    scheme = qt.scheme("int8/channel")
    codes, parameters = quantize_by(torch.randn(4, 4), scheme)
    for name, says in ((f"{UP}.weight", r"model has it in shape \(384, 256\)"), ("layer.weight", "no such parameter")):
        checkpoint = qt.Checkpoint("gguf", {name: Stored(scheme, codes, parameters, (4, 4), torch.float32)})
        with pytest.raises(ModelError, match=says):
            qt.start_from(checkpoint, tiny_llama(), batches())
