"""python -m benchmarks.lora: what a row counts is what there is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason='pip install "qatana[lora]"')


@pytest.mark.slow
def test_a_quick_run_counts_parameters_and_bytes(repository: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.json"
    command = [sys.executable, "-m", "benchmarks.lora", "--quick", "--rounds", "2", "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    whole, full, lora = json.loads(out.read_text())["rows"]
    # Llama of one layer: table 96 x 64; q, k, v, o 64 x 64; three of 64 x 96; three norms of 64.
    weights, norms = 96 * 64 + 4 * 64 * 64 + 3 * 64 * 96, 3 * 64
    assert whole["trained"] == whole["parameters"] == weights + norms
    assert full["trained"] == full["parameters"] == weights + norms + weights // 32  # a learned scale per group
    assert lora["trained"] == 4 * (4 * (64 + 64) + 3 * (64 + 96))
    assert lora["parameters"] == full["parameters"] + lora["trained"]
    # AdamW: two moments in float32 per parameter, and for each tensor the number of its step.
    for row, tensors in ((whole, 1 + 7 + 3), (full, 1 + 7 + 3 + 8), (lora, 2 * 7)):
        assert row["memory"]["optimizer"] == 8 * row["trained"] + 4 * tensors
        assert row["memory"]["saved"] > 0
        assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]
    assert full["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
