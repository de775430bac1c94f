"""Law 5: a training that was killed and resumed ends with the bits of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qatana.errors import ArtifactError
from qatana.train import History, Training, TrainingError, fit


class Killed(Exception):
    """Stands for what ends a process between two steps."""


def killer(step: int) -> Callable[[dict[str, Any]], None]:
    def on_step(record: dict[str, Any]) -> None:
        if record["step"] == step:
            raise Killed

    return on_step


class Noisy:
    """Batches with noise from all three generators, as augmentation draws it; shuffled by (seed, epoch)."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, n: int):
        for i in torch.randperm(len(self), generator=torch.Generator().manual_seed(n)).tolist():
            x, y = self.batches[i]
            yield x + 0.1 * torch.randn_like(x) + 0.1 * random.gauss() + 0.1 * np.random.standard_normal(), y


def loaders(kind: str, batches: list[Any]) -> Any:
    if kind == "noisy":
        return Noisy(batches)
    if kind == "list":
        return batches
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


TWO_BITS = {"lr": 1e-3, "optimizer": "adamw", "clip": 0.5, "scale_lr": 1e-4}
CNN = {"lr": 1e-2, "optimizer": "sgd", "freeze_batch_norm_at": 8, "freeze_ranges_at": 11, "clip": None}


@pytest.mark.parametrize("kind", ["noisy", "list", "shuffled"])
@pytest.mark.parametrize("name", ["two_bits", "by codes", "cnn", "float start"])
def test_resumed_equals_uninterrupted(name, kind, cnn, two_bits, images, vectors, tmp_path) -> None:
    vector = name in ("two_bits", "by codes")
    make, batches = (two_bits, vectors) if vector else (cnn, images)
    fields: dict[str, Any] = TWO_BITS if vector else CNN
    fields = {**fields, "code_lr": 0.02} if name == "by codes" else fields
    fields = {**fields, "steps": 14, "sample_every": 3, "seed": 7} | (
        {"float_steps": 6} if name == "float start" else {}
    )

    whole = make(calibrated=name != "float start")
    expected = fit(whole, loaders(kind, batches), Training(**fields, checkpoint_every=0), checkpoint=tmp_path / "whole")

    training = Training(**fields, checkpoint_every=2)
    history = History()
    for kill_at in (3, 5, 9, 12, None):  # before, between and after the end of an epoch of 5 batches and each phase
        torch.manual_seed(random.SystemRandom().randrange(2**31))  # as in a new process
        np.random.seed(None)
        random.seed()
        model = make(calibrated=False)  # scales come from the checkpoint
        if not (tmp_path / "killed").exists():
            model = make(calibrated=name != "float start")
        try:
            history = fit(
                model, loaders(kind, batches), training, checkpoint=tmp_path / "killed",
                on_step=killer(kill_at) if kill_at else None,
            )  # fmt: skip
        except Killed:
            assert kill_at is not None
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    assert history.records == expected.records
    for file in ("model", "training"):  # optimizer and generators too
        a, b = (load_file(tmp_path / folder / f"{file}.safetensors") for folder in ("whole", "killed"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    states = [json.loads((tmp_path / folder / "state.json").read_text()) for folder in ("whole", "killed")]
    assert states[0] == states[1]


SCRIPT = """
import os, signal, sys, importlib.util
spec = importlib.util.spec_from_file_location("small", sys.argv[1])
small = importlib.util.module_from_spec(spec)
spec.loader.exec_module(small)
from qatana.train import Training, fit
def on_step(record):
    if record["step"] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
training = Training(steps=12, lr=1e-3, checkpoint_every=2)
fit(small.prepared_mlp(), small.vector_batches(), training, checkpoint=sys.argv[2], on_step=on_step)
"""


@pytest.mark.slow
def test_a_real_kill(two_bits, vectors, tmp_path) -> None:
    """SIGKILL after step 7 of another process, resumed by a third; the uninterrupted one runs here."""

    def process(die: int) -> int:
        small = Path(__file__).with_name("conftest.py")
        command = [sys.executable, "-c", SCRIPT, str(small), str(tmp_path / "killed"), str(die)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    fit(two_bits(), vectors, Training(steps=12, lr=1e-3, checkpoint_every=2), checkpoint=tmp_path / "whole")
    assert process(7) == -signal.SIGKILL
    assert json.loads((tmp_path / "killed" / "state.json").read_text())["step"] == 6
    assert process(0) == 0
    for file in ("model.safetensors", "training.safetensors", "state.json"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()


def test_a_finished_training_is_not_repeated(two_bits, vectors, tmp_path) -> None:
    training = Training(steps=3, lr=1e-3)
    first = two_bits()
    history = fit(first, vectors, training, checkpoint=tmp_path / "run")
    second, called = two_bits(), []
    again = fit(second, vectors, training, checkpoint=tmp_path / "run", on_step=called.append)
    assert called == []
    assert again == history
    assert torch.equal(first[0].weight, second[0].weight)


def test_only_plain_files(two_bits, vectors, tmp_path) -> None:
    fit(two_bits(), vectors, Training(steps=1, lr=1e-3), checkpoint=tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "model.safetensors",
        "state.json",
        "training.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_tied_parameters_are_written_once(tmp_path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
            self.head.weight = self.table.weight
            self.register_buffer("a", torch.zeros(4))
            self.register_buffer("b", self.a[:2])

        def forward(self, ids):
            return self.head(self.table(ids))

    batches = [(torch.arange(10), torch.arange(10))]
    first, second = Tied(), Tied()
    fit(first, batches, Training(steps=2, lr=1e-2), checkpoint=tmp_path / "run")
    fit(second, batches, Training(steps=2, lr=1e-2), checkpoint=tmp_path / "run")
    assert torch.equal(first.head.weight, second.head.weight)
    assert second.head.weight is second.table.weight
    assert "head.weight" not in load_file(tmp_path / "run" / "model.safetensors")


def test_interrupted_between_the_renames(two_bits, vectors, tmp_path) -> None:
    """A kill after the old folder was moved away and before the new one came: the old one is used."""
    training = Training(steps=4, lr=1e-3, checkpoint_every=2)
    with pytest.raises(Killed):
        fit(two_bits(), vectors, training, checkpoint=tmp_path / "run", on_step=killer(2))
    (tmp_path / "run").rename(tmp_path / ".run.old")
    steps: list[int] = []
    fit(two_bits(), vectors, training, checkpoint=tmp_path / "run", on_step=lambda r: steps.append(r["step"]))
    assert steps == [3, 4]
    assert not (tmp_path / ".run.old").exists()


def test_refuses_what_does_not_belong_together(two_bits, cnn, vectors, images, tmp_path) -> None:
    training = Training(steps=2, lr=1e-3)
    fit(two_bits(), vectors, training, checkpoint=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"training with lr=0\.001, this one has 0\.002"):
        fit(two_bits(), vectors, Training(steps=2, lr=2e-3), checkpoint=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"of another model: 'conv1\.weight' is missing there"):
        fit(cnn(), images, training, checkpoint=tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="holds files but no checkpoint"):
        fit(two_bits(), vectors, training, checkpoint=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "state.json"])
def test_truncated_files_are_named(file, two_bits, vectors, tmp_path) -> None:
    training = Training(steps=2, lr=1e-3)
    fit(two_bits(), vectors, training, checkpoint=tmp_path / "run")
    path = tmp_path / "run" / file
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=file):
        fit(two_bits(), vectors, training, checkpoint=tmp_path / "run")


def test_foreign_state(two_bits, vectors, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no checkpoint of qatana"):
        fit(two_bits(), vectors, Training(steps=2, lr=1e-3), checkpoint=tmp_path / "run")


def test_a_full_disk_keeps_the_old_checkpoint(two_bits, vectors, tmp_path, monkeypatch) -> None:
    training = Training(steps=6, lr=1e-3, checkpoint_every=2)
    with pytest.raises(Killed):
        fit(two_bits(), vectors, training, checkpoint=tmp_path / "run", on_step=killer(2))
    before = (tmp_path / "run" / "state.json").read_bytes()
    import qatana.train.checkpoint as module

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(ArtifactError, match="free some space"):
        fit(two_bits(), vectors, training, checkpoint=tmp_path / "run")
    assert (tmp_path / "run" / "state.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
