"""A contestant in a process of its own: waits for a line on standard input, answers with a line of JSON on standard output.

    python -m benchmarks.worker --contestant NAME --model bert [--quick] [--threads 2]

First answer: {"ready": remark, "versions": {...}} or {"error": reason}. Then "turn" -> milliseconds, "memory" -> bytes,
"operators" -> milliseconds of one step by operator, "end". It runs in the environments of the peers too, where there is no qatana."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.contestants import CONTESTANTS, autocast, quantized
from benchmarks.models import Shape, training_shapes

PACKAGES = {
    "quanto": "optimum-quanto",
    "modelopt": "nvidia-modelopt",
    "aimet": "aimet-torch",
}
"""Contestant -> its package, where the names differ"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--contestant", choices=CONTESTANTS, required=True)
    parser.add_argument("--model", choices=training_shapes(False), required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(options.threads)

    def answer(found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    try:
        step, remark = ready(options.contestant, options.model, options.quick)
    except Exception as error:
        answer({"error": reason(error)})
        raise
    answer({"ready": remark, "versions": versions(options.contestant)})
    asked = {"turn": step.turn, "memory": lambda: memory(step), "operators": step.operators}
    for line in sys.stdin:
        if line.strip() == "end":
            return
        answer(asked[line.strip()]())


def ready(name: str, model: str, quick: bool) -> tuple[Any, str]:
    """A step that was made twice: what is built or compiled at the first one is no part of its price."""
    contestant, shape = CONTESTANTS[name], training_shapes(quick)[model]
    network, remark = quantized(contestant, shape, model)
    step = _training_step()(network, forward(shape), shape.optimizer, autocast(contestant))
    for _ in range(2):
        step()
    return step, remark


def _training_step() -> Any:
    """The class that measures, read from its file: it is qatana's, and needs PyTorch alone."""
    path = Path(__file__).resolve().parents[1] / "src" / "qatana" / "jobs" / "training_step.py"
    spec = importlib.util.spec_from_file_location("training_step", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TrainingStep


def forward(shape: Shape) -> Any:
    """model -> its output on the batch that every contestant trains on."""
    batch = shape.batch(0)

    def call(model: nn.Module) -> Any:
        return model(**batch) if isinstance(batch, dict) else model(batch)

    return call


def memory(step: Any) -> dict[str, int | None]:
    return {"saved": step.saved_bytes(), "kept": step.kept_bytes(), "peak": step.peak_bytes()}


def versions(contestant: str) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "transformers", PACKAGES.get(contestant, contestant.partition("-")[0])):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def reason(error: BaseException) -> str:
    """The error in one line."""
    line = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line.strip()[:300]}"


if __name__ == "__main__":
    main()
