"""A whole job on a tiny BERT: what it writes, that it can be killed anywhere, and that finished stages are not done again."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.image_files import idx
from torch import nn

import qatana as qt
from qatana.files import write_json
from qatana.jobs import Progress, Run, job_of, load_job, run_job
from qatana.jobs.bench import latencies
from qatana.jobs.evaluate import FileRunner, Runner, TorchRunner
from qatana.jobs.stages import Stages

ROW = {
    "name", "engine", "f1", "file_bytes", "latency_ms", "speedup_vs_float_same_engine", "speedup_vs_torch_float",
}  # fmt: skip


def qatana(*arguments: Any, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-B", "-c", "from qatana.cli import app; app()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.engine
@pytest.mark.slow
def test_a_job_killed_after_training_goes_on_and_ends_as_if_it_had_not_been(tiny_file: Path, tmp_path: Path) -> None:
    """Law 5 for whole jobs: kill -9 behind the QAT stage; the rerun skips what is done; files are equal byte for byte."""
    whole = qatana("run", tiny_file, "--out", tmp_path / "whole")
    output, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    check_files(tmp_path / "whole")
    assert "done before" not in output

    killed = qatana("run", tiny_file)
    record = tmp_path / "run" / "stages" / "int8.qat.json"
    deadline = time.monotonic() + 300
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / "run" / "summary.json").exists()

    again = qatana("run", tiny_file)
    output, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    for stage in ("float model", "int8: calibrate (PTQ)", "int8: train (QAT)"):
        assert f"{stage}: done before, skipped" in output
    assert "int8: export: done before" not in output
    for name in ("int8.onnx", "float.onnx", "checkpoints/int8-qat.safetensors"):
        assert sha256(tmp_path / "run" / name) == sha256(tmp_path / "whole" / name), name
    scores = [[row["f1"] for row in summary(tmp_path / place)["rows"]] for place in ("run", "whole")]
    assert scores[0] == scores[1]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def check_files(folder: Path) -> None:
    """summary.json has the agreed form, and what it says holds of the files."""
    found = summary(folder)
    assert set(found) == {"rows", "parity", "drift", "labels", "seconds", "made", "machine", "versions"}
    assert set(found["machine"]) == {"processor", "isa", "threads"}
    assert found["versions"]["torch"] == version("torch")
    assert set(found["seconds"]) == {"float", "ptq", "qat", "export", "verify"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    for phase in ("ptq", "qat"):  # of all recipes, and of each: rounded to hundredths
        alone = [seconds for name, seconds in found["made"].items() if name.endswith(phase)]
        assert sum(alone) == pytest.approx(found["seconds"][phase], abs=0.01 * (1 + len(alone)))
    rows = {(row["name"], row["engine"]): row for row in found["rows"]}
    assert set(rows) == {
        ("float", "torch"), ("float", "onnxruntime"),
        ("int8-ptq", "torch"), ("int8-qat", "torch"), ("int8-qat", "onnxruntime"),
    }  # fmt: skip
    for row in rows.values():
        assert set(row) == ROW
        assert 0 <= row["f1"] <= 100
        float_row = rows["float", row["engine"]]
        assert row["speedup_vs_float_same_engine"] == pytest.approx(
            float_row["latency_ms"] / row["latency_ms"],
            rel=1e-2,  # both are rounded to 4 digits behind the point
        )
    assert rows["int8-qat", "onnxruntime"]["file_bytes"] == (folder / "int8.onnx").stat().st_size
    assert rows["float", "onnxruntime"]["file_bytes"] == (folder / "float.onnx").stat().st_size
    words = sum(bool(line.strip()) and "DOCSTART" not in line for line in (sentences_of(folder)).splitlines())
    assert found["parity"]["labels_compared"] == words
    assert found["parity"]["codes_different"] == 0
    assert found["labels"]["int8-qat onnxruntime"]["compared"] == words
    assert found["drift"]["codes_compared"] > 0
    certificate = json.loads((folder / "certificate.json").read_text())
    assert [entry["variant"] for entry in certificate["certificates"]] == ["int8"]
    compared = [entry["parity"]["codes_compared"] for entry in certificate["certificates"]]
    assert found["parity"]["codes_compared"] == sum(compared) > 0
    assert (folder / "report.html").read_text().lower().startswith("<!doctype html>")
    assert not list((folder / ".work").glob("*"))


def sentences_of(folder: Path) -> str:
    job = json.loads((folder / "job.json").read_text())
    return Path(job["data"]["test"]).read_text()


# --- stages -------------------------------------------------------------------------------------------------------


def test_a_stage_runs_again_when_what_it_was_made_from_changes(tmp_path: Path) -> None:
    calls: list[str] = []

    def stages(restart: bool = False) -> Stages:
        return Stages(tmp_path, Progress(), restart=restart)

    def work(scratch: Path) -> Any:
        calls.append(scratch.name)
        write_json(tmp_path / "out.json", {"a": 1})
        return {"value": len(calls)}

    def once(value: int, restart: bool = False) -> Any:
        return stages(restart).run("one", {"value": value}, work, ["out.json"])

    assert (once(1).skipped, once(1).skipped, once(1).result) == (False, True, {"value": 1})
    assert once(2).skipped is False  # other inputs
    assert once(2, restart=True).skipped is False
    (tmp_path / "out.json").write_text("changed in size")
    assert once(2).skipped is False  # its file is not what it wrote
    (tmp_path / "stages" / "one.json").write_text('{"fingerprint"')
    assert once(2).skipped is False  # its record is not whole
    first, second = (stages().run("one", {"value": n}, work, ["out.json"]) for n in (2, 3))
    then = [stages().run("two", {"one": record}, lambda scratch: None) for record in (first, second, second)]
    assert [record.skipped for record in then] == [False, False, True]  # follows what came before


def test_a_stage_that_fails_is_not_done(tmp_path: Path) -> None:
    def fail(scratch: Path) -> Any:
        raise qt.DataError("no data")

    stages = Stages(tmp_path, Progress())
    stages.run("one", {}, lambda scratch: 1)
    with pytest.raises(qt.DataError):
        Stages(tmp_path, Progress(), restart=True).run("one", {}, fail)
    assert Stages(tmp_path, Progress()).run("one", {}, lambda scratch: 2).result == 2


def test_judging_on_another_part_of_the_test_data_trains_nothing_again(tmp_path: Path) -> None:
    job = image_job(tmp_path)
    folder, section = tmp_path / "run", job.recipes[0]

    def judged(limit: int) -> tuple[bool, bool, int]:
        other = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"limit": limit})})
        run = Run(other, folder, 0, Progress())
        model = run.ptq(section)
        found = run.evaluate("float", "torch", run.float_(), lambda: TorchRunner(run.float_model()))
        return model.skipped, found.skipped, found.result["rows"]

    assert judged(12) == (False, False, 12)
    assert judged(20) == (True, False, 20)
    assert judged(20) == (True, True, 20)


# --- single stages, text and image tasks --------------------------------------------------------------------------


def test_plan_needs_no_trained_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    run = Run(job_of(tiny), tmp_path, 0, Progress())
    made = run.plan(run.job.recipes[0])
    assert made.recipe.target == "ort:int8"
    assert list(tmp_path.iterdir()) == []


def test_a_saved_qat_state_is_the_model_that_was_calibrated(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Loaded from its file, the PTQ model gives the same bits as the one calibrated here from the same float model."""
    run = Run(job_of(tiny), tmp_path, 0, Progress())
    section = run.job.recipes[0]
    run.ptq(section)
    model = run.float_model()
    model = qt.prepare(model, qt.plan(model, "ort:int8", run.task.sample(2, 16)))
    loader = run.task.calibration(section.calibration.batch_size, run.seed)
    qt.calibrate(model, loader, batches=section.calibration.batches)
    batch = run.task.sample(4, 32)
    assert torch.equal(TorchRunner(run.model(section, "ptq"))(batch), TorchRunner(model)(batch))


@pytest.mark.engine
def test_the_float_file_computes_the_float_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    run = Run(job_of(tiny), tmp_path, 0, Progress())
    run.float_file()
    batch = run.task.sample(3, 40)
    expected = TorchRunner(run.float_model())(batch)
    found = FileRunner(tmp_path / "float.onnx", "onnxruntime")(batch)
    # float32 sums in another order: a few units in the last place of values of order 1, through two layers
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_text_classification(tiny: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    """Two words that decide the class are learnt in a few steps; labels come back in the order of the file."""
    lines = [f"this film is {'good' if i % 2 else 'bad'} number {i},{'pos' if i % 2 else 'neg'}" for i in range(300)]
    (tmp_path / "texts.csv").write_text("\n".join(["text,label", *lines]))
    training = {"steps": 60, "lr": 3e-3, "checkpoint_every": 0}
    job = tiny | {
        "task": "text-classification",
        "data": {"csv": str(tmp_path / "texts.csv")},
        "float": {"training": training, "batch_size": 32},
    }
    run = Run(job_of(job), tmp_path / "run", 0, Progress())
    record = run.evaluate("float", "torch", run.float_(), lambda: TorchRunner(run.float_model()))
    assert record.result["value"] == 100.0
    assert record.result["rows"] == len(run.task.test_data)  # type: ignore[attr-defined]


def test_images_with_weights_that_were_trained_elsewhere(tmp_path: Path) -> None:
    """A network in a file, its weights in safetensors, images in a folder: float accuracy equals a loop of our own."""
    job = image_job(tmp_path)
    run = Run(job, tmp_path / "run", 0, Progress())
    record = run.evaluate("float", "torch", run.float_(), lambda: TorchRunner(run.float_model()))
    model = run.float_model()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in run.task.test(7))
    assert record.result == {"value": 100 * hits / 20, "rows": 20}
    run.ptq(job.recipes[0])
    kinds = {type(m).__name__ for m in run.model(job.recipes[0], "ptq").modules()}
    assert "Conv" in kinds


def image_job(folder: Path) -> Any:
    """20 + 20 random 8x8 images of 3 classes as IDX files, and a convolution network beside them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    data = folder / "images"
    data.mkdir()
    for part in ("train", "t10k"):
        images = torch.randint(0, 256, (20, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.arange(20, dtype=torch.uint8) % 3
        for tensor, kind in ((images, "images-idx3-ubyte"), (labels, "labels-idx1-ubyte")):
            (data / f"{part}-{kind}").write_bytes(idx(tensor.numpy()))
    (folder / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))\n"
    )
    from qatana.jobs.models import network

    torch.manual_seed(1)
    state = network("net.py:net", str(folder / "net.py"), {}).state_dict()
    save_file(state, folder / "net.safetensors")
    job = {
        "task": "image-classification",
        "model": "net.py:net",
        "data": {"source": str(data)},
        "float": {"weights": "net.safetensors"},
        "recipes": [{"name": "int8", "recipe": "ort:int8", "calibration": {"batches": 2, "batch_size": 10}}],
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return load_job(folder / "job.yaml")


# --- latency, several seeds ---------------------------------------------------------------------------------------


class Sleeper(Runner):
    """Takes a known time."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def __call__(self, batch: Any) -> torch.Tensor:
        time.sleep(self.milliseconds / 1e3)
        return torch.zeros(1)


def test_latencies_are_medians_in_milliseconds() -> None:
    found = latencies({"slow": Sleeper(20), "fast": Sleeper(5)}, None, 5, Progress())
    assert 20 <= found["slow"] < 40  # a sleep is never shorter; a busy machine can make it longer
    assert 5 <= found["fast"] < 20


@pytest.mark.engine
@pytest.mark.slow
def test_several_seeds_give_mean_and_spread(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"seeds": [0, 1], "float": {"training": {"steps": 30, "lr": 5e-3, "checkpoint_every": 0}}}
    tiny["recipes"][0].pop("training")  # PTQ alone
    outcome = run_job(job_of(tiny), tmp_path)
    found = summary(tmp_path)
    assert found["seeds"] == [0, 1]
    for number, row in enumerate(found["rows"]):
        values = [result.rows[number]["f1"] for result in outcome.results]
        assert row["f1"] == pytest.approx(sum(values) / 2)
        # standard deviation of two values: half their distance times the square root of two
        assert found["spread"][f"{row['name']} {row['engine']}"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "seed-0",
        "seed-1",
        "summary.json",
        "report.html",
        "certificate.json",
    }


@pytest.mark.slow
@pytest.mark.engine
def test_ptq_deploys_every_recipe_beside_what_is_trained(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Static, dynamic and in blocks, in one call; the files are those of the PTQ phase, and no QAT stage runs."""
    names = {"int8": "ort:int8", "dynamic": "ort:int8-dynamic", "int4": "ort:int4"}
    section = tiny["recipes"][0]
    job = job_of(tiny | {"recipes": [section | {"name": n, "recipe": r} for n, r in names.items()]})
    outcome = run_job(job, tmp_path, ptq=True)
    assert outcome.failures == []
    assert {p.name for p in tmp_path.glob("*.onnx")} == {"float.onnx", *(f"{name}-ptq.onnx" for name in names)}
    assert {row["name"] for row in summary(tmp_path / "ptq")["rows"]} == {"float", *(f"{name}-ptq" for name in names)}
    assert not list((tmp_path / "stages").glob("*.qat.json"))
    assert not (tmp_path / "summary.json").exists()


def test_ptq_in_python() -> None:
    """The model that plan, prepare and calibrate give, on the batches of an iterator that runs once."""
    float_model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [torch.randn(4, 8) for _ in range(3)]
    made = qt.ptq(copy.deepcopy(float_model), "ort:int8-dynamic", iter(batches))
    by_hand = qt.calibrate(qt.prepare(float_model, qt.plan(float_model, "ort:int8-dynamic", batches[0])), batches)
    assert torch.equal(made(batches[0]), by_hand(batches[0]))
    assert all(quantizer.enabled for quantizer in qt.quantizers(made).values())
    with pytest.raises(qt.DataError, match="no batch"):
        qt.ptq(nn.Sequential(nn.Linear(8, 8)), "ort:int8-dynamic", [])
