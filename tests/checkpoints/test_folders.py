"""Files and folders that are none, or not whole: one line that says what, where and what to do; never another exception."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import qatana as qt
from qatana.checkpoints import WRITERS, Stored
from qatana.errors import ArtifactError, SchemeError
from qatana.numerics import Parameters, quantize_by, storage

INDEX = "model.safetensors.index.json"


def refused(path: Path, message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        qt.read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def packed() -> dict[str, Tensor]:
    codes, scale = torch.randint(-8, 8, (16, 64)).to(torch.int8), torch.rand(16, 2, 1) + 0.1
    parts = storage.pack_quantized(codes, Parameters(scale, torch.zeros_like(scale), scale), 4, torch.float32)
    return {f"a.{name}": tensor for name, tensor in parts.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file(packed(), tmp_path / "model.safetensors")
    return tmp_path


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent does not exist; give a folder")
    refused(tmp_path, "has no .*safetensors; give the folder that save_pretrained wrote")
    (tmp_path / "notes.txt").touch()
    refused(tmp_path / "notes.txt", r"notes.txt is no folder, \.safetensors, \.gguf or \.onnx file")
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, r"holds GGUF files; read one of them: .*model\.gguf")


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "opened",))

    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Opened()))
    refused(tmp_path, "pytorch_model.bin is a pickle, which qatana does not open; save the model as safetensors")
    assert not (tmp_path / "opened").exists()


def test_float_models(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    refused(tmp_path, "no tensor is quantized in a way that qatana knows")


def test_our_own_artifact(folder: Path) -> None:
    (folder / "config.json").write_text('{"format": "qatana-artifact"}')
    refused(folder, "read it with qatana.Artifact.load")


def test_truncated_tensors(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for length in range(0, len(whole), 61):
        (folder / "model.safetensors").write_bytes(whole[:length])
        refused(folder, "model.safetensors is truncated, missing or not safetensors")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "config.json is truncated or not JSON"),
        ("[]", "config.json is no JSON object"),
        ('{"quantization_config": [1]}', "quantization_config in config.json is no object"),
        ('{"quantization_config": {"quant_method": "compresed-tensors"}}', "did you mean 'compressed-tensors'"),
        ('{"quantization_config": {"quant_method": ["awq"]}}', "unknown quant_method"),
        ('{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": 3}}}}', "fit together"),
    ],
)  # fmt: skip
def test_configs(folder: Path, config: str, message: str) -> None:
    (folder / "config.json").write_text(config)
    refused(folder, message)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a.weight", torch.zeros(4, 4, dtype=torch.uint8)),
        ("experts.gate_up_proj_packed", torch.zeros(2, 4, 4, dtype=torch.int32)),
        ("experts.down_proj", torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)),
    ],
)
def test_quantized_tensors_that_belong_to_no_layer(tmp_path: Path, name: str, tensor: Tensor) -> None:
    """Another library's tensors, or experts in one tensor: never handed on as if they were float weights."""
    save_file({name: tensor}, tmp_path / "model.safetensors")
    for method in WRITERS:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
        refused(tmp_path, f"'{name}' is torch.* and part of no layer as {method} writes them; is quant_method")


def test_indices(folder: Path) -> None:
    names = dict.fromkeys(packed(), "model.safetensors")
    for index, message in [
        (
            {"weight_map": names | {"b.bias": "model.safetensors"}},
            "names 'b.bias', which no file holds; copy the folder",
        ),
        ({"weight_map": names | {"b.bias": "b.safetensors"}}, "b.safetensors is truncated, missing or not safetensors"),
        (
            {"weight_map": names | {"b.bias": "../b.safetensors"}},
            "names '../b.safetensors', which is outside the folder",
        ),
        ({"weight_map": {"a": 3}}, "has no weight_map of file names"),
        ([], "has no weight_map of file names"),
    ]:
        (folder / INDEX).write_text(json.dumps(index))
        refused(folder, message)


def test_one_name_in_two_files(folder: Path) -> None:
    save_file(packed(), folder / "copy.safetensors")
    refused(folder, "'a.weight_packed' stands in two files|'a.weight_s.*' stands in two files")


def test_a_scheme_reads_what_it_quantized(folder: Path) -> None:
    """`codes` and `parameters` are those of `quantize_by`, and the scheme's text makes the scheme."""
    stored = qt.read_checkpoint(folder).weights["a.weight"]
    scheme = qt.scheme(qt.read_checkpoint(folder).schemes["a.weight"])
    assert scheme == stored.scheme
    codes, parameters = quantize_by(stored.values(), scheme)
    assert (codes.shape, codes.dtype) == (stored.codes.shape, stored.codes.dtype)
    assert parameters.scale.shape == stored.parameters.scale.shape


DTYPES = st.sampled_from(
    [torch.uint8, torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
)
PARTS = st.sampled_from(
    [
        *("a.weight", "a.weight_packed", "a.weight_scale", "a.weight_shape", "a.weight_zero_point", "a.SCB"),
        *("a.weight_global_scale", "a.weight.absmax", "a.weight.quant_map", "a.weight.nested_absmax"),
        *("a.weight.quant_state.bitsandbytes__nf4", "a.weight_format", "a.bias", "weight_scale", "weight_packed"),
    ]
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 32, 64]), max_size=3)


@given(
    st.dictionaries(PARTS, st.tuples(DTYPES, SHAPES), min_size=1),
    st.sampled_from([*WRITERS, None]),
    st.booleans(),
)
def test_any_tensors_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict, method: str | None, real: bool
) -> None:
    """Names of parts with any dtype and shape: a Checkpoint whose values can be computed, or an ArtifactError."""
    folder = tmp_path_factory.mktemp("any")
    made = {name: torch.randint(0, 3, shape).float().to(dtype) for name, (dtype, shape) in tensors.items()}
    save_file((packed() if real else {}) | made, folder / "model.safetensors")
    if method:
        (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    try:
        checkpoint = qt.read_checkpoint(folder)
    except ArtifactError:
        return
    state = checkpoint.state_dict(torch.float32)
    for name, stored in checkpoint.weights.items():
        assert state[name].shape == stored.shape
    left = set(checkpoint.floats) | set(checkpoint.activations)
    assert left <= set(load_file(folder / "model.safetensors"))


def test_scales_must_fit() -> None:
    scale = torch.ones(3, 1)
    codes, parameters = torch.zeros(4, 8, dtype=torch.int8), Parameters(scale, scale, scale)
    with pytest.raises(SchemeError, match=r"scales of shape \(3, 1\) for a weight of shape \(4, 8\) per channel"):
        Stored.of(qt.scheme("int8/channel"), codes, parameters, torch.float32)
