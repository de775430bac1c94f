"""What the command line is tried on: a small network in a file, its artifact, and the tiny job of tests/jobs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import qatana as qt

_JOBS = importlib.util.spec_from_file_location("tiny_job", Path(__file__).parents[1] / "jobs" / "conftest.py")
assert _JOBS is not None
assert _JOBS.loader is not None
_tiny = importlib.util.module_from_spec(_JOBS)
_JOBS.loader.exec_module(_tiny)
tiny_model, sentences, tiny, tiny_file = _tiny.tiny_model, _tiny.sentences, _tiny.tiny, _tiny.tiny_file

NETWORKS = """
import torch
from torch import nn

def good():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))

def broken():
    model = good()
    model[2].weight.data[1, 2, 0, 0] = float("nan")
    return model

def nothing():
    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

def crooked():
    return nn.Sequential(nn.Linear(40, 8), nn.ReLU())
"""


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with networks: good, broken (a NaN weight), nothing (to quantize), crooked (40 inputs: no multiple of 32)."""
    path = tmp_path_factory.mktemp("networks") / "networks.py"
    path.write_text(NETWORKS)
    return path


@pytest.fixture(scope="session")
def made(networks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `artifact` and `model.onnx` of the good network."""
    from qatana.jobs.models import network

    folder = tmp_path_factory.mktemp("made")
    model = network(f"{networks}:good", str(networks), {}).eval()
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    model = qt.prepare(model, qt.plan(model, "ort:int8", batches[0]))
    qt.calibrate(model, batches)
    artifact = qt.convert(model)
    artifact.save(folder / "artifact")
    qt.export(artifact, folder / "model.onnx")
    return folder
