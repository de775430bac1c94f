"""Resumable stages: each writes its result with a fingerprint of what it was made from, and is skipped when both still stand.

    folder/stages/NAME.json   {"fingerprint", "result", "seconds", "files": {path: bytes}}

fingerprint = sha256 of the stage's name, its inputs (plain values, fingerprints of the stages before it) and the versions of what
computes. So a change anywhere makes what follows from it run again, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from qatana.errors import ArtifactError
from qatana.files import read_json, write_json
from qatana.jobs.progress import Progress

SCRATCH = ".work"
COMPUTES = ("qatana", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """Installed versions of everything that takes part in a result."""
    found = {}
    for name in COMPUTES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Record:
    """What a stage left: its result (plain JSON), how long it took, and whether it was found done."""

    fingerprint: str
    result: Any
    seconds: float
    skipped: bool


class Stages:
    """The stages of one run folder."""

    def __init__(self, folder: Path, progress: Progress, *, restart: bool = False) -> None:
        self.folder, self.progress, self.restart = folder, progress, restart
        self.records: dict[str, Record] = {}
        self.versions = versions()

    def run(
        self, name: str, inputs: dict[str, Any], work: Callable[[Path], Any], files: Sequence[str] = (), title: str = ""
    ) -> Record:
        """The record of a stage: read if it is done and its inputs are the same, else worked out and written.

        inputs  plain values and Records of earlier stages
        work    gets a scratch path for what it wants to find again if it is killed (checkpoints); a change of inputs gives
                another path. It returns plain JSON and has written `files` (below the folder)"""
        if name in self.records:
            return self.records[name]
        fingerprint = self._fingerprint(name, inputs)
        record = None if self.restart else self._done(name, fingerprint)
        if record is None:
            self._path(name).unlink(missing_ok=True)  # from here on the stage is not done, whatever happens
            self.progress.say(f"{title or name}")
            if self.restart:
                self._clear(name)
            begin = time.perf_counter()
            result = json.loads(json.dumps(work(self.folder / SCRATCH / f"{name}@{fingerprint[:16]}")))
            record = Record(fingerprint, result, time.perf_counter() - begin, skipped=False)
            self._write(name, record, files)
            self._clear(name)
        else:
            self.progress.say(f"{title or name}: done before, skipped")
        self.records[name] = record
        return record

    def _clear(self, name: str) -> None:
        for old in (self.folder / SCRATCH).glob(f"*{name}@*"):  # "*": what a kill left of a replacement, too
            shutil.rmtree(old, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _fingerprint(self, name: str, inputs: dict[str, Any]) -> str:
        plain = {key: value.fingerprint if isinstance(value, Record) else value for key, value in inputs.items()}
        text = json.dumps([name, plain, self.versions], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    def _done(self, name: str, fingerprint: str) -> Record | None:
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            saved = read_json(path)
        except ArtifactError:
            return None  # not whole: the stage runs again
        if not isinstance(saved, dict) or saved.get("fingerprint") != fingerprint:
            return None
        if any(_size(self.folder / file) != size for file, size in saved["files"].items()):
            return None
        return Record(fingerprint, saved["result"], saved["seconds"], skipped=True)

    def _write(self, name: str, record: Record, files: Sequence[str]) -> None:
        sizes = {file: _size(self.folder / file) for file in files}
        content = {
            "fingerprint": record.fingerprint,
            "seconds": record.seconds,
            "files": sizes,
            "result": record.result,
        }
        write_json(self._path(name), content)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; -1 if there is nothing."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return path.stat().st_size if path.is_file() else -1
