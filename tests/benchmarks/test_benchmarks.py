"""`make bench` works: small shapes through the same code. How fast anything is, is no matter of a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import environments
from benchmarks.bars import Bar, bars, judge
from benchmarks.contestants import CONTESTANTS
from qatana.jobs.progress import Progress

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


def bench(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.engine
@pytest.mark.slow
def test_small_shapes_run(repository: Path, tmp_path: Path) -> None:
    done = bench(
        repository, "--quick", "--rounds", "2", "--threads", "1", "--targets", "ort:int8", "--out", str(tmp_path),
        "--only", "bert", "--only", "resnet",
    )  # fmt: skip
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
    assert [part["title"].partition(",")[0] for part in result["inference"]] == ["BERT", "ResNet"]
    assert result["versions"]["onnxruntime"] in done.stdout


@pytest.mark.slow
def test_steps_of_contestants_in_processes_of_their_own(repository: Path, tmp_path: Path) -> None:
    """The peers have environments, which a test does not make: see the bars and rows below."""
    ours = ["float32", "bfloat16", "qatana-w8a8", "qatana-w8a8-bfloat16", "qatana-w4a8", "qatana-w4"]
    done = bench(
        repository, "--quick", "--rounds", "2", "--threads", "1", "--out", str(tmp_path), "--only", "step",
        "--only", "quantizers", "--contestants", ",".join(ours), "--models", "llama",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (model,) = json.loads((tmp_path / "step.json").read_text())["models"]
    assert [row["name"] for row in model["contestants"]] == ours
    for row in model["contestants"]:
        assert "reason" not in row, row
        ms = row["milliseconds"]
        assert len(ms["step"]["rounds"]) == 2
        # Of each round: the step is its three parts, to the rounding of float64.
        for i in range(2):
            parts = sum(ms[part]["rounds"][i] for part in ("forward", "backward", "optimizer"))
            assert ms["step"]["rounds"][i] == pytest.approx(parts, rel=1e-9)
        assert row["memory"]["saved"] > 0
        # What autograd saves was allocated in the forward pass, but for the batch: 2 x 16 ids of 8 bytes, looked up and compared.
        assert row["memory"]["kept"] >= row["memory"]["saved"] - 4 * 2 * 16 * 8
    assert model["contestants"][0]["ratio"]["step"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    cases = json.loads((tmp_path / "quantizers.json").read_text())["cases"]
    assert all(case["min"] <= case["ratio"] <= case["max"] for case in cases)
    assert len(cases) == 9


def entry(step: list[float], saved: int = 100, peak: int | None = 100) -> dict[str, Any]:
    return {"rounds": [{"step": ms} for ms in step], "memory": {"saved": saved, "peak": peak}}


def test_a_bar_is_the_median_of_the_ratios_of_rounds() -> None:
    """2/4, 3/4, 9/10: not the ratio of medians, 3/4 by chance, nor of means."""
    found = {"qatana-w8a8": entry([2.0, 3.0, 9.0]), "float32": entry([4.0, 4.0, 10.0])}
    verdict = judge(Bar("bert", "step", "qatana-w8a8", "float32", 0.7), found)
    assert (verdict["ratio"], verdict["min"], verdict["max"], verdict["pass"]) == (0.75, 0.5, 0.9, False)
    assert judge(Bar("bert", "step", "qatana-w8a8", "float32", 0.75), found)["pass"]


def test_bars_of_memory_and_of_who_is_not_there() -> None:
    found = {
        "qatana-w8a8": entry([1.0], saved=40, peak=None),
        "float32": entry([1.0]),
        "nncf": {"reason": "not installed"},
    }
    assert judge(Bar("bert", "saved", "qatana-w8a8", "float32", 0.5), found)["ratio"] == 0.4
    for bar in (Bar("bert", "peak", "qatana-w8a8", "float32", 1.0), Bar("bert", "step", "qatana-w8a8", "nncf", 1.0)):
        verdict = judge(bar, found)
        assert (verdict["ratio"], verdict["pass"]) == (None, None)


def test_the_bars_are_those_of_the_price() -> None:
    """Issue 4, bars 1 and 2."""
    asked = {(b.model, b.quantity, b.who, b.against): b.bar for m in ("bert", "llama", "resnet") for b in bars(m)}
    assert asked["bert", "step", "qatana-w8a8", "float32"] == 0.60
    assert asked["bert", "step", "qatana-w8a8-bfloat16", "float32"] == 0.45
    assert asked["llama", "step", "qatana-w8a8-bfloat16", "bfloat16"] == 1.05
    assert asked["resnet", "saved", "qatana-w8a8", "float32"] == 0.60
    assert ("resnet", "step", "qatana-w8a8-bfloat16", "bfloat16") not in asked
    assert {against for _, _, _, against in asked} >= {path.stem for path in (PEERS).glob("*.txt")}


def test_a_peer_that_does_not_install_has_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip is asked for a release that cannot exist, without an index; what it says last is the reason."""
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "none.txt").write_text("torch==0.0.0.0\n")
    monkeypatch.setattr(environments, "HERE", tmp_path)
    monkeypatch.setattr(environments, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # a machine's own constraints would be another reason
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(environments.NoEnvironment, match=r"not installed: .*torch==0\.0\.0\.0"):
        environments.interpreter("none", Progress())


def test_every_peer_is_a_pinned_environment_and_a_script() -> None:
    files = sorted(PEERS.glob("*.txt"))
    assert [path.stem for path in files] == sorted(c.name for c in CONTESTANTS.values() if c.peer)
    for path in files:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines[0].startswith("torch==")
        assert all("==" in line for line in lines)
        assert path.with_suffix(".py").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "'0' is not a number of at least 1"),
        (["--only", "berd"], "invalid choice: 'berd'"),
        (["--targets", "ort:in8", "--quick"], "did you mean 'ort:int8'?"),
        (["--contestants", "float3", "--quick"], "did you mean 'float32'?"),
        (["--models", "bart", "--quick"], "did you mean 'bert'?"),
    ],
)
def test_an_error_is_one_line(repository: Path, arguments: list[str], words: str) -> None:
    done = bench(repository, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
