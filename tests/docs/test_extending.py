"""The programs that extend qatana run, fit on a screen, and are what the page shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

NAMES = ["own_format", "own_layer", "own_target"]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_runs(repository: Path, tmp_path: Path, name: str) -> None:
    """In a process of its own: what it registers stays there."""
    path = repository / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 40
    done = subprocess.run([sys.executable, "-B", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal: True" in done.stdout or "pass: artifact" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_page_shows_the_examples(repository: Path) -> None:
    page = (repository / "docs" / "extending.md").read_text()
    examples = "\n".join((repository / "examples" / f"{name}.py").read_text() for name in NAMES)
    shown = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len(shown) == 4
    for block in shown:
        assert (
            block.strip() in examples or block.strip().replace('{"down": "out in", "up": "out in"}', "...") in examples
        )
