"""GPTQ's rounding against the recursion that it makes fast: one column at a time, the inverse of H worked out anew in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatana.errors import DataError
from qatana.numerics import Scheme, scheme
from qatana.numerics.compensated import EDGE, compensated, unrounded
from qatana.quantizer.ranges import weight_parameters


def problem(rows: int, columns: int, samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(samples, columns) @ torch.randn(
        columns, columns
    )  # correlated inputs: there is something to make up for
    return torch.randn(rows, columns), x.t() @ x


def plainly(w: Tensor, found: Scheme, scale: Tensor, zero: Tensor) -> Tensor:
    """Rounded to nearest."""
    view = found.granularity.view(w)
    codes = ((view / scale).round() + zero).clamp(found.integer.lo, found.integer.hi)
    return found.granularity.unview((codes - zero) * scale, w.shape)


def by_elimination(w: Tensor, s: Tensor, z: Tensor, lo: int, hi: int, h: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization (Frantar and Alistarh 2022, eq. 2) in the order of H's diagonal: after a column is rounded, the others
    take the step that is best for them, and H loses that row and column."""
    w, s, z, h = w.double(), s.double(), z.double(), h.double()
    h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    left, out = h.diagonal().argsort(descending=True, stable=True).tolist(), torch.zeros_like(w)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        code = (
            torch.round((w[:, j] / s[:, j]).float()).double() + z[:, j]
        )  # the quotient is rounded to float32, as everywhere
        out[:, j] = (code.clamp(lo, hi) - z[:, j]) * s[:, j]
        error = (w[:, j] - out[:, j]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return out


@pytest.mark.parametrize(
    "text", ["int4/group32 sym mse", "int3/channel", "uint4/group32 asym", "int8/tensor", "int4/block16x32"]
)
@pytest.mark.parametrize("samples", [16, 500])
def test_it_is_the_recursion_of_the_paper(text: str, samples: int) -> None:
    found, (w, h) = scheme(text), problem(16, 160, samples)
    scale, zero = weight_parameters(w, found)
    ours = compensated(w, found, scale, zero, h, 0.01)
    view = found.granularity.view(w)
    s, z = (found.granularity.unview(p.broadcast_to(view.shape), w.shape) for p in (scale, zero))
    reference = by_elimination(w, s, z, found.integer.lo, found.integer.hi, h, 0.01)
    # Float32 and float64 part ways where a quotient lies at a tie; what follows in that row then differs, for good reason.
    same = (ours.double() - reference).abs().amax(1) < 1e-5
    assert int(same.sum()) >= 14
    assert torch.equal(plainly(ours, found, scale, zero), ours), "every value is on the grid"


def test_outputs_change_less_than_by_plain_rounding() -> None:
    """Inputs that lie near 64 of 256 directions, as real activations do."""
    found, (w, _) = scheme("int4/group32 sym mse"), problem(64, 256, 1)
    x = torch.randn(2000, 64) @ torch.randn(64, 256) + 0.1 * torch.randn(2000, 256)
    h = x.t() @ x
    scale, zero = weight_parameters(w, found)

    def error(x: Tensor) -> float:
        return float((((w - x) @ h) * (w - x)).sum())

    assert error(compensated(w, found, scale, zero, h, 0.01)) < error(plainly(w, found, scale, zero)) / 2


@pytest.mark.parametrize("text", ["int4/group32 sym mse", "uint4/group32 asym", "int3/channel"])
def test_sweeps_end_where_no_single_code_makes_outputs_better(text: str) -> None:
    """160 columns are two blocks. What every other code of every weight would do to the sum, in closed form and float64:
    with d the change of one weight,  sum + d^2 H_jj - 2 d ((W - W_hat) H)_j."""
    found, (w, h) = scheme(text), problem(16, 160, 500)
    scale, zero = weight_parameters(w, found)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(160, dtype=torch.float64)
    view = found.granularity.view(w)
    s, z = (found.granularity.unview(p.broadcast_to(view.shape), w.shape).double() for p in (scale, zero))

    def cost(out: Tensor) -> float:
        return float((((w - out).double() @ damped) * (w - out).double()).sum())

    def gain(out: Tensor) -> float:
        """The most that one code's change saves."""
        left, codes = (w - out).double() @ damped, (out / s + z).round()
        others = torch.arange(found.integer.lo, found.integer.hi + 1).view(-1, 1, 1)
        d = (others - codes) * s
        return float((2 * d * left - d.square() * damped.diagonal()).max())

    costs = []
    for sweeps in (0, 1, 3, 30):
        out = compensated(w, found, scale, zero, h, 0.01, sweeps)
        assert torch.equal(plainly(out, found, scale, zero), out), "every value is on the grid"
        costs.append(cost(out))
        best = gain(out)
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.97 * costs[0]
    assert gain(compensated(w, found, scale, zero, h, 0.01)) > 1e-3 * costs[-1], "GPTQ alone leaves something"
    assert best < 1e-6 * costs[-1]  # nothing but float32's rounding of what is left, W - W_hat


@pytest.mark.parametrize("text", ["int4/group32 sym mse", "uint4/group32 asym", "int3/channel"])
def test_unrounded_is_best_while_the_others_stay(text: str) -> None:
    """The sum's derivative by one weight, with that weight there and all others on their codes, is 0:  d/dx_j = 2 (x - w) H e_j."""
    found, (w, h) = scheme(text), problem(16, 160, 500)
    scale, zero = weight_parameters(w, found)
    best = compensated(w, found, scale, zero, h, 0.01, 3)
    start = unrounded(w, best, found, scale, zero, h, 0.01)
    assert torch.equal(plainly(start, found, scale, zero), best)
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(160, dtype=torch.float64)
    view = found.granularity.view(w)
    s = found.granularity.unview(scale.broadcast_to(view.shape), w.shape).abs()
    away = (start - best).abs() / s
    assert float(away.max()) <= EDGE + 1e-5
    slope = (best - w).double() @ damped + (start - best).double() * damped.diagonal()
    free = away < EDGE - 1e-4
    assert 0.9 < float(free.float().mean()) < 1
    size = (s.double() * damped.diagonal()).broadcast_to(slope.shape)
    assert float((slope / size).abs()[free].max()) < 1e-4  # float32 sums of 160 products, in codes


def test_inputs_that_say_nothing() -> None:
    """Uncorrelated inputs leave nothing to make up for: plain rounding. So do inputs that are all 0, or of which one is."""
    found, (w, _) = scheme("int4/group32 sym"), problem(8, 64, 10)
    some = torch.eye(64)
    some[3, 3] = 0.0
    for h in (torch.eye(64), torch.zeros(64, 64), some):
        scale, zero = weight_parameters(w, found)
        assert torch.equal(compensated(w, found, scale, zero, h, 0.01), plainly(w, found, scale, zero))


def test_one_sample_has_no_inverse_without_damping() -> None:
    found, (w, h) = scheme("int4/group32 sym"), problem(8, 64, 1)
    assert bool(compensated(w, found, *weight_parameters(w, found), h * 1e6, 0.01).isfinite().all())


def test_inputs_that_are_not_finite() -> None:
    found, (w, h) = scheme("int4/group32 sym"), problem(8, 64, 10)
    h[2, 5] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite values"):
        compensated(w, found, *weight_parameters(w, found), h, 0.01)
