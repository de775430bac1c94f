"""The short examples run as they stand, in a folder of their own, and prove the file that they write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart_bert", "quickstart_cnn"])
def test_quickstart(repository: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-B", str(repository / "examples" / f"{name}.py"), str(tmp_path / "model.onnx")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "pass: model.onnx" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
