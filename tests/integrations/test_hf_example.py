"""examples/hf_token_classification.py: the stock script with three lines more runs, and its rows agree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_three_lines_more_than_the_stock_script(
    repository: Path, minilm_dir: Path, conll_dir: Path, tmp_path: Path
) -> None:
    script = repository / "examples" / "hf_token_classification.py"
    assert re.findall(r"# .*line (\d) of 3$", script.read_text(), re.MULTILINE) == ["1", "2", "3"]
    command = [sys.executable, str(script), "--limit", "8", "--steps", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = dict(re.findall(r"^(float|QAT|integers) +entity F1 +([\d.]+)$", done.stdout, re.MULTILINE))
    assert set(rows) == {"float", "QAT", "integers"}
    assert {path.name for path in (tmp_path / "runs/hf-ner").iterdir()} == {"float", "qat"}
