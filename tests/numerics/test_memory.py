"""Peak memory of fake quantization: what torch's allocator hands out and takes back, in copies of the weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from qatana.numerics import Scheme, fake_quantize_by, fake_quantize_held, hold, quantize_by
from qatana.numerics.by_scheme import needs_mask
from qatana.report.formats import entries

SIDE = 2048
BYTES = 4 * SIDE * SIDE
TEMPORARY = 0.25
"""Pieces of 256 KB of a weight of 16 MB, 1/64 each, and as many of them as an equation has temporaries, up to eight."""
BLOCK = 5 * 4 / 16
"""Five float32 numbers per block while its parameters are solved for (range, scale, offset, encode and one temporary), in bytes per
element where blocks have 16."""

Result = TypeVar("Result")


def peak(function: Callable[[], Result]) -> tuple[float, float, Result]:
    """The most bytes that `function` held at a time, and those that it left, in copies."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = function()
    profiler = found.profiler
    assert profiler is not None
    now = most = 0
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / BYTES, now / BYTES, result


def by_blocks(s: Scheme) -> float:
    """What the parameters of the blocks may take, in copies."""
    return BLOCK / 4 * 16 / s.granularity.size if s.granularity.size else 0.0


@pytest.mark.slow
@pytest.mark.parametrize("s", [entry.scheme for entry in entries()], ids=str)
def test_own_and_held_parameters(s: Scheme) -> None:
    """Forward: the result, a byte per element where values clip. Backward: the gradient where there is a mask, else nothing at all."""
    x, upstream = torch.randn(SIDE, SIDE, requires_grad=True), torch.ones(SIDE, SIDE)
    held = hold(x, s) if s.holds else ()
    mask = 0.25 * needs_mask(s, not s.holds)
    most, left, y = peak(lambda: fake_quantize_held(x, s, held) if s.holds else fake_quantize_by(x, s))
    assert most <= 1 + mask + TEMPORARY + by_blocks(s) * (not s.holds)
    assert left <= 1 + mask + 2 / 64  # scalars, and tables of codebooks that the first call makes and keeps
    most, _, _ = peak(lambda: torch.autograd.grad(y, x, upstream))
    assert most <= (1 + TEMPORARY if mask else 0)


@pytest.mark.slow
@pytest.mark.parametrize("s", [entry.scheme for entry in entries() if entry.scheme.holds], ids=str)
def test_solving_for_held_parameters(s: Scheme) -> None:
    """Less than the weight itself: its errors for HQQ, whose mean decides; pieces and parameters for K-quants. Eight numbers per
    sub-block, twice while they are put together."""
    x = torch.randn(SIDE, SIDE)
    most, _, _ = peak(lambda: hold(x, s))
    assert most <= (s.rule == "hqq") + TEMPORARY + 2 * 8 / s.granularity.size


@pytest.mark.slow
@pytest.mark.parametrize(
    "s",
    [
        e.scheme.with_(scale="learned")
        for e in entries()
        if e.scheme.takes_scale and e.scheme.granularity.kind != "token"
    ],
    ids=str,
)
def test_learned_scales(s: Scheme) -> None:
    """Forward: the result alone, since x itself is saved. Backward: the gradient of x."""
    x, upstream = torch.randn(SIDE, SIDE, requires_grad=True), torch.ones(SIDE, SIDE)
    _, p = quantize_by(x, s.with_(scale="dynamic"))
    shape = s.granularity.scale_shape(x.shape)
    scale, offset = p.scale.reshape(shape).clone().requires_grad_(), p.offset.reshape(shape)
    del p
    most, left, y = peak(lambda: fake_quantize_by(x, s, scale, offset))
    assert most <= 1 + TEMPORARY + by_blocks(s)
    assert left <= 1 + 1 / 64
    most, _, _ = peak(lambda: torch.autograd.grad(y, (x, scale), upstream))
    assert most <= 1 + TEMPORARY + by_blocks(s)
