"""`accelerate launch` of a Trainer in two processes: one model comes out, and its ranges have seen the data of both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.launched_training import BATCH, FROZEN_AT, STEPS
from support.pretrained import write_bert
from transformers import AutoModelForTokenClassification

TESTS = Path(__file__).resolve().parents[1]
# On a machine without GPUs "multi_gpu" is two processes over gloo; "--cpu" would be one.
LAUNCH = (
    "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--num_cpu_threads_per_process", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    write_bert(tmp_path / "bert")
    (tmp_path / "out").mkdir()
    script = ("--module", "support.launched_training", str(tmp_path / "bert"), str(tmp_path / "out"))
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCH, *script], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    left, right = (load_file(tmp_path / "out" / f"{rank}.safetensors") for rank in (0, 1))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    start = AutoModelForTokenClassification.from_pretrained(tmp_path / "bert")
    weight = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(left[weight], start.get_parameter(weight))
    ids = torch.stack([load_file(tmp_path / "out" / f"{rank}-ids.safetensors")["ids"] for rank in (0, 1)], 1)
    assert ids.shape[:3] == (STEPS, 2, BATCH)
    assert ids.flatten(0, 2).unique(dim=0).shape[0] == STEPS * 2 * BATCH  # no row went to both
    low, high = followed(start, ids[:FROZEN_AT])
    name = "bert.encoder.layer.0.attention.self.query.input_quantizer.range"
    torch.testing.assert_close(left[f"{name}.low"], low, rtol=1e-6, atol=0)  # float32: a few roundings of 6e-8
    torch.testing.assert_close(left[f"{name}.high"], high, rtol=1e-6, atol=0)
    assert int(left[f"{name}.count"]) == FROZEN_AT


@torch.no_grad()
def followed(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The moving average of what enters the first layer: the ends of each step's rows of both processes, a twentieth of the way."""
    ends = [model.bert.embeddings(step.flatten(0, 1)).aminmax() for step in ids]  # type: ignore[operator,union-attr]
    low, high = ends[0]
    for step in ends[1:]:
        low, high = low.lerp(step.min, 0.05), high.lerp(step.max, 0.05)
    return low, high
