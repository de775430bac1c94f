"""Virtual environments of the peers, made at their first use from benchmarks/peers/NAME.txt, in a folder that git ignores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from qatana.errors import QatanaError
from qatana.jobs.progress import Progress

HERE = Path(__file__).resolve().parent
CACHE = HERE / ".venv"


class NoEnvironment(QatanaError):
    """A peer that cannot be installed here; the message is the reason for its row."""


def requirements(peer: str) -> Path:
    return HERE / "peers" / f"{peer}.txt"


def interpreter(peer: str, progress: Progress) -> Path:
    """The Python of a peer's environment. It is made anew where the peer's file has changed since.   Raises: NoEnvironment."""
    folder, wanted = CACHE / peer, requirements(peer).read_text(encoding="utf-8")
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    progress.say(f"{peer}: virtual environment from {requirements(peer).relative_to(HERE.parent)}, a minute or two")
    shutil.rmtree(folder, ignore_errors=True)
    CACHE.mkdir(exist_ok=True)
    log = CACHE / f"{peer}.log"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    with open(log, "w", encoding="utf-8") as written:
        # torch first and alone, for the reason that constraints.txt gives.
        for command in (
            [sys.executable, "-m", "venv", str(folder)],
            [*pip, torch],
            [*pip, "-r", str(requirements(peer))],
        ):
            done = subprocess.run(command, stdout=written, stderr=subprocess.STDOUT, check=False)
            if done.returncode:
                raise NoEnvironment(f"not installed: {last_line(log)}")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def variables(peer: str | None, threads: int) -> dict[str, str]:
    """Environment variables of a contestant. What a peer compiles stays in its environment."""
    found = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    found |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    return found | ({"TORCH_EXTENSIONS_DIR": str(CACHE / peer / "extensions")} if peer else {})


def last_line(log: Path) -> str:
    """The last line of a log that says something, an error where there is one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["nothing was said"])[-1][:300]
