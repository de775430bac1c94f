"""The command: python -m benchmarks.architectures. Every architecture of the zoo through the flow, one row each.

Rows are kept in the result file as they come, so that a run may be stopped and taken up again with --reuse."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.architecture import as_dict, run
from benchmarks.zoo import ARCHITECTURES
from qatana.files import write_json


def main(arguments: list[str]) -> int:
    """0 if every architecture that was run passed, else 1."""
    parser = argparse.ArgumentParser("python -m benchmarks.architectures", description=__doc__)
    parser.add_argument("--only", default="", metavar="A,B", help="model types, of the whole zoo by default")
    parser.add_argument("--reuse", action="store_true", help="run only what FILE lacks or has as failed")
    parser.add_argument("--out", type=Path, default=Path("runs/architectures.json"), metavar="FILE", help="result file")
    options = parser.parse_args(arguments)
    wanted = options.only.split(",") if options.only else [a.model_type for a in ARCHITECTURES]
    kept = json.loads(options.out.read_text())["architectures"] if options.out.is_file() else []
    rows = {row["model_type"]: row for row in kept}
    failed = 0
    for architecture in ARCHITECTURES:
        name = architecture.model_type
        if name not in wanted or (options.reuse and rows.get(name, {}).get("passed")):
            continue
        outcome = run(name, architecture.family, architecture.make)
        rows[name] = as_dict(outcome)
        failed += not outcome.passed
        print(f"{'ok  ' if outcome.passed else 'FAIL'} {name}: {outcome.quantized:.4f} of {outcome.matrix_weights:,} quantized, "
              f"{outcome.seconds} s {outcome.error} {outcome.without_gradient[:3]} {outcome.differing}", flush=True)  # fmt: skip
        order = [rows[a.model_type] for a in ARCHITECTURES if a.model_type in rows]
        versions = {package: version(package) for package in ("torch", "transformers", "qatana")}
        write_json(options.out, {"architectures": order, "versions": versions, "threads": torch.get_num_threads()})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
