"""qatana bench: what it compares is all there, ratios are those of its figures, and what cannot run is a row with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import qatana as qt
from qatana.cli import app
from qatana.jobs.deployed import feeds


def bench(*arguments: Any) -> Any:
    done = CliRunner().invoke(app, ["bench", "--json", "--rounds", "2", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


@pytest.mark.slow
def test_steps_of_a_job(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Nothing is trained for it: the weights that the job starts from are as fast."""
    job = tmp_path / "tiny.yaml"
    job.write_text(yaml.safe_dump(tiny | {"output": str(tmp_path / "run")}), encoding="utf-8")
    found = bench(job, "--out", tmp_path / "steps.json")
    assert found == json.loads((tmp_path / "steps.json").read_text())
    names = ["float32", "bfloat16 autocast", "int8", "int8, bfloat16 gradients"]
    assert [row["name"] for row in found["rows"]] == names
    assert found["rows"][0]["ratio"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    for row in found["rows"]:
        ms = row["milliseconds"]
        assert 0 < ms["forward"] < ms["step"]
        assert row["saved_ratio"] == row["saved_bytes"] / found["rows"][0]["saved_bytes"]
    assert not (tmp_path / "run" / "float").exists()


@pytest.fixture(scope="module")
def files(made: Path, networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `made` with the float file of its network beside the integer one."""
    from qatana.jobs.models import network

    folder = tmp_path_factory.mktemp("files") / "made"
    shutil.copytree(made, folder)
    qt.export_float(network(f"{networks}:good", str(networks), {}), torch.randn(2, 3, 8, 8), folder / "float.onnx")
    return folder


@pytest.mark.engine
def test_files_beside_their_float_original(files: Path) -> None:
    found = bench("--engine", files / "model.onnx", "--batch", "2")
    rows = {(Path(row["file"]).name, row["engine"]): row for row in found["rows"]}
    assert set(rows) == {(f, e) for f in ("float.onnx", "model.onnx") for e in ("onnxruntime", "openvino")}
    for (file, _), row in rows.items():
        assert row["milliseconds"]["min"] <= row["milliseconds"]["median"] <= row["milliseconds"]["max"]
        assert (row["speedup"] is None) == (file == "float.onnx")
        # Two convolutions and a Linear, quantized with their inputs; the float file asks for no integers.
        assert row["asked"] == (0 if file == "float.onnx" else 3)
    assert rows["model.onnx", "onnxruntime"]["integer"] == 3
    assert rows["float.onnx", "onnxruntime"]["integer"] == 0


@pytest.mark.engine
def test_a_file_that_no_engine_loads_is_a_row_with_its_reason(files: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes((files / "model.onnx").read_bytes()[:1000])
    done = CliRunner().invoke(app, ["bench", "--engine", str(tmp_path / "broken.onnx"), "--rounds", "1"])
    assert done.exit_code == 0, done.output
    assert "cannot load" in done.output


@pytest.mark.engine
def test_feeds_fit_the_file(tmp_path: Path) -> None:
    """Tokens: batch and sequence are free. Images: the batch alone."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(input_ids))

    qt.export_float(Tokens().eval(), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, tmp_path / "tokens.onnx")
    (ids,) = feeds(tmp_path / "tokens.onnx", 4, 6).values()
    assert torch.equal(ids, torch.ones(4, 6, dtype=torch.int64))
    images = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 2)).eval()
    qt.export_float(images, torch.randn(2, 1, 8, 8), tmp_path / "images.onnx")
    (pixels,) = feeds(tmp_path / "images.onnx", 4, 6).values()
    assert pixels.shape == (4, 1, 8, 8)
    assert pixels.dtype is torch.float32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.onnx"], "qatana bench --engine"),
        (["a.yaml", "b.yaml"], "give one job file"),
        (["--engine", "missing.onnx"], "missing.onnx does not exist"),
    ],
)
def test_an_error_names_the_remedy(arguments: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr
