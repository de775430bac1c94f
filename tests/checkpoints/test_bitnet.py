"""Hugging Face BitNet: the weights that a transformers model computes with, from folders that transformers loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama import assert_same, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations import bitnet

import qatana as qt
from qatana.errors import ArtifactError
from qatana.numerics import storage

UP = "model.layers.0.mlp.up_proj."


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """transformers compiles these functions; uncompiled they are the same arithmetic, without a minute of compiling."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


def write(folder: Path, linear_class: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Tensor, Tensor]]:
    """A folder as microsoft/bitnet-b1.58-2B-4T is one, from random weights: codes and scale by weight name."""
    model = tiny_llama()
    model.save_pretrained(folder)
    tensors, known = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().mean().to(dtype).float()
        codes = (tensors[name] / scale).round().clamp(-1, 1).to(torch.int8)
        parts = storage.pack_bitnet(codes, scale, linear_class, dtype)
        # transformers' own packing; what is stored is its bytes.
        assert torch.equal(parts["weight"], bitnet.pack_weights(codes.clone()))
        tensors |= {name.removesuffix("weight") + key: tensor for key, tensor in parts.items()}
        known[name] = codes, scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": linear_class,
        "quantization_mode": "offline",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return known


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_multiply(tmp_path: Path, dtype: torch.dtype) -> None:
    known = write(tmp_path, "autobitlinear", dtype)
    checkpoint = qt.read_checkpoint(tmp_path)
    assert checkpoint.writer == "bitnet"
    assert set(checkpoint.schemes.values()) == {"int2n/tensor sym dynamic rule=absmean"}
    assert set(checkpoint.weights) == set(known)
    for name, (codes, scale) in known.items():
        assert torch.equal(checkpoint.weights[name].values(), codes * scale)
        assert checkpoint.weights[name].dtype == dtype
    tiny_llama().load_state_dict(checkpoint.state_dict(torch.float32))


def test_the_model_that_transformers_loads(tmp_path: Path) -> None:
    """A layer of it on the identity gives the weight: y = (x W^T) * weight_scale; and what it saves reads the same."""
    write(tmp_path / "packed", "autobitlinear")
    checkpoint = qt.read_checkpoint(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, bitnet.AutoBitLinear)
    assert torch.equal(layer.weight * layer.weight_scale, checkpoint.weights[UP + "weight"].values())
    model.save_pretrained(tmp_path / "unpacked", save_original_format=False)  # transformers 5.23 has no way back
    assert load_file(tmp_path / "unpacked" / "model.safetensors")[UP + "weight"].dtype == torch.float32
    assert_same(qt.read_checkpoint(tmp_path / "unpacked").state_dict(), checkpoint.state_dict())


def test_scales_that_divide(tmp_path: Path) -> None:
    """weight_scale is 1 / scale there. One identity row at a time, a power of two: the layer's 8-bit input is exact."""
    known = write(tmp_path, "bitlinear")
    checkpoint = qt.read_checkpoint(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    for name, (codes, _) in known.items():
        stored = file[name + "_scale"]
        assert torch.equal(checkpoint.weights[name].values(), codes * stored.reciprocal())
    parts = {key: file[UP + key] for key in ("weight", "weight_scale")}
    layer = bitnet.BitLinear(256, 384, bias=False, dtype=torch.float32)
    layer.load_state_dict(parts)
    # The layer divides 127 * code by 127 * weight_scale: two roundings where ours are the two of a reciprocal and a product.
    assert torch.allclose(layer(torch.eye(256)).t(), checkpoint.weights[UP + "weight"].values(), rtol=2**-22, atol=0)


def test_online_files_are_float(tmp_path: Path) -> None:
    """quantization_mode "online" keeps the weights that training continues from."""
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    about = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    checkpoint = qt.read_checkpoint(tmp_path)
    assert not checkpoint.weights
    assert_same(checkpoint.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("weight", torch.full((96, 256), 255, dtype=torch.uint8), "a 2-bit field holds 3"),
        ("weight", torch.full((384, 256), 0.5), "holds other numbers than -1, 0 and 1"),
        ("weight", torch.zeros(96, 256, dtype=torch.int32), "this layer was not packed"),
        ("weight_scale", torch.ones(2), "what the file says of it does not fit together"),
    ],
)
def test_damaged_layers(tmp_path: Path, name: str, tensor: Tensor, message: str) -> None:
    write(tmp_path, "autobitlinear")
    save_file(load_file(tmp_path / "model.safetensors") | {UP + name: tensor}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=message) as caught:
        qt.read_checkpoint(tmp_path)
    assert "model.layers.0.mlp.up_proj: " in str(caught.value)


@pytest.mark.parametrize(
    ("about", "message"),
    [(None, "put config.json beside the tensors"), ({"linear_class": "other"}, "unknown BitNet linear_class 'other'")],
)
def test_the_linear_class_must_be_known(tmp_path: Path, about: dict[str, Any] | None, message: str) -> None:
    write(tmp_path, "autobitlinear")
    config = json.loads((tmp_path / "config.json").read_text())
    if about is None:
        del config["quantization_config"]
    else:
        config["quantization_config"] |= about
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        qt.read_checkpoint(tmp_path)
