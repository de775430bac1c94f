"""Contestants in processes of their own, one of which runs at a time, in rounds: what slows the machine meets all of them alike."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.environments import HERE, NoEnvironment, interpreter, last_line, variables
from qatana.jobs.progress import Progress

WARMUP = 1
READY, TURN = 1800.0, 300.0
"""Seconds that a contestant may take to be ready (a peer compiles its kernels then), and for a turn"""


class Lost(Exception):
    """A contestant that cannot go on; the message is the reason for its row."""


class Worker:
    """A contestant's process: see benchmarks.worker.   Raises: Lost."""

    def __init__(self, contestant: Contestant, python: Path, model: str, threads: int, quick: bool, log: Path) -> None:
        self.contestant, self._log = contestant, log
        command = [str(python), "-m", "benchmarks.worker", "--contestant", contestant.name, "--model", model]
        command += ["--threads", str(threads), *(["--quick"] if quick else [])]
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as written:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=written, text=True, bufsize=1,
                cwd=HERE.parent, env=variables(contestant.name if contestant.peer else None, threads),
            )  # fmt: skip
        try:
            self.about = self._answer(READY)
        except Lost:
            self.close()
            raise

    def ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(question + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Lost(self._end()) from error
        return self._answer(TURN)

    def _answer(self, seconds: float) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise Lost(f"no answer within {seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise Lost(self._end())
        found = json.loads(line)
        if "error" in found:
            raise Lost(found["error"])
        return found

    def _end(self) -> str:
        return f"ended with code {self._process.wait()}: {last_line(self._log)}"

    def close(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()


def race(
    model: str, names: Sequence[str], rounds: int, threads: int, quick: bool, out: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """By contestant: {"rounds": milliseconds of each counted round, "memory", "operators", "about"}, or {"reason"} why there is nothing."""
    found: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            try:
                workers[name] = _started(CONTESTANTS[name], model, threads, quick, out, progress)
                found[name] = {"about": workers[name].about, "rounds": []}
            except (Lost, NoEnvironment) as error:
                progress.say(f"{name}: {error}")
                found[name] = {"reason": str(error)}
        with progress.bar(f"{model}: rounds", WARMUP + rounds) as advance:
            for number in range(WARMUP + rounds):
                for name, ms in _each(workers, found, "turn").items():
                    found[name]["rounds"] += [ms] if number >= WARMUP else []
                advance()
        for question in ("memory", "operators"):
            for name, answer in _each(workers, found, question).items():
                found[name][question] = answer
    finally:
        for worker in workers.values():
            worker.close()
    return found


def _started(
    contestant: Contestant, model: str, threads: int, quick: bool, out: Path, progress: Progress
) -> Worker:  # fmt: skip
    python = interpreter(contestant.name, progress) if contestant.peer else Path(sys.executable)
    return Worker(contestant, python, model, threads, quick, out / "logs" / f"step-{model}-{contestant.name}.log")


def _each(workers: dict[str, Worker], found: dict[str, dict[str, Any]], question: str) -> dict[str, Any]:
    """The answers of all that are still in the race; who is lost leaves it with its reason."""
    answers = {}
    for name, worker in list(workers.items()):
        try:
            answers[name] = worker.ask(question)
        except Lost as error:
            worker.close()
            del workers[name]
            found[name] = {"reason": str(error)}
    return answers
