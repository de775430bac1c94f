"""Bad input leaves one line on stderr that says what, where and what to do, exit code 2, and no half-written file (bar 7)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qatana as qt
from qatana.cli import app

Fails = Callable[..., str]


@pytest.fixture
def fails() -> Fails:
    """fails(*arguments) runs qatana, checks exit code 2 and a single `error:` line, and returns the line."""

    def run(*arguments: Any, code: int = 2) -> str:
        done = CliRunner().invoke(app, [str(a) for a in arguments])
        assert done.exit_code == code, done.output
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("error: ")
        assert "Traceback" not in done.output
        return lines[0]

    return run


def edited(job: dict[str, Any], path: Path, **changes: Any) -> Path:
    """The job with changes, as a file."""
    path.write_text(yaml.safe_dump(job | {"output": str(path.parent / "run")} | changes))
    return path


# --- recipes and job files ---------------------------------------------------------------------------------------


def test_unknown_target_names_the_nearest(fails: Fails, networks: Path) -> None:
    line = fails("plan", "--model", f"{networks}:good", "--target", "ort:in8")
    assert "unknown target 'ort:in8'; did you mean 'ort:int8'?" in line


@pytest.mark.parametrize(
    ("changes", "key", "place", "nearest"),
    [
        ({"recipies": []}, "recipies", "job", "recipes"),
        ({"data": {"train": "a.txt", "test": "b.txt", "maxlength": 9}}, "maxlength", "data", "max_length"),
        ({"float": {"trainig": {}}}, "trainig", "float", "training"),
        ({"float": {"training": {"stepps": 3, "lr": 1e-3}}}, "stepps", "training", "steps"),
        ({"evaluation": {"limitt": 3}}, "limitt", "evaluation", "limit"),
        ({"benchmark": {"round": 3}}, "round", "benchmark", "rounds"),
    ],
)
def test_unknown_key_in_a_job_names_place_and_nearest(
    fails: Fails, tiny: dict[str, Any], tmp_path: Path, changes: dict[str, Any], key: str, place: str, nearest: str
) -> None:
    line = fails("run", edited(tiny, tmp_path / "job.yaml", **changes))
    assert f"unknown key '{key}' in {place}" in line
    assert f"did you mean '{nearest}'?" in line
    assert not (tmp_path / "run").exists()


def test_unknown_key_in_a_recipe_of_a_job(fails: Fails, tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny["recipes"][0]["recipe"] = {"target": "ort:int8", "ruls": []}
    line = fails("run", edited(tiny, tmp_path / "job.yaml"))
    assert "unknown key 'ruls'" in line
    assert "did you mean 'rules'?" in line


def test_unknown_recipe_name_engine_and_task(fails: Fails, tiny: dict[str, Any], tmp_path: Path) -> None:
    path = edited(tiny, tmp_path / "job.yaml")
    assert "no recipe 'int9'; did you mean 'int8'?" in fails("calibrate", path, "--recipe", "int9")
    assert "did you mean 'openvino'?" in fails("run", edited(tiny, path, engines=["openvion"]))
    assert "'token-classification'" in fails("run", edited(tiny, path, task="token-clasification"))


def test_job_files_that_are_missing_or_no_yaml(fails: Fails, tmp_path: Path) -> None:
    assert "cannot read job file" in fails("run", tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "not valid JSON or YAML" in fails("run", tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "a job is a mapping" in fails("run", tmp_path / "list.yaml")


# --- models ------------------------------------------------------------------------------------------------------


def test_group_that_does_not_divide(fails: Fails, networks: Path) -> None:
    line = fails("plan", "--model", f"{networks}:crooked", "--target", "ort:int4", "--shape", "2,40")
    assert "0.weight" in line
    assert "32" in line
    assert "40" in line


def test_nan_weight_names_the_layer(fails: Fails, networks: Path) -> None:
    line = fails("plan", "--model", f"{networks}:broken", "--shape", "1,3,8,8")
    assert "'2.weight'" in line
    assert "NaN" in line


def test_model_without_a_quantizable_layer(fails: Fails, networks: Path) -> None:
    assert "no layer of Sequential can be quantized" in fails("plan", "--model", f"{networks}:nothing")


def test_models_that_do_not_exist(fails: Fails, networks: Path, tmp_path: Path) -> None:
    assert "did you mean 'good'?" in fails("plan", "--model", f"{networks}:goood")
    assert "does not exist" in fails("plan", "--model", f"{tmp_path}/none.py:net")
    line = fails("plan", "--model", "package:no_such_package_here/model")
    assert "pip install --no-deps no-such-package-here" in line
    (tmp_path / "empty").mkdir()
    assert "cannot load the model" in fails("plan", "--model", tmp_path / "empty")


def test_nan_weights_of_a_float_model(fails: Fails, tiny: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "nan-model")
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    tensors[name][3, 4] = float("inf")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    line = fails("calibrate", edited(tiny, tmp_path / "job.yaml", model=str(folder)))
    assert name in line
    assert "NaN or infinite" in line


# --- data --------------------------------------------------------------------------------------------------------


def test_empty_data(fails: Fails, tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    data = {"train": str(tmp_path / "empty.txt"), "test": str(tmp_path / "empty.txt")}
    assert "holds no sentence" in fails("calibrate", edited(tiny, tmp_path / "job.yaml", data=data))


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_nan_and_infinite_calibration_batches(value: float, word: str) -> None:
    """No file that the command line reads can hold one, so this is the library's error."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    batch = torch.randn(4, 8)
    model = qt.prepare(model, qt.plan(model, "ort:int8", batch))
    bad = batch.clone()
    bad[1, 2] = value
    with pytest.raises(qt.DataError, match=rf"batch 1: .*{word}") as caught:
        qt.calibrate(model, [batch, bad])
    assert caught.value.exit_code == 2
    with pytest.raises(qt.DataError, match="yielded no batch"):
        qt.calibrate(model, [])


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of artifact and file that a test may damage."""
    return shutil.copytree(made, tmp_path / "own")


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("name", ["config.json", "graph.json", "model.safetensors"])
def test_truncated_artifact(fails: Fails, own: Path, name: str) -> None:
    truncate(own / "artifact" / name)
    line = fails("export", own / "artifact", own / "new.onnx")
    assert name in line
    assert "truncated" in line
    assert not (own / "new.onnx").exists()


def test_folder_that_is_no_artifact(fails: Fails, own: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert "is not an artifact" in fails("export", tmp_path / "folder", own / "new.onnx")
    (own / "artifact" / "config.json").write_text("{}")
    assert "was not written by qatana" in fails("export", own / "artifact", own / "new.onnx")


def test_truncated_and_foreign_onnx(fails: Fails, own: Path) -> None:
    truncate(own / "model.onnx")
    assert "model.onnx" in fails("verify", own / "artifact", own / "model.onnx")
    (own / "model.onnx").write_bytes(b"not a model at all")
    assert "model.onnx" in fails("verify", own / "artifact", own / "model.onnx")
    assert "none.onnx" in fails("verify", own / "artifact", own / "none.onnx")
    assert "name the file" in fails("verify", own / "artifact")


def test_data_without_the_inputs_of_the_artifact(fails: Fails, own: Path) -> None:
    save_file({"inptu": torch.zeros(1, 3, 8, 8)}, own / "data.safetensors")
    line = fails("verify", own / "artifact", own / "model.onnx", "--data", own / "data.safetensors")
    assert "did you mean 'inptu'?" in line


def test_output_that_is_not_writable(fails: Fails, own: Path, tiny_file: Path) -> None:
    """Below a file: nobody can write there, not even root, to whom permissions mean nothing."""
    (own / "file").write_text("")
    assert "cannot write" in fails("export", own / "artifact", own / "file" / "new.onnx")
    assert "cannot write" in fails("run", tiny_file, "--out", own / "file" / "run")
    assert (own / "file").read_text() == ""


UNPRIVILEGED = """
import ctypes, sys
# Drop every capability: after that file permissions hold for root, too.
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, sets) == 0
from qatana.cli import app
app(sys.argv[1:])
"""


def test_output_without_permission(own: Path) -> None:
    (own / "locked").mkdir(mode=0o555)
    arguments = ["export", str(own / "artifact"), str(own / "locked" / "new.onnx")]
    command = [sys.executable, "-B", "-c", UNPRIVILEGED, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "choose a folder that you may write to" in done.stderr
    assert list((own / "locked").iterdir()) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))  # as on a full disk, write() fails half-way
from qatana.cli import app
app(sys.argv[2:])
"""


def limited(size: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """qatana in a process that cannot write files of more than `size` bytes."""
    command = [sys.executable, "-B", "-c", LIMITED, str(size), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_disk_full_during_export_keeps_the_old_file(own: Path) -> None:
    before = (own / "model.onnx").read_bytes()
    done = limited(1024, "export", own / "artifact", own / "model.onnx")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    assert "Traceback" not in done.stderr
    assert (own / "model.onnx").read_bytes() == before
    assert sorted(p.name for p in own.iterdir()) == ["artifact", "model.onnx"]


def test_disk_full_during_a_run_leaves_no_stage_half_done(tiny_file: Path, tmp_path: Path) -> None:
    """The tables of the float model are 4 MB: its stage fails, nothing of it stays, and the run can go on later."""
    done = limited(1 << 20, "calibrate", tiny_file)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: cannot write")
    left = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert left == []


# --- debug -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--debug", "plan"], ["plan", "--debug"]], ids=["before", "behind"])
def test_debug_shows_the_traceback_wherever_it_stands(networks: Path, arguments: list[str]) -> None:
    done = CliRunner().invoke(app, [*arguments, "--model", f"{networks}:nothing"])
    assert isinstance(done.exception, qt.ModelError)
    assert done.exc_info is not None


def test_a_fault_of_ours_is_one_line_too(fails: Fails, tmp_path: Path) -> None:
    path = tmp_path / "raises.py"
    path.write_text("def net():\n    raise ZeroDivisionError('one\\ntwo')\n")
    line = fails("plan", "--model", f"{path}:net")
    assert "ZeroDivisionError: one" in line
    assert "--debug" in line
