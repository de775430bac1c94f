"""Writing so that a crash, a full disk or a kill leaves the old file or the new one, never half of one."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qatana.errors import ArtifactError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes the place of `path`, on error it is removed.

    Raises: ArtifactError if the folder is not writable or the disk is full (the old file is intact)."""
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _flush(temporary)
            temporary.chmod(0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """As `replacing`, for a folder: the new one is complete on disk before the old one is moved away."""
    path = Path(path)
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        old = _old(path)
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    file.chmod(0o644)
                    _flush(file)
            temporary.chmod(0o755)
            if path.exists():  # else the old folder is the only one, after a kill just here
                shutil.rmtree(old, ignore_errors=True)
                os.rename(path, old)
            os.rename(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def standing_folder(path: str | Path, file: str) -> Path | None:
    """Where a folder written by `replacing_folder` stands: at `path` or, after a kill between its two renames, beside it.

    file  a file that it holds; None is returned if neither place has it"""
    path = Path(path)
    if (path / file).is_file():
        return path
    empty = path.is_dir() and not any(path.iterdir())
    lost = bool(path.name) and (empty or not path.exists())
    return _old(path) if lost and (_old(path) / file).is_file() else None


def _old(path: Path) -> Path:
    """The name that a folder has while a new one takes its place."""
    return path.with_name(f".{path.name}.old")


def write_json(path: str | Path, data: Any) -> None:
    """Write data as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Parse a JSON file. Raises: ArtifactError naming the file if it is missing, truncated or no JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is truncated or not JSON ({error}); write it again") from error


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = getattr(error, "errno", None) or _code_in(str(error))
        remedy = {
            errno.ENOSPC: "free some space and save again; what was there before is intact",
            errno.EDQUOT: "the quota is used up; what was there before is intact",
            errno.EACCES: "choose a folder that you may write to",
            errno.EROFS: "choose a folder on a writable file system",
            errno.ENOTDIR: "a file stands where a folder is needed",
            errno.EFBIG: "the limit on file sizes (ulimit -f) is reached; what was there before is intact",
        }.get(code, "check the path")
        raise ArtifactError(f"cannot write {path}: {os.strerror(code) if code else error}; {remedy}") from error


def _code_in(message: str) -> int:
    """The errno in a safetensors message ("... (os error 28)"), which it raises without being an OSError."""
    found = re.search(r"os error (\d+)", message)
    return int(found[1]) if found else 0
