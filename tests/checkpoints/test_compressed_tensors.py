"""Folders that compressed-tensors (0.20) wrote from a Llama: names, codes and values are the library's own, bit for bit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama import assert_same, tiny_llama
from support.written import write_compressed
from torch import Tensor

import qatana as qt
from qatana.errors import ArtifactError
from qatana.numerics import Parameters, fake_quantize_by, storage

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

PRESETS = {
    "W2A16": "int2/group128 sym static minmax",
    "W3A16": "int3/group128 sym static minmax",
    "W4A16": "int4/group128 sym static minmax",
    "W4A16_ASYM": "int4/group128 asym static minmax",
    "W8A16": "int8/group128 sym static minmax",
    "W8A8": "int8/channel sym static minmax",
    "FP8": "e4m3/tensor sym static minmax",
    "FP8_DYNAMIC": "e4m3/channel sym static minmax",
    "NVFP4A16": "e2m1/group16 sym dynamic e4m3:compressed-tensors",
    "NVFP4": "e2m1/group16 sym dynamic e4m3:compressed-tensors",
    "MXFP4A16": "e2m1/group32 sym dynamic e8m0:even",
    "MXFP6A16": "e2m3/group32 sym dynamic e8m0:even",
    "MXFP8A16": "e4m3/group32 sym dynamic e8m0:rceil",
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_presets(tmp_path: Path, preset: str, dtype: torch.dtype) -> None:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    expected = write_compressed(tmp_path, scheme, tiny_llama(dtype))
    checkpoint = qt.read_checkpoint(tmp_path)
    assert checkpoint.writer == "compressed-tensors"
    assert_same(checkpoint.state_dict(), expected)
    assert len(checkpoint.weights) == 7
    stored_scale = " bfloat16" if dtype == torch.bfloat16 and "dynamic" not in PRESETS[preset] else ""
    assert set(checkpoint.schemes.values()) == {PRESETS[preset] + stored_scale}
    for name, tensor in checkpoint.activations.items():
        assert name.rpartition(".")[2].startswith("input_"), tensor
    tiny_llama().load_state_dict(checkpoint.state_dict(torch.float32))


@pytest.mark.parametrize("preset", ["MXFP4A16", "MXFP6A16", "MXFP8A16", "FP8_DYNAMIC", "FP8"])
def test_the_scheme_quantizes_as_the_library_did(tmp_path: Path, preset: str) -> None:
    """Where scales follow from the elements by a rule that both have: the same numbers, from weights of all magnitudes."""
    model = tiny_llama()
    name, layer = "model.layers.0.mlp.up_proj.weight", model.model.layers[0].mlp.up_proj
    weight = torch.randn_like(layer.weight) * torch.logspace(-3, 3, layer.in_features)
    layer.weight.data = weight.clone()
    write_compressed(tmp_path, preset_name_to_scheme(preset, ["Linear"]), model)
    stored = qt.read_checkpoint(tmp_path).weights[name]
    assert torch.equal(fake_quantize_by(weight, stored.scheme.with_(scale="dynamic")), stored.values())


def test_mxfp6_bytes_are_the_library_s(tmp_path: Path) -> None:
    write_compressed(tmp_path, preset_name_to_scheme("MXFP6A16", ["Linear"]), tiny_llama())
    file = load_file(tmp_path / "model.safetensors")
    parts = {name: file[f"model.layers.0.mlp.up_proj.{name}"] for name in ("weight_packed", "weight_scale")}
    assert_same(storage.pack_mxfp6(*storage.unpack_mxfp6(parts)), parts)


def args(**values: Any) -> QuantizationScheme:
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**values))


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        (args(num_bits=5, strategy="group", group_size=32, symmetric=False), "int5/group32 asym static minmax"),
        (args(num_bits=4, strategy="tensor"), "int4/tensor sym static minmax"),
        (args(num_bits=4, strategy="tensor", symmetric=False), "int4/tensor asym static minmax"),
        (
            args(num_bits=8, type="float", strategy="block", block_structure=[32, 64]),
            "e4m3/block32x64 sym static minmax",
        ),
    ],
)
def test_other_arguments(tmp_path: Path, scheme: QuantizationScheme, name: str) -> None:
    expected = write_compressed(tmp_path, scheme, tiny_llama())
    checkpoint = qt.read_checkpoint(tmp_path)
    assert_same(checkpoint.state_dict(), expected)
    assert set(checkpoint.schemes.values()) == {name}


def test_several_files(tmp_path: Path) -> None:
    model = tiny_llama(layers=2)
    expected = write_compressed(tmp_path / "one", preset_name_to_scheme("W4A16", ["Linear"]), model)
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}  # the tensors of a layer lie in two files
    (tmp_path / "two").mkdir()
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "two" / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "two" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    assert_same(qt.read_checkpoint(tmp_path / "two").state_dict(), expected)


def test_without_a_config_the_tensors_tell(tmp_path: Path) -> None:
    expected = write_compressed(tmp_path, preset_name_to_scheme("W3A16", ["Linear"]), tiny_llama())
    (tmp_path / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = qt.read_checkpoint(path)
        assert_same(checkpoint.state_dict(), expected)
        assert set(checkpoint.schemes.values()) == {"int3/group128 sym static minmax"}


def test_what_we_packed_reads_back(tmp_path: Path) -> None:
    """Layouts mixed in one file, from codes that we know."""
    generator = torch.Generator().manual_seed(1)
    signed = torch.randint(-8, 8, (32, 64), generator=generator).to(torch.int8)
    patterns = torch.randint(0, 16, (32, 64), generator=generator).to(torch.uint8)
    scale = torch.rand(32, 2, 1, generator=generator) + 0.1
    zero = torch.randint(-8, 8, (32, 2, 1), generator=generator).float()
    powers = 2.0 ** torch.randint(-9, 3, (32, 2, 1), generator=generator)
    layers = {
        "a": storage.pack_quantized(signed, Parameters(scale, zero, scale), 4, torch.float32, symmetric=False),
        "b": storage.pack_mxfp4(patterns, Parameters(powers, powers, powers)),
        "c": storage.pack_mxfp6(patterns, Parameters(powers, powers, powers)),
    }
    tensors = {f"{layer}.{name}": tensor for layer, parts in layers.items() for name, tensor in parts.items()}
    save_file({**tensors, "a.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    checkpoint = qt.read_checkpoint(tmp_path)
    assert {name: tuple(stored.shape) for name, stored in checkpoint.weights.items()} == dict.fromkeys(
        ("a.weight", "b.weight", "c.weight"), (32, 64)
    )
    exact = ((signed.float().unflatten(1, (2, 32)) - zero) * scale).flatten(1)
    assert torch.equal(checkpoint.weights["a.weight"].values(), exact)
    for layer in ("b", "c"):
        stored = checkpoint.weights[f"{layer}.weight"]
        assert torch.equal(stored.codes.reshape(32, 64), patterns)
        assert torch.equal(stored.parameters.scale, powers.reshape(-1, 1))
    assert_same(checkpoint.floats, {"a.bias": torch.ones(32)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_compressed(tmp_path, preset_name_to_scheme("W4A16", ["Linear"]), tiny_llama())
    return tmp_path


def damage(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of one layer (None: leave out)."""
    file, layer = folder / "model.safetensors", "model.layers.0.mlp.up_proj."
    tensors = load_file(file) | {layer + name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({k: v for k, v in tensors.items() if changes.get(k.removeprefix(layer), v) is not None}, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_g_idx": torch.arange(256)}, "without activation ordering"),
        ({"weight_scale": None}, "weight_packed without weight_scale"),
        ({"weight_packed": None}, "weight is missing, not an int8 or float8"),
        ({"weight_packed": None, "weight": torch.ones(384, 256)}, r"weight is torch.float32 .* was not compressed"),
        ({"weight_shape": None}, "0 codes of"),
        (
            {"weight_packed": torch.zeros(384, 31, dtype=torch.int32)},
            "31 words a row hold 256 codes of no number of bits",
        ),
        ({"weight_packed": torch.zeros(9, 32, dtype=torch.int32)}, "weight_packed has 9 rows, weight_shape says 384"),
        ({"weight_scale": torch.ones(384, 3)}, "do not tile"),
        ({"weight_scale": torch.ones(384)}, "do not tile"),
        ({"weight_scale": torch.ones(0, 1)}, "do not tile"),
        ({"weight_scale": torch.ones(384, 2, dtype=torch.float64)}, "weight_scale is torch.float64"),
        ({"weight_zero_point": torch.zeros(48, 5, dtype=torch.int32)}, "for a weight of shape|do not tile"),
        ({"weight_shape": torch.tensor([384, 256, 1])}, "does not fit together|words a row"),
    ],
)
def test_damaged_layers(folder: Path, changes: dict[str, Tensor | None], message: str) -> None:
    damage(folder, **changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        qt.read_checkpoint(folder)
    assert "model.layers.0.mlp.up_proj: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "marlin-24"}, "format 'marlin-24' is not supported"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config 'sparse-24-bitmask' is not supported"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "the weights are rotated"),
        ({"config_groups": 3}, "quantization_config: what the file says"),
        ({"quant_method": "gptq"}, "unknown quant_method 'gptq' .*bitnet, bitsandbytes, compressed-tensors"),
    ],
)
def test_configs_that_are_not_supported(folder: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=message):
        qt.read_checkpoint(folder)


def test_blocks_that_hang_over_the_edge_are_refused(tmp_path: Path) -> None:
    """3 rows of blocks of 48 for 128 rows would read as blocks of other sizes; two of 96 for 128 as blocks of 64, silently."""
    for rows, config in ((96, "hang over"), (64, "config.json says no block_structure")):
        weights = {"num_bits": 8, "type": "float", "strategy": "block"}
        weights |= {"block_structure": [rows, 64]} if rows == 96 else {}
        about = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": about}))
        tensors = {"a.weight": torch.ones(128, 128).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(2, 2)}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ArtifactError, match=config):
            qt.read_checkpoint(tmp_path)
