"""Calibration by two processes is calibration by one that saw both parts."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import nn

import qatana as qt
from qatana.errors import DataError


def model_and_batches(range: str) -> tuple[nn.Module, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    batches = [torch.randn(8, 16, generator=generator) * 2.0**k for k in (0, 3, 1, -1)]
    return qt.prepare(model, qt.plan(model, qt.recipe("ort:int8", input={"range": range}), batches[0])), batches


def process(rank: int, port: int, folder: str, parts: list[list[int]], range: str) -> None:
    """One of the processes: calibrates on its part and leaves its state."""
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(parts))
    model, batches = model_and_batches(range)
    try:
        qt.calibrate(model, [batches[i] for i in parts[rank]])
        save_file(model.state_dict(), f"{folder}/{rank}.safetensors")
    except DataError as error:
        Path(f"{folder}/{rank}.txt").write_text(str(error), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def run(folder: Path, parts: list[list[int]], range: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(process, (port, str(folder), parts, range), nprocs=len(parts))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[3, 0, 1, 2], []]], ids=str)
def test_two_processes_find_what_one_finds(parts: list[list[int]], tmp_path: Path) -> None:
    run(tmp_path, parts, "minmax")
    expected, batches = model_and_batches("minmax")
    qt.calibrate(expected, batches)
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert found.keys() == expected.state_dict().keys()
        assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


@pytest.mark.slow
def test_histograms_end_with_the_same_bits_everywhere(tmp_path: Path) -> None:
    run(tmp_path, [[0, 2], [1, 3]], "mse")
    left, right = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert int(left["0.input_quantizer.range.count"]) == 4


@pytest.mark.slow
def test_no_batch_anywhere_is_an_error_everywhere(tmp_path: Path) -> None:
    run(tmp_path, [[], []], "minmax")
    for rank in (0, 1):
        assert "yielded no batch" in (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
