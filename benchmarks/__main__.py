"""The command: python -m benchmarks."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from qatana.errors import QatanaError
from qatana.files import write_json
from qatana.hardware import describe, processor
from qatana.jobs.bench import threads as processors
from qatana.jobs.progress import Progress

PARTS = ("bert", "resnet", "step")
PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "transformers", "qatana")
EXAMPLES = """examples:
  python -m benchmarks                               everything, about ten minutes on two cores
  python -m benchmarks --only bert --rounds 20       one model, more rounds
  python -m benchmarks --only bert --reuse           once more, with the files of the last time
  python -m benchmarks --quick --out runs/bench      small shapes: whether it works, not how fast it is
  python -m benchmarks --only resnet --targets ort:int8
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see python -m benchmarks --help\n")


def options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "python -m benchmarks", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.description = "Latency of float and integer files in ONNX Runtime and OpenVINO, and the price of a QAT step."
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part (may be repeated)")
    parser.add_argument("--rounds", type=_positive, default=10, metavar="N", help="counted rounds (default 10)")
    parser.add_argument("--threads", type=_positive, default=min(2, processors()), metavar="N",
                        help="threads of every contestant (default 2)")  # fmt: skip
    parser.add_argument("--targets", default="ort:int8,openvino:int8", metavar="A,B",
                        help="integer files to make (default ort:int8,openvino:int8)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small shapes, for a test")
    parser.add_argument("--reuse", action="store_true", help="time the files that are in DIR, make only what it lacks")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="DIR",
                        help="folder of speed.json and the files (default benchmarks/results)")  # fmt: skip
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(arguments: list[str]) -> int:
    chosen = options(arguments)
    console = Console(soft_wrap=True)
    try:
        result = run(chosen, arguments, Progress(console))
        path = chosen.out / "speed.json"
        write_json(path, result)
    except (QatanaError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted; nothing was written\n")
        return 130
    show(result, console)
    console.print(f"written to {path}", highlight=False)
    return 0


def run(chosen: argparse.Namespace, arguments: list[str], progress: Progress) -> dict[str, Any]:
    """Everything that was asked for, as JSON."""
    # After the options are read: --help answers at once.
    from benchmarks import inference, models, step
    from qatana.recipe import targets as known

    targets = tuple(chosen.targets.split(","))
    for name in targets:
        known.target(name)
    parts, rounds, threads = chosen.only or PARTS, chosen.rounds, chosen.threads
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "machine": describe() | {"processor": processor(), "threads": threads},
        "versions": versions(),
    }
    with others() as load:
        shapes = models.inference_shapes(chosen.quick)
        result["inference"] = [
            inference.measure(part, shapes[part], targets, rounds, threads, chosen.out, chosen.reuse, progress)
            for part in parts
            if part in shapes
        ]
        result["step"] = [
            step.measure(shape, "ort:int8", rounds, threads, progress)
            for shape in (models.training_shapes(chosen.quick).values() if "step" in parts else ())
        ]
    result["machine"]["busy_with_others"] = load[0]
    return result


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
    """Processor seconds of the whole machine, of this process, and seconds by the clock."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]]
    except (OSError, ValueError):
        return None
    mine = os.times()
    user, nice, system, _idle, _iowait, irq, softirq = ticks[:7]
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), mine.user + mine.system, mine.elapsed


def show(result: dict[str, Any], console: Console) -> None:
    """Tables: milliseconds of each contestant, bars, prices; then what was measured where."""
    for part in result["inference"]:
        table = Table("contestant", "file", "median ms", "min", "max", title=part["title"], title_justify="left")
        for who, ms in part["milliseconds"].items():
            table.add_row(who, part["files"].get(who, ""), *(f"{ms[key]:.1f}" for key in ("median", "min", "max")))
        console.print(table)
        for bar in part["bars"]:
            ratio = (
                "not measured" if bar["ratio"] is None else f"{bar['ratio']:.2f} ({bar['min']:.2f} to {bar['max']:.2f})"
            )
            verdict = "pass" if bar["pass"] else "FAIL"
            console.print(f"{verdict}  {bar['fast']} over {bar['slow']}: {ratio}, bar {bar['bar']}", highlight=False)
        for note in part["notes"]:
            console.print(f"no file for {note}", highlight=False)
    for part in result["step"]:
        table = Table("step", "median ms", "min", "max", "saved MiB", title=part["title"], title_justify="left")
        for who, ms in part["milliseconds"].items():
            spread = (f"{ms[key]:.1f}" for key in ("median", "min", "max"))
            table.add_row(who, *spread, f"{part['saved_bytes'][who] / 2**20:.1f}")
        console.print(table)
        console.print(
            f"QAT over float: time {part['time_ratio']:.2f}, memory {part['memory_ratio']:.2f}", highlight=False
        )
    for key in ("machine", "versions"):
        console.print(f"{key}: " + ", ".join(f"{k} {v}" for k, v in result[key].items()), highlight=False)
    console.print(f"command: {result['command']}", highlight=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
