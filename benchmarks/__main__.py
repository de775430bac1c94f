"""The command: python -m benchmarks."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from benchmarks.contestants import CONTESTANTS
from benchmarks.models import inference_shapes, training_shapes
from benchmarks.show import SHOW
from qatana.errors import QatanaError, RecipeError, nearest
from qatana.files import write_json
from qatana.hardware import describe, processor
from qatana.jobs.bench import threads as processors
from qatana.jobs.progress import Progress

WIDE = 180
"""Columns of tables in a log."""
PARTS = ("bert", "resnet", "step", "quantizers")
PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "transformers", "qatana")
EXAMPLES = """examples:
  python -m benchmarks                               everything, about an hour on two cores
  python -m benchmarks --only bert --rounds 20       latencies of one model's files, more rounds
  python -m benchmarks --only bert --reuse           once more, with the files of the last time
  python -m benchmarks --only step                   training steps, the peers' too (their environments are made once)
  python -m benchmarks --only step --models llama --contestants float32,qatana-w8a8
  python -m benchmarks --only quantizers             a weight's quantizers against a copy of it
  python -m benchmarks --quick --out runs/bench      small shapes: whether it works, not how fast it is
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see python -m benchmarks --help\n")


def options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "python -m benchmarks", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.description = (
        "Latency of float and integer files in ONNX Runtime and OpenVINO (bert, resnet); the price of a QAT step, beside float ones and\n"
        "the peers' (step); of a quantizer (quantizers). Writes DIR/speed.json, DIR/step.json and DIR/quantizers.json."
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part (may be repeated)")
    parser.add_argument("--rounds", type=_positive, default=10, metavar="N", help="counted rounds (default 10)")
    parser.add_argument("--threads", type=_positive, default=min(2, processors()), metavar="N",
                        help="threads of every contestant (default 2)")  # fmt: skip
    parser.add_argument("--targets", default="ort:int8,openvino:int8", metavar="A,B",
                        help="integer files to make (default ort:int8,openvino:int8)")  # fmt: skip
    parser.add_argument("--models", default="bert,llama,resnet", metavar="A,B",
                        help="of the training steps (default bert,llama,resnet)")  # fmt: skip
    parser.add_argument("--contestants", default="all", metavar="A,B",
                        help=f"of the training steps (default all):\n{', '.join(CONTESTANTS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small shapes, for a test")
    parser.add_argument("--reuse", action="store_true", help="time the files that are in DIR, make only what it lacks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR",
                        help="folder of the results and the files (default benchmarks/results)")  # fmt: skip
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(arguments: list[str]) -> int:
    chosen = options(arguments)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else WIDE)
    try:
        check(chosen)
        for name, result in run(chosen, arguments, Progress(console)):
            path = chosen.out / f"{name}.json"
            write_json(path, result)
            SHOW[name](result, console)
            console.print(f"written to {path}", highlight=False)
    except (QatanaError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; what was not written yet is lost\n")
        return 130
    return 0


def check(chosen: argparse.Namespace) -> None:
    """Names are known, before anything long begins.   Raises: RecipeError."""
    from qatana.recipe import targets as known

    for name in chosen.targets.split(","):
        known.target(name)
    chosen.contestants = list(CONTESTANTS) if chosen.contestants == "all" else chosen.contestants.split(",")
    chosen.models = chosen.models.split(",")
    for name in chosen.contestants:
        if name not in CONTESTANTS:
            raise RecipeError(f"unknown contestant '{name}'{nearest(name, CONTESTANTS)}")
    for name in chosen.models:
        if name not in training_shapes(chosen.quick):
            raise RecipeError(f"unknown model '{name}'{nearest(name, training_shapes(chosen.quick))}")


def run(chosen: argparse.Namespace, arguments: list[str], progress: Progress) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result as JSON) of everything that was asked for: speed, step, quantizers."""
    from benchmarks import inference, quantizers, step  # after the options are read: --help answers at once

    parts, rounds, threads = chosen.only or PARTS, chosen.rounds, chosen.threads

    def measured(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with others() as load:
            found = work()
        place = describe() | {"processor": processor(), "threads": threads, "busy_with_others": load[0]}
        command = shlex.join(["python", "-m", "benchmarks", *arguments])
        return {"command": command, "machine": place, "versions": versions(), **found}

    shapes = {name: shape for name, shape in inference_shapes(chosen.quick).items() if name in parts}
    if shapes:
        targets = tuple(chosen.targets.split(","))
        yield "speed", measured(lambda: {"inference": [
            inference.measure(name, shape, targets, rounds, threads, chosen.out, chosen.reuse, progress)
            for name, shape in shapes.items()
        ]})  # fmt: skip
    if "step" in parts:
        training = training_shapes(chosen.quick)
        yield "step", measured(lambda: {"models": [
            step.measure(name, training[name], chosen.contestants, rounds, threads, chosen.quick, chosen.out, progress)
            for name in chosen.models
        ]})  # fmt: skip
    if "quantizers" in parts:
        yield "quantizers", measured(lambda: quantizers.measure(rounds, threads, chosen.quick, progress))


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


@contextmanager
def others() -> Iterator[list[float | None]]:
    """Yields a list whose only item is, afterwards, how many processors other processes kept busy meanwhile (None: not known)."""
    found: list[float | None] = [None]
    begin = _busy()
    yield found
    end = _busy()
    if begin is not None and end is not None:
        (busy, own, wall), (busy_before, own_before, wall_before) = end, begin
        found[0] = round(max(0.0, (busy - busy_before - (own - own_before)) / (wall - wall_before)), 2)


def _busy() -> tuple[float, float, float] | None:
    """Processor seconds of the whole machine, of this process and those that it started and that ended, and seconds by the clock."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    mine = os.times()
    user, nice, system, _idle, _iowait, irq, softirq = ticks[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), sum(mine[:4]), mine.elapsed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
