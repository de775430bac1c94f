"""What quantization does to each tensor of a QAT model, measured on data: the figures behind the report's layer table and histograms.

Per quantizer, with x the tensor in float where it is quantized and x_hat what it becomes:

    SQNR = 10 log10(sum x^2 / sum (x - x_hat)^2) dB
    saturation = share of values beyond the ends of the grid        zeros = share of levels that are 0

It is the error that this one quantizer adds, not what layers before it did. Batches are streamed: only sums and counts are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qatana.batch import evaluating, move, split_inputs
from qatana.errors import DataError, ModelError
from qatana.nn import SwappedLinear
from qatana.quantizer import Quantizer, quantizers
from qatana.report.data import Grid, LayerHistogram, LayerRow, Stage, StageHistogram

Role = Literal["weight", "input", "output"]
_OUTPUTS = {"output", "context"}


@torch.no_grad()
def measure(
    float_model: nn.Module | None,
    ptq_model: nn.Module,
    qat_model: nn.Module | None,
    batches: Iterable[Any],
    *,
    histograms: int | Iterable[str] = 6,
    bins: int = 96,
    variant: str = "",
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Measure every quantizer of a calibrated model and, beside it, of the trained one.

    float_model  its weights are the histograms' float stage (copy it before `prepare`, which shares parameters); None leaves it out
    qat_model    None: there is the PTQ stage alone
    histograms   how many tensors (those that calibration left with the lowest SQNR, half of them weights), or their names
    variant      name of this quantized model, where a report compares several
    Returns {"layers": [...], "histograms": [...]}: JSON, as ReportData takes them.
    Raises: ModelError if a model has no quantizers or one is not calibrated; DataError for no batch."""
    models: dict[Stage, nn.Module] = {"ptq": ptq_model} if qat_model is None else {"ptq": ptq_model, "qat": qat_model}
    gauges = {stage: _gauges_of(model, bins) for stage, model in models.items()}
    for stage, model in models.items():
        _measure_weights(float_model if stage == "ptq" else None, model, gauges[stage])
    _measure_activations([(model, gauges[stage]) for stage, model in models.items()], batches, progress)
    plan = next((model.qatana_plan for model in models.values() if hasattr(model, "qatana_plan")), None)
    sizes = {} if plan is None else {row.name: round(row.bytes) for row in plan.rows}  # type: ignore[union-attr]
    names = [name for name, gauge in gauges["ptq"].items() if gauge.count]
    rows = [_row({s: gauges[s][name] for s in models if name in gauges[s]}, sizes.get(name), variant) for name in names]
    drawn = [
        _histogram({s: gauges[s][name] for s in models if name in gauges[s]}, variant)
        for name in _chosen(gauges["ptq"], histograms)
    ]
    return {
        "layers": [json.loads(x.model_dump_json()) for x in rows],
        "histograms": [json.loads(x.model_dump_json()) for x in drawn],
    }


def _gauges_of(model: nn.Module, bins: int) -> dict[str, _Gauge]:
    found = quantizers(model)
    if not found:
        raise ModelError(
            "the model has no quantizers; measure takes models that qatana.prepare made and calibrate settled"
        )
    return {name: _Gauge(quantizer, bins) for name, quantizer in found.items()}


class _Gauge:
    """Sums and counts of one quantizer.   Histograms are of x / scale * (one typical scale), so that all channels share one grid."""

    def __init__(self, quantizer: Quantizer, bins: int) -> None:
        self.quantizer, self.bins = quantizer, bins
        self.signal = self.noise = 0.0
        self.count = self.clipped = self.zeros = 0
        self.edges: Tensor | None = None
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.float_counts: Tensor | None = None
        self.grid: Grid | None = None

    @property
    def bounded(self) -> bool:
        """Whether the range is known beforehand, so that values can lie beyond it."""
        return self.quantizer.has_levels and (self.quantizer.is_weight or self.quantizer.scheme.scale != "dynamic")

    @property
    def sqnr(self) -> float:
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def add(self, x: Tensor, levels: Tensor, scale: Tensor) -> None:
        """x (block view), its levels and scale, which broadcasts against them."""
        x = x.float()
        self.signal += float(x.double().square().sum())
        self.noise += float((x - levels * scale).double().square().sum())
        self.count += x.numel()
        self.zeros += int((levels == 0).sum())
        if self.bounded:
            steps = x / scale
            self.clipped += int((torch.round(steps) != levels).sum())
            self._bin(steps, scale)

    def _bin(self, steps: Tensor, scale: Tensor) -> None:
        if self.grid is None:
            self._lay_grid(steps, scale)
        assert self.grid is not None
        self.counts += self._counts(steps * self.grid.scale)

    def _lay_grid(self, steps: Tensor, scale: Tensor) -> None:
        scheme = self.quantizer.scheme
        zero = round(float(self.quantizer.zero_point.flatten()[0])) if self.quantizer.zero_point.numel() else 0
        self.grid = Grid(scale=float(scale.abs().median()), lo=scheme.integer.lo, hi=scheme.integer.hi, zero_point=zero)
        low = min(float(steps.min()), self.grid.lo - zero) - 0.5
        high = max(float(steps.max()), self.grid.hi - zero) + 0.5
        self.edges = torch.linspace(low, high, self.bins + 1, dtype=torch.float64) * self.grid.scale

    def _counts(self, values: Tensor) -> Tensor:
        """Counts per bin; what lies outside (later batches may) goes to the outer bins."""
        assert self.edges is not None
        place = torch.bucketize(values.flatten().double().cpu(), self.edges[1:-1], right=True)
        return torch.bincount(place, minlength=self.bins)

    def add_float(self, weight: Tensor, scale: Tensor) -> None:
        """The float model's weight, in the same units."""
        if self.grid is not None:
            self.float_counts = self._counts(weight.float() / scale * self.grid.scale)

    def stages(self, stage: Stage) -> list[StageHistogram]:
        """The float stage, if it was measured, and this one."""
        if self.edges is None:
            return []
        edges = self.edges.tolist()
        own = StageHistogram(stage=stage, edges=edges, counts=self.counts.tolist(), grid=self.grid)
        if self.float_counts is None:
            return [own]
        return [StageHistogram(stage="float", edges=edges, counts=self.float_counts.tolist()), own]


def _row(gauges: dict[Stage, _Gauge], size: int | None, variant: str) -> LayerRow:
    """Shares are those of the last stage."""
    last = list(gauges.values())[-1]
    scheme = last.quantizer.scheme
    sqnr = {stage: gauge.sqnr for stage, gauge in gauges.items() if gauge.count}
    return LayerRow(
        name=last.quantizer.name, role=_role(last.quantizer), scheme=str(scheme), bits=scheme.format.bits,
        sqnr_ptq=sqnr.get("ptq"), sqnr_qat=sqnr.get("qat"),
        saturation=last.clipped / last.count if last.bounded and last.count else None,
        zeros=last.zeros / last.count if last.count else None, bytes=size or None, variant=variant,
    )  # fmt: skip


def _histogram(gauges: dict[Stage, _Gauge], variant: str) -> LayerHistogram:
    first = next(iter(gauges.values())).quantizer
    stages = [part for stage, gauge in gauges.items() for part in gauge.stages(stage)]
    return LayerHistogram(layer=first.name, role=_role(first), stages=stages, variant=variant)


def _role(quantizer: Quantizer) -> Role:
    if quantizer.is_weight:
        return "weight"
    return "output" if quantizer.name.rpartition(".")[2] in _OUTPUTS else "input"


# -- weights -----------------------------------------------------------------------------------------------------------
def _measure_weights(float_model: nn.Module | None, qat_model: nn.Module, gauges: dict[str, _Gauge]) -> None:
    originals = {} if float_model is None else dict(float_model.named_parameters())
    for layer in qat_model.modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if not isinstance(quantizer, Quantizer):
            continue
        module: Any = layer
        weight, _, factor = module.folded() if hasattr(layer, "folded") else (module.weight, None, None)
        levels, scale = quantizer.weight_levels(weight) if quantizer.has_levels else _read_back(quantizer, weight)
        gauge = gauges[quantizer.name]
        view = quantizer.scheme.granularity.view if quantizer.has_levels else _as_it_is
        gauge.add(view(weight), levels, scale)
        original = originals.get(quantizer.name)
        if original is not None and isinstance(layer, SwappedLinear):
            original = original.t()
        if original is not None and original.shape == weight.shape:
            folded = (
                original
                if factor is None
                else original * factor.view(-1, *(1,) * (weight.ndim - 1)).to(original.device)
            )
            gauge.add_float(view(folded).to(scale.device), scale)


def _read_back(quantizer: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """x_hat as levels of scale 1, for formats whose levels are no integers."""
    return quantizer.by_scheme(x).float(), torch.ones((), device=x.device)


def _as_it_is(x: Tensor) -> Tensor:
    return x


# -- activations -------------------------------------------------------------------------------------------------------
def _measure_activations(
    models: list[tuple[nn.Module, dict[str, _Gauge]]], batches: Iterable[Any], progress: Callable[[int], None] | None
) -> None:
    done = 0
    for done, batch in enumerate(batches, start=1):
        for model, gauges in models:
            args, kwargs = move(split_inputs(batch, model), next(model.parameters()).device)
            with evaluating(model), _listening(gauges):
                model(*args, **kwargs)
        if progress is not None:
            progress(done)
    if not done:
        raise DataError("measure got no batch; check the data path, the split and the batch size")


@contextmanager
def _listening(gauges: dict[str, _Gauge]) -> Iterator[None]:
    """Layers hand their quantizers each tensor in float, to quantize or (while `observing`) to observe before the fused requantization.

    The first time in a pass is where the tensor is made; a shared quantizer meets it again, already on the grid."""
    listened = [gauge.quantizer for gauge in gauges.values() if not gauge.quantizer.is_weight]
    switches = [(quantizer, quantizer.observing) for quantizer in listened]
    seen: set[str] = set()
    for quantizer in listened:
        _listen(quantizer, gauges[quantizer.name], seen)
        quantizer.observing = quantizer.enabled
    try:
        yield
    finally:
        for quantizer, observing in switches:
            quantizer.observing = observing
            del quantizer.__dict__["observe"], quantizer.__dict__["activation_levels"]


def _listen(quantizer: Quantizer, gauge: _Gauge, seen: set[str]) -> None:
    """Replace two methods of one quantizer for a while; its range does not move, what it returns stays the same."""
    levels_of = quantizer.activation_levels

    def note(x: Tensor) -> None:
        if quantizer.name not in seen:
            seen.add(quantizer.name)
            levels, scale = levels_of(x)[:2] if quantizer.has_levels else _read_back(quantizer, x)
            gauge.add(x.reshape(levels.shape), levels, scale)

    def activation_levels(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        note(x)
        return levels_of(x)

    quantizer.__dict__["observe"] = note
    quantizer.__dict__["activation_levels"] = activation_levels


# -- choosing -----------------------------------------------------------------------------------------------------
def _chosen(measured: dict[str, _Gauge], wanted: int | Iterable[str]) -> list[str]:
    """Names of the tensors whose histograms are shown, in flow order."""
    drawable = [name for name, gauge in measured.items() if gauge.edges is not None]
    if not isinstance(wanted, int):
        names = set(wanted)
        unknown = names - set(measured)
        if unknown:
            raise ModelError(
                f"no quantizer is called '{min(unknown)}'; histograms can show {', '.join(drawable[:5])} ..."
            )
        return [name for name in drawable if name in names]
    worst = sorted(drawable, key=lambda name: measured[name].sqnr)
    weights = [name for name in worst if measured[name].quantizer.is_weight]
    others = [name for name in worst if not measured[name].quantizer.is_weight]
    half = max(wanted // 2, wanted - len(others))
    picked = {*weights[:half], *others[: wanted - min(half, len(weights))]}
    return [name for name in drawable if name in picked]
