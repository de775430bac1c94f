"""`make bench` works: small shapes through the same code. How fast anything is, is no matter of a test."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def bench(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.engine
@pytest.mark.slow
def test_small_shapes_run(repository: Path, tmp_path: Path) -> None:
    done = bench(
        repository, "--quick", "--rounds", "2", "--threads", "1", "--targets", "ort:int8", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "speed.json").read_text())
    for part in result["inference"]:
        assert not part["notes"]
        assert {
            "PyTorch float32",
            "ONNX Runtime float32",
            "ONNX Runtime int8",
            "OpenVINO float32",
            "OpenVINO int8",
        } == set(part["milliseconds"])
        for ms in part["milliseconds"].values():
            assert 0 < ms["min"] <= ms["median"] <= ms["max"]
            assert len(ms["rounds"]) == 2
    for part in result["step"]:
        assert part["time_ratio"] > 0
        # Activations kept as float32, with masks and codes beside them, or less once they are kept as codes: never nothing.
        assert all(size > 0 for size in part["saved_bytes"].values())
    assert [part["title"].partition(",")[0] for part in result["inference"] + result["step"]] == ["BERT", "ResNet"] * 2
    assert result["versions"]["onnxruntime"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "'0' is not a number of at least 1"),
        (["--only", "berd"], "invalid choice: 'berd'"),
        (["--targets", "ort:in8", "--quick"], "did you mean 'ort:int8'?"),
    ],
)
def test_an_error_is_one_line(repository: Path, arguments: list[str], words: str) -> None:
    done = bench(repository, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
