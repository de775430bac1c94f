"""Folders that transformers wrote of models which bitsandbytes (0.50.2) quantized on the CPU: what both read back from them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama import assert_same, tiny_llama
from support.written import write_bitsandbytes
from torch import Tensor

import qatana as qt
from qatana.errors import ArtifactError
from qatana.numerics import storage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb
    from transformers import GPT2Config, GPT2LMHeadModel

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_four_bits(tmp_path: Path, book: str, double: bool, dtype: torch.dtype) -> None:
    config = {"bnb_4bit_quant_type": book, "bnb_4bit_use_double_quant": double}
    expected = write_bitsandbytes(tmp_path, tiny_llama(), dtype, load_in_4bit=True, **config)
    checkpoint = qt.read_checkpoint(tmp_path / "bits")
    assert checkpoint.writer == "bitsandbytes"
    assert_same(checkpoint.state_dict(), expected)
    assert len(checkpoint.weights) == 7
    assert set(checkpoint.schemes.values()) == {f"{book}/flat64 sym dynamic" + " double" * double}
    float32 = tiny_llama()
    float32.load_state_dict(checkpoint.state_dict(torch.float32))
    assert torch.equal(float32.model.layers[0].mlp.up_proj.weight, checkpoint.weights[UP].values())


def test_other_storage_dtypes(tmp_path: Path) -> None:
    """bnb_4bit_quant_storage, as for sharded training: the same bytes under another dtype."""
    storage_dtype = {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16}
    expected = write_bitsandbytes(tmp_path, tiny_llama(torch.bfloat16), torch.bfloat16, **storage_dtype)
    assert load_file(tmp_path / "bits" / "model.safetensors")[UP].dtype == torch.bfloat16
    assert_same(qt.read_checkpoint(tmp_path / "bits").state_dict(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    write_bitsandbytes(tmp_path, tiny_llama(), dtype, load_in_8bit=True)
    checkpoint = qt.read_checkpoint(tmp_path / "bits")
    file = load_file(tmp_path / "bits" / "model.safetensors")
    assert len(checkpoint.weights) == 7
    for name, stored in checkpoint.weights.items():
        exact = bnb.int8_vectorwise_dequant(file[name], file[name.removesuffix("weight") + "SCB"])
        # The library rounds twice, code * SCB and then times 1 / 127: three half units in the last place between the two.
        assert torch.allclose(stored.values(), exact, rtol=1.5 * 2**-23, atol=0)
        assert torch.equal(stored.codes, file[name])
    assert set(checkpoint.schemes.values()) == {"int8n/channel sym static minmax"}
    assert {str(t.dtype) for t in checkpoint.floats.values()} == {str(dtype)}
    tiny_llama().load_state_dict(checkpoint.state_dict(torch.float32))


@pytest.mark.parametrize("config", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["4", "8"])
def test_gpt2_keeps_its_weights_transposed(tmp_path: Path, config: dict[str, bool]) -> None:
    """transformers quantizes the transpose of a Conv1D's weight; square ones (c_proj) would load either way round."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=128, n_layer=1, n_head=2))
    weight = model.transformer.h[0].attn.c_proj.weight.detach().clone()
    state = model.state_dict()
    expected = write_bitsandbytes(tmp_path, model, torch.float32, **config)
    checkpoint = qt.read_checkpoint(tmp_path / "bits")
    read = checkpoint.state_dict()
    for name, stored in checkpoint.weights.items():
        assert stored.values().shape == stored.shape == state[name].shape
        # dequantize() makes plain Linears of them, so theirs are still the transposes.
        assert torch.allclose(
            read[name], expected[name].t(), rtol=1.5 * 2**-23 if "load_in_8bit" in config else 0, atol=0
        )
    assert len(checkpoint.weights) == 4
    error = (read["transformer.h.0.attn.c_proj.weight"] - weight).abs().max()
    assert error < 0.2 * weight.abs().max()  # half of the widest step of NF4 (0.30 of max|x|)
    missing, unexpected = GPT2LMHeadModel(model.config).load_state_dict(read, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied


def test_a_state_dict_without_config(tmp_path: Path) -> None:
    """Linear4bit's own tensors, rows that no block divides; and 8-bit ones beside them."""
    x = torch.randn(7, 33)
    data, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    tensors = {"a.weight": data} | {f"a.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    codes, absmax, _ = bnb.int8_vectorwise_quant(x)
    tensors |= {f"b.{name}": t for name, t in storage.pack_8bit(codes, absmax).items()} | {"b.bias": torch.ones(7)}
    save_file(tensors, tmp_path / "adapter.safetensors")
    checkpoint = qt.read_checkpoint(tmp_path / "adapter.safetensors")
    assert torch.equal(checkpoint.weights["a.weight"].values(), bnb.dequantize_4bit(data, state))
    assert torch.equal(checkpoint.weights["b.weight"].codes, codes)
    assert set(checkpoint.state_dict()) == {"a.weight", "b.weight", "b.bias"}


def test_what_we_packed_reads_back(tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (32, 128)).to(torch.uint8)
    absmax = torch.rand(64) + 0.5
    tensors = {f"a.{k}": v for k, v in storage.pack_4bit(codes, absmax, "fp4", torch.bfloat16).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = qt.read_checkpoint(tmp_path).weights["a.weight"]
    assert torch.equal(stored.codes.reshape(32, 128), codes)
    assert torch.equal(stored.parameters.scale.flatten(), absmax)
    assert stored.dtype == torch.bfloat16


def packed() -> dict[str, Tensor]:
    data, state = bnb.quantize_4bit(torch.randn(8, 64), quant_type="nf4", compress_statistics=True)
    tensors = {"a.weight": data} | {f"a.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    codes, absmax, _ = bnb.int8_vectorwise_quant(torch.randn(8, 64))
    return tensors | {f"b.{name}": t for name, t in storage.pack_8bit(codes, absmax).items()}


STATE = "a.weight.quant_state.bitsandbytes__nf4"


def as_bytes(**changes: Any) -> Tensor:
    state = json.loads(bytes(packed()[STATE].tolist())) | changes
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("a.weight", None, "a.weight: a Linear4bit has weight"),
        ("a.weight.absmax", None, "a.weight: a Linear4bit has weight"),
        ("a.weight.absmax", torch.zeros(7, dtype=torch.uint8), "7 absmax for 512 elements in blocks of 64"),
        ("a.weight.nested_absmax", torch.zeros(0), "a.weight: what the file says of it does not fit together"),
        ("a.weight.quant_map", torch.zeros(16), "the table of quant_type 'nf4'"),
        (STATE, torch.zeros(9, dtype=torch.uint8), "a.weight: what the file says of it does not fit together"),
        (STATE, as_bytes(dtype="float8"), "dtype 'float8' of the quant_state is not one of"),
        (STATE, as_bytes(nested_blocksize=64), "absmax is quantized in blocks of 64; qatana knows 256"),
        (STATE, as_bytes(shape=[8, 65]), "cannot hold 520 codes of 4 bits"),
        (STATE, as_bytes(shape="x"), "a.weight: what the file says of it does not fit together"),
        ("b.weight", None, "b: a Linear8bitLt has weight and SCB"),
        ("b.weight", torch.zeros(8, 64), "weight is torch.float32"),
        ("b.SCB", torch.ones(7), "with 7 SCB"),
        ("b.weight_format", torch.tensor(1, dtype=torch.uint8), "not row-major"),
    ],
)
def test_damaged_layers(tmp_path: Path, name: str, tensor: Tensor | None, message: str) -> None:
    tensors = packed() | ({} if tensor is None else {name: tensor})
    save_file({k: v for k, v in tensors.items() if tensor is not None or k != name}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=message) as caught:
        qt.read_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
