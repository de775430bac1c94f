"""The GPU script on a CPU, small and not compiled: that it runs when a GPU is lent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.step", *arguments]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_it_runs(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = script("--device", "cpu", "--quick", "--rounds", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["bfloat16", "qatana W8A8", "qatana W4"]
    assert rows[0]["ratio"] == 1.0  # of itself
    assert all(row["milliseconds"] > 0 for row in rows)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = script("--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
