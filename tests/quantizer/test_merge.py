"""Ranges that two processes saw, put together; the entropy range against its closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from qatana.numerics import scheme
from qatana.quantizer.entropy import best_window, divergence
from qatana.quantizer.ranges import Range


@pytest.mark.parametrize("range", ["minmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_merging_is_having_seen_both(range: str, symmetric: bool, cut: int) -> None:
    s = scheme("int8" if symmetric else "uint8", symmetric=symmetric, range=range)  # type: ignore[arg-type]
    batches = [torch.randn(500) * 4.0**k + 0.3 for k in (0, 2, -1, 1, 3, 0)]
    whole, a, b = Range(s, ()), Range(s, ()), Range(s, ())
    for i, batch in enumerate(batches):
        whole.update(batch, "x")
        (a if i < cut else b).update(batch, "x")
    a.merge(b)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in a.state_dict().items() if k != "histogram")
    if a.has_histogram:
        # an element on the edge between two bins may have fallen to either, before bins were merged
        assert float((a.histogram - whole.histogram).abs().sum()) <= 2
    else:
        assert all(torch.equal(x, y) for x, y in zip(a.parameters_of(), whole.parameters_of(), strict=True))


def test_merging_moving_averages_weights_by_batches() -> None:
    s = scheme("int8", range="moving_average")
    a, b = Range(s, ()), Range(s, ())
    for _ in (1, 2, 3):
        a.update(torch.tensor([-1.0, 1.0]), "x")
    b.update(torch.tensor([-5.0, 3.0]), "x")
    a.merge(b)
    assert (float(a.low), float(a.high), int(a.count)) == (-2.0, 1.5, 4)


def test_divergence_is_its_closed_form() -> None:
    """Against scipy's entropy on the definition written out by loops."""
    rng = np.random.default_rng(0)
    counts = np.histogram(rng.standard_t(3, 20000), bins=256, range=(-20, 20))[0].astype(np.float64)
    for half, levels in ((128, 16), (64, 15), (40, 16), (24, 7)):
        inside = counts[128 - half : 128 + half]
        p = inside.copy()
        p[0] += counts[: 128 - half].sum()
        p[-1] += counts[128 + half :].sum()
        q = np.zeros_like(p)
        for level in range(levels):
            members = [i for i in range(2 * half) if i * levels // (2 * half) == level]
            filled = [i for i in members if inside[i] > 0]
            for i in filled:
                q[i] = inside[members].sum() / len(filled)
        q = np.maximum(q / q.sum(), 1e-10)
        unnormalized = entropy(p / p.sum(), q) - np.log(
            q.sum()
        )  # scipy normalizes q once more: that is log(sum q) too much
        # float64 sums of 256 terms in another order
        assert abs(divergence(torch.from_numpy(counts), half, levels) - unnormalized) < 1e-12


def test_entropy_clips_a_long_tail_and_keeps_a_short_one() -> None:
    s = scheme("int8", range="entropy")
    heavy, uniform = Range(s, ()), Range(s, ())
    heavy.update(torch.cat([torch.randn(100_000), torch.tensor([60.0])]), "x")
    uniform.update(torch.rand(100_000) * 2 - 1, "x")
    assert float(heavy.parameters_of()[0]) * 127 < 30
    assert float(uniform.parameters_of()[0]) * 127 > 0.95
    assert best_window(torch.ones(4096, dtype=torch.float64), 255) == 2048
