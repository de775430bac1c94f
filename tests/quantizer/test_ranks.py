"""Calibration by two processes is calibration by one that saw both parts; so are ranges that follow a training."""

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
from qatana.quantizer.ranges import BINS


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
        leave()


def leave() -> None:
    """Ends a process's part. A worker of gloo that gives a tensor back while its interpreter ends aborts the process
    (pytorch/pytorch#179291): while this one waits at the barrier, the workers have their turn."""
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(folder: Path, parts: list[list[int]], range: str) -> None:
    mp.spawn(process, (free_port(), str(folder), parts, range), nprocs=len(parts))


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


# --- training -----------------------------------------------------------------------------------------------

# What each step gives each of two processes: its smallest and largest element. None: no batch reaches the layer.
STEPS = [((-1.0, 3.0), (-1.9, 1.9)), ((-4.0, 1.0), (-8.0, 0.5)), (None, (-1.0, 11.0))]


def batch(low: float, high: float) -> torch.Tensor:
    """(2, 16): each end once, and zeros."""
    return torch.cat([torch.tensor([low, high]), torch.zeros(30)]).reshape(2, 16)


def follow(rank: int, port: int, folder: str, range: str, world: int) -> None:
    """One process of a training in which float steps observe and two more follow; its state after each step."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    torch.manual_seed(0)
    recipe = qt.recipe("torch").rule("0", weight="int8", input={"format": "int8", "range": range})
    model = nn.Sequential(nn.Linear(16, 4))
    qt.prepare(model, qt.plan(model, recipe))
    controller = qt.Controller(model, 4, float_steps=1, freeze_ranges_at=3)
    for number, ends in enumerate(STEPS):
        mine = ends[rank]
        if mine is not None:
            model(batch(*mine))
        controller.step()
        save_file(model.state_dict(), f"{folder}/{rank}-{number}.safetensors")
    leave()


def states(folder: Path, range: str) -> list[dict[str, torch.Tensor]]:
    """The state after each step, which has to be that of both processes."""
    mp.spawn(follow, (free_port(), str(folder), range, 2), nprocs=2)
    found = [[load_file(folder / f"{rank}-{number}.safetensors") for number in (0, 1, 2)] for rank in (0, 1)]
    for left, right in zip(*found, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)
    return found[0]


@pytest.mark.slow
@pytest.mark.parametrize("range", ["minmax", "moving_average"])
def test_followed_ranges_are_those_of_the_batches_of_all(range: str, tmp_path: Path) -> None:
    """Step 1: the ends of both batches. Then minima and maxima, or a twentieth of the way to them; in step 3 to those of one process."""
    if range == "minmax":
        expected = [(-1.9, 3.0), (-8.0, 3.0), (-8.0, 11.0)]
    else:
        low, high = -1.9 + 0.05 * (-8 + 1.9), 3 + 0.05 * (1 - 3)
        expected = [(-1.9, 3.0), (low, high), (low + 0.05 * (-1 - low), high + 0.05 * (11 - high))]
    for number, (state, ends) in enumerate(zip(states(tmp_path, range), expected, strict=True)):
        found = (float(state["0.input_quantizer.range.low"]), float(state["0.input_quantizer.range.high"]))
        assert found == pytest.approx(ends, rel=1e-6), number  # float32: a few roundings of 6e-8
        assert int(state["0.input_quantizer.range.count"]) == number + 1
    # The scale was settled from the last range: symmetric int8, whose largest code is 127.
    assert float(state["0.input_quantizer.scale"]) == pytest.approx(max(-ends[0], ends[1]) / 127, rel=1e-6)


@pytest.mark.slow
def test_followed_histograms_are_the_means(tmp_path: Path) -> None:
    """30 zeros and two ends in each step's mean; what is older counts 0.95 as much a step later."""
    state = states(tmp_path, "mse")[2]
    counts, extent = state["0.input_quantizer.range.histogram"], float(state["0.input_quantizer.range.extent"])
    expected = torch.zeros(BINS, dtype=torch.float64)
    for age, step in zip((3, 2, 1), STEPS, strict=True):
        parts = [ends for ends in step if ends is not None]
        for ends in parts:
            for value in (*ends, *[0.0] * 30):
                expected[min(BINS - 1, int((value + extent) / (2 * extent) * BINS))] += 0.95**age / len(parts)
    assert extent == 16.0
    torch.testing.assert_close(counts, expected, rtol=1e-12, atol=0)  # float64: a few roundings
