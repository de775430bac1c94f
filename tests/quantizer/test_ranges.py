"""Range estimators against numpy, closed forms and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import qatana as qt
from qatana.errors import DataError
from qatana.numerics import Scheme, levels, scale_and_zero_point
from qatana.quantizer import Range, tensor_range, weight_parameters
from qatana.quantizer.ranges import BINS, MOMENTUM, PERCENTILE


def activation(range: str, symmetric: bool = False) -> Scheme:
    return qt.scheme("uint8", symmetric=symmetric, range=range)  # type: ignore[arg-type]


def watched(scheme: Scheme, batches: list[Tensor]) -> Range:
    found = Range(scheme, ())
    for batch in batches:
        found.update(batch, "x")
    return found


def test_minmax() -> None:
    batches = [torch.randn(3, 50) * k for k in (1, 4, 2)]
    found = watched(activation("minmax"), batches)
    array = torch.stack(batches).numpy()
    assert (float(found.low), float(found.high), int(found.count)) == (array.min(), array.max(), 3)
    scale, zero = found.parameters_of()
    assert float(scale) == (array.max() - array.min()) / np.float32(255)
    assert float(zero) == np.clip(np.rint(-array.min() / np.float32(scale)), 0, 255)


def test_moving_average() -> None:
    batches = [torch.randn(100) * k for k in (1, 4, 2, 3)]
    found = watched(activation("moving_average"), batches)
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        low += MOMENTUM * (float(batch.min()) - low)
        high += MOMENTUM * (float(batch.max()) - high)
    # three updates in float32: three roundings
    assert float(found.low) == pytest.approx(low, rel=3e-7)
    assert float(found.high) == pytest.approx(high, rel=3e-7)


@pytest.mark.parametrize("shape", ["normal", "relu", "outlier"])
def test_percentile_within_a_bin_of_numpy(shape: str) -> None:
    """A histogram knows a quantile to one bin: its edges are bin edges, and numpy's order statistic lies within the bin.

    190,000 elements leave 9.5 out at either end, so that both mean the 10th; between two order statistics numpy would choose."""
    draw = np.random.default_rng(0).normal(0, 1, (4, 47_500)).astype(np.float32)
    x = {
        "normal": draw,
        "relu": np.maximum(draw, 0),
        "outlier": np.where(np.arange(47_500) == 7, np.float32(60), draw),
    }[shape]
    found = watched(activation("percentile"), [torch.from_numpy(row) for row in x])
    tail = 100 * (1 - PERCENTILE) / 2
    low, high = np.percentile(x.astype(np.float64), [tail, 100 - tail], method="inverted_cdf")
    width = 2 * float(found.extent) / BINS
    scale, zero = (float(p) for p in found.parameters_of())
    # scale and zero point give the range back to half a scale: the zero point is an integer
    assert abs(-zero * scale - min(low, 0)) <= width + scale / 2
    assert abs((255 - zero) * scale - high) <= width + scale / 2
    assert abs(scale * 255 - (high - min(low, 0))) <= 2 * width
    if shape == "outlier":
        assert scale * 255 < 20


@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_against_brute_force(symmetric: bool) -> None:
    """No range on a finer grid of both ends' common shrinkage, on the data themselves, is better by more than the histogram blurs."""
    x = torch.from_numpy(np.random.default_rng(1).standard_t(3, 40_000).astype(np.float32))
    scheme = qt.scheme("int4" if symmetric else "uint4", symmetric=symmetric, range="mse")
    found = watched(scheme, list(x.split(10_000)))

    def error(scale: Tensor, zero: Tensor) -> float:
        return float((levels(x, scale, zero, scheme.format.lo, scheme.format.hi) * scale - x).double().square().mean())

    low, high = x.min(), x.max()
    shrinkages = np.arange(0.2, 1.0001, 0.01)
    errors = [error(*scale_and_zero_point(low * float(s), high * float(s), scheme)) for s in shrinkages]
    # bins of 2 * extent / 4096 against a scale of about range / 15: an element moves by less than 1 % of a scale
    assert error(*found.parameters_of()) <= min(errors) * 1.02
    assert error(*found.parameters_of()) < 0.9 * errors[-1]  # far better than min-max on heavy tails


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int8n", "int8"])
@pytest.mark.parametrize("text", ["tensor", "channel", "group16"])
@pytest.mark.parametrize("data", ["normal", "grid", "one-sided", "zeros"])
def test_weight_mse_is_never_worse_than_minmax(name: str, text: str, data: str) -> None:
    w = torch.randn(8, 64)
    hi = qt.scheme(name).format.hi
    if data == "grid":  # lies on min-max's own grid: error 0 there
        w = torch.randint(-hi, hi + 1, (8, 64)).float()
        w[:, ::16] = hi
    w = {"one-sided": w.abs(), "zeros": w * 0}.get(data, w)
    totals = []
    for kind in ("minmax", "mse"):
        scheme = qt.scheme(name, text, range=kind)  # type: ignore[arg-type]
        view, dims = scheme.granularity.view(w), scheme.granularity.reduced_dims(scheme.granularity.view(w).ndim)
        scale, zero = weight_parameters(w, scheme)
        assert scale.shape == scheme.granularity.scale_shape(w.shape)
        x_hat = levels(view, scale, zero, scheme.format.lo, scheme.format.hi) * scale
        totals.append((x_hat - view).double().square().sum(dims))
    # 1e-6: errors are compared in float32 sums inside, in float64 sums here
    assert bool((totals[1] <= totals[0] * (1 + 1e-6)).all())


def test_weight_mse_turns_the_sign_where_the_long_tail_is_positive() -> None:
    """int2 codes are -2 -1 0 1: w = [2, 1, 0, -1] fits exactly with scale -1, and with no positive scale."""
    w = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    scale, _ = weight_parameters(w, qt.scheme("int2", "channel", range="mse"))
    positive = min(
        float((torch.clamp(torch.round(w / s), -2, 1) * s - w).square().sum()) for s in torch.linspace(0.2, 3, 2000)
    )
    x_hat = torch.clamp(torch.round(w / scale), -2, 1) * scale
    assert float(scale) < 0
    assert float((x_hat - w).square().sum()) < positive


def test_doubling_keeps_counts() -> None:
    """Every element of every batch is counted, in the bin of the final histogram in which numpy puts it."""
    rng = np.random.default_rng(3)
    batches = [rng.normal(0, k, 5000).astype(np.float32) for k in (0.1, 1.0, 0.5, 30.0)]
    found = watched(activation("mse"), [torch.from_numpy(b) for b in batches])
    assert float(found.extent) == 2.0 ** np.ceil(np.log2(np.abs(np.concatenate(batches)).max()))
    expected, _ = np.histogram(
        np.concatenate(batches).astype(np.float64), BINS, (-float(found.extent), float(found.extent))
    )
    assert int(found.histogram.sum()) == 20_000
    # bins nest exactly when the extent doubles; only elements within a rounding of an edge may sit beside it
    assert np.abs(np.cumsum(found.histogram.numpy()) - np.cumsum(expected)).max() <= 2


def test_counts_of_large_tensors_do_not_saturate() -> None:
    """2^24 + 999 zeros, as behind a ReLU: float32 counters would stop at 2^24."""
    x = torch.zeros(2**24 + 1000)
    x[0] = 1
    assert int(watched(activation("percentile"), [x]).histogram.sum()) == x.numel()


def test_a_batch_of_zeros_alone() -> None:
    for kind in ("minmax", "moving_average", "percentile", "mse"):
        scale, zero = watched(activation(kind), [torch.zeros(10)]).parameters_of()
        assert float(scale) > 0
        assert float(zero) == 0


@pytest.mark.parametrize("range", ["minmax", "moving_average", "percentile", "mse"])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor([1.0, torch.nan]), "encoder.fc.input: NaN values"),
        (torch.tensor([1.0, torch.inf]), "encoder.fc.input: infinite values"),
        (torch.tensor([-torch.inf, 0.0]), "encoder.fc.input: infinite values"),
        (torch.empty(0, 3), r"encoder.fc.input: an empty tensor arrived during calibration \(shape \(0, 3\)\)"),
    ],
)
def test_bad_batches_name_the_tensor(range: str, batch: Tensor, message: str) -> None:
    found = Range(activation(range), ())
    with pytest.raises(DataError, match=message):
        found.update(batch, "encoder.fc.input")
    assert int(found.count) == 0  # and leave no trace


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_batches(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    found = watched(activation("mse"), [x])
    assert (found.low.dtype, float(found.high)) == (torch.float32, float(x.max()))
    assert int(found.histogram.sum()) == 1000


def test_tensor_range_per_channel() -> None:
    x = torch.randn(4, 3, 2)
    low, high = tensor_range(x, qt.scheme("int8", "channel1"))
    assert np.array_equal(low.numpy(), x.numpy().min((0, 2), keepdims=True))
    assert np.array_equal(high.numpy(), x.numpy().max((0, 2), keepdims=True))
