"""The commands that need no training: help with an example, plan, export and verify of an artifact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import qatana as qt
from qatana.cli import app

COMMANDS = (
    "plan",
    "calibrate",
    "train",
    "convert",
    "export",
    "verify",
    "report",
    "run",
    "ptq",
    "formats",
    "bench",
    "demo",
)


def qatana(*arguments: Any) -> str:
    """Output of a command that must succeed."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_help_names_every_command() -> None:
    text = qatana("--help")
    assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    text = " ".join(qatana(command, "--help").split())
    assert re.search(rf"Examples?: qatana {command}\b", text)


def test_version() -> None:
    assert qatana("--version").strip() == qt.__version__


def test_plan_has_a_row_per_tensor(networks: Path) -> None:
    lines = qatana("plan", "--model", f"{networks}:good", "--shape", "1,3,8,8", "--plain").splitlines()
    rows = {line.split("\t")[0]: line.split("\t") for line in lines}
    # 8-bit weights in 7 bits: 8 * 3 * 3 * 3 codes of one byte and 8 scales of four.
    assert rows["0.weight"][-1] == f"{8 * 27 + 4 * 8:,}"
    assert {"0.weight", "2.weight", "5.weight"} <= set(rows)


def test_export_writes_the_same_file_again(made: Path, tmp_path: Path) -> None:
    qatana("export", made / "artifact", tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (made / "model.onnx").read_bytes()


@pytest.mark.engine
def test_verify_passes_on_the_file_of_the_artifact(made: Path, tmp_path: Path) -> None:
    save_file({"input": torch.randn(4, 3, 8, 8)}, tmp_path / "data.safetensors")
    for options in ([], ["--data", tmp_path / "data.safetensors"]):
        assert "pass" in qatana("verify", made / "artifact", made / "model.onnx", *options)


@pytest.mark.engine
def test_verify_exits_1_when_an_integer_differs(made: Path, tmp_path: Path) -> None:
    """One weight code of one layer off by one: found, and its tensor named."""
    import numpy as np
    import onnx

    model = onnx.load(made / "model.onnx")
    name, codes = next(
        (t.name, onnx.numpy_helper.to_array(t).copy())
        for t in model.graph.initializer
        if t.data_type == onnx.TensorProto.INT8
    )
    codes.flat[0] += np.int8(1 if codes.flat[0] < 0 else -1)
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(onnx.numpy_helper.from_array(codes, name))
    onnx.save(model, tmp_path / "changed.onnx")
    done = CliRunner().invoke(app, ["verify", str(made / "artifact"), str(tmp_path / "changed.onnx")])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "differ" in done.stderr
