"""Range estimators: what calibration remembers of a tensor, as buffers of fixed shape, and the range that follows.

minmax          low = min over all batches, high = max over all batches
moving_average  low <- low + m * (batch low - low), high likewise; m = 0.05 and the first batch as it is
percentile      the interval that leaves (1 - p) / 2 of the elements out at either end, p = 0.9999, from a histogram
entropy         the range about 0 with the least Kullback-Leibler divergence between the histogram and its quantized form
mse             the range whose quantization error over the histogram (weights: over the tensor itself) is smallest

Estimators whose answer depends on the whole distribution keep a histogram of |bins| counts over a range that doubles
when data falls outside, so old counts move to coarser bins exactly (pairs of bins merge). For the same reason what two
processes saw can be put together: `Range.merge` equals having seen both (moving averages: their mean, weighted by batches)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qatana.errors import DataError
from qatana.numerics import IntFormat, Scheme
from qatana.numerics.parameters import scale_and_zero_point
from qatana.quantizer.entropy import best_window

BINS = 4096
MOMENTUM = 0.05
PERCENTILE = 0.9999
HISTOGRAMS = ("percentile", "mse", "entropy")


class Range(nn.Module):
    """Running minimum and maximum per scale, and a histogram where the scheme's estimator needs one.

    Buffers: low, high float32 of the scale's shape; count int64 (batches seen); histogram float64 (BINS,) over
    [-extent, extent] with extent a power of two (per-tensor percentile, mse and entropy only)."""

    low: Tensor
    high: Tensor
    count: Tensor
    histogram: Tensor
    extent: Tensor

    def __init__(self, scheme: Scheme, scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scheme = scheme
        self.register_buffer("low", torch.zeros(scale_shape))
        self.register_buffer("high", torch.zeros(scale_shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.has_histogram = scheme.range in HISTOGRAMS and scheme.granularity.kind == "tensor"
        if self.has_histogram:
            self.register_buffer("histogram", torch.zeros(BINS, dtype=torch.float64))
            self.register_buffer("extent", torch.zeros(()))

    @torch.no_grad()
    def update(self, x: Tensor, name: str) -> None:
        """Take one batch into account. Raises: DataError naming the tensor if it holds NaN or infinity, or is empty."""
        if x.numel() == 0:
            raise DataError(
                f"{name}: an empty tensor arrived during calibration (shape {tuple(x.shape)}); drop empty batches"
            )
        low, high = tensor_range(x, self.scheme)
        if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
            kind = "NaN" if bool(torch.isnan(x).any()) else "infinite"
            raise DataError(
                f"{name}: {kind} values arrived during calibration; check the batch and the layers before it"
            )
        if int(self.count) == 0:
            self.low.copy_(low)
            self.high.copy_(high)
        elif self.scheme.range == "moving_average":
            self.low.lerp_(low, MOMENTUM)
            self.high.lerp_(high, MOMENTUM)
        else:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        self.count += 1
        if self.has_histogram:
            self._add_to_histogram(x.detach().float())

    def _add_to_histogram(self, x: Tensor) -> None:
        bound = float(torch.maximum(self.high.abs(), self.low.abs()))
        if bound == 0.0:
            return
        if float(self.extent) == 0.0:
            self.extent.fill_(2.0 ** torch.tensor(bound).log2().ceil().item())
        self.widen(bound)
        extent = float(self.extent)
        for part in x.flatten().split(2**24):  # histc counts in float32: exact up to 2^24 elements at a time
            self.histogram += torch.histc(part, BINS, -extent, extent).to(self.histogram)

    def widen(self, extent: float) -> None:
        """Let the histogram reach to `extent` at least; one that is empty to just that."""
        if not float(self.extent):
            self.extent.fill_(extent)
        while float(self.extent) < extent:
            self._double_extent()

    def _double_extent(self) -> None:
        """Merge pairs of bins into the middle half of a histogram over twice the range."""
        self.histogram.copy_(_coarser(self.histogram))
        self.extent *= 2

    @torch.no_grad()
    def merge(self, other: Range) -> None:
        """Take in what another range of the same scheme has seen (another process, another part of the data)."""
        mine, theirs = int(self.count), int(other.count)
        if not theirs:
            return
        if not mine:
            self.load_state_dict(other.state_dict())
            return
        if self.scheme.range == "moving_average":
            self.low.lerp_(other.low, theirs / (mine + theirs))
            self.high.lerp_(other.high, theirs / (mine + theirs))
        else:
            self.low.copy_(torch.minimum(self.low, other.low))
            self.high.copy_(torch.maximum(self.high, other.high))
        self.count += other.count
        if self.has_histogram and float(other.extent):
            self._merge_histogram(other.histogram.clone(), float(other.extent))

    def _merge_histogram(self, counts: Tensor, extent: float) -> None:
        self.widen(extent)
        while extent < float(self.extent):
            counts, extent = _coarser(counts), extent * 2
        self.histogram += counts.to(self.histogram)

    def parameters_of(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the estimator gives for what it has seen."""
        if not self.has_histogram or float(self.extent) == 0.0:
            return scale_and_zero_point(self.low, self.high, self.scheme)
        edges = torch.linspace(-float(self.extent), float(self.extent), BINS + 1)
        centres = (edges[1:] + edges[:-1]) / 2
        if self.scheme.range == "percentile":
            low, high = _percentile(edges, self.histogram.cpu(), PERCENTILE)
            low, high = max(low, float(self.low)), min(high, float(self.high))
        elif self.scheme.range == "entropy":
            bound = best_window(self.histogram.cpu(), _levels(self.scheme)) * float(self.extent) * 2 / BINS
            low, high = max(-bound, float(self.low)), min(bound, float(self.high))
        else:
            low, high = self._smallest_error(centres)
        device = self.low.device
        return scale_and_zero_point(torch.tensor(low, device=device), torch.tensor(high, device=device), self.scheme)

    def _smallest_error(self, centres: Tensor) -> tuple[float, float]:
        counts, best = self.histogram.cpu(), (float("inf"), 0.0, 0.0)
        for step in range(100, 19, -1):
            low, high = float(self.low) * step / 100, float(self.high) * step / 100
            scale, zero = scale_and_zero_point(torch.tensor(low), torch.tensor(high), self.scheme)
            grid = self.scheme.grid
            error = (grid.apply(centres, grid.of(scale, zero))[0] - centres).double().square()
            best = min(best, (float((error * counts).sum()), low, high))
        return best[1], best[2]


def tensor_range(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest element per scale of the scheme, float32, shaped like the scale."""
    view = scheme.granularity.view(x.detach())
    dims = scheme.granularity.reduced_dims(view.ndim)
    if scheme.granularity.kind == "tensor":
        low, high = torch.aminmax(view)
        return low.float(), high.float()
    return view.amin(dims, keepdim=True).float(), view.amax(dims, keepdim=True).float()


def weight_parameters(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a weight from its own values.

    minmax: the range covers every element. mse: per scale, of `candidate_ranges` the one with the least squared error
    (min-max itself is one of them); for symmetric signed formats of at most 4 bits, whose codes are lopsided
    (-2 -1 0 1), each also with the sign of the scale turned, which costs nothing to store."""
    weight = weight.detach().float()
    low, high = tensor_range(weight, scheme)
    scale, zero = scale_and_zero_point(low, high, scheme)
    if scheme.range != "mse":
        return scale, zero
    view = scheme.granularity.view(weight)
    best_scale, best_zero, best = scale, zero, _squared_error(view, scale, zero, scheme)
    format = scheme.format
    lopsided = scheme.symmetric and isinstance(format, IntFormat) and format.bits <= 4 and not format.narrow
    for shrink in candidate_ranges(scheme):
        s, z = scale_and_zero_point(low * shrink, high * shrink, scheme)
        for candidate in (s, -s) if lopsided else (s,):
            error = _squared_error(view, candidate, z, scheme)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_zero = torch.where(better, candidate, best_scale), torch.where(better, z, best_zero)
    return best_scale, best_zero


def candidate_ranges(scheme: Scheme) -> list[float]:
    """Shares of the full range that `mse` tries: 24, evenly spaced from 1.0 (up to 3 bits: 1.6) down to 0.4."""
    widest = 1.6 if scheme.format.bits <= 3 else 1.0
    return [widest + (0.4 - widest) * step / 23 for step in range(24)]


def _squared_error(view: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Squared quantization error per scale, shaped like the scale."""
    dims = scheme.granularity.reduced_dims(view.ndim)
    x_hat, _ = scheme.grid.apply(view, scheme.grid.of(scale, zero_point))
    return x_hat.sub_(view).square_().sum(dims, keepdim=True).reshape(scale.shape)


def _coarser(counts: Tensor) -> Tensor:
    """The histogram over twice the range: pairs of bins merge into the middle half."""
    out = torch.zeros_like(counts)
    out[BINS // 4 : 3 * BINS // 4] = counts.view(-1, 2).sum(1)
    return out


def _levels(scheme: Scheme) -> int:
    """Numbers that the format has between its ends."""
    return 2**scheme.format.bits - 1 if scheme.symmetric else 2**scheme.format.bits


def _percentile(edges: Tensor, counts: Tensor, share: float) -> tuple[float, float]:
    cumulative = counts.cumsum(0) / counts.sum()
    tail = (1 - share) / 2
    low = int(torch.searchsorted(cumulative, torch.tensor(tail, dtype=torch.float64), right=True))
    high = int(torch.searchsorted(cumulative, torch.tensor(1 - tail, dtype=torch.float64)))
    return float(edges[low]), float(edges[min(high + 1, len(edges) - 1)])
