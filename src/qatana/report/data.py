"""What a report shows: plain, JSON-able data, validated. Whoever measures fills it; `render` draws it.

Nothing here computes. Every section is optional and the page leaves an absent one out. Units are fixed, so
that no caller has to guess: bytes, milliseconds, decibels; a share or rate lies in 0 to 1; a metric is in the
unit it names. A float may be NaN or infinite (a diverged run needs a report most): it survives JSON as "NaN"
or "Infinity" and the page says "not a number". Unknown keys are an error everywhere but in a certificate,
which another version may have written.

`variant` names the quantized model that a row belongs to ("int8", "int4"), where one report compares several.
"""

from __future__ import annotations

from datetime import datetime
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Stage = Literal["float", "ptq", "qat"]
Series = list[float | None]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")


class Machine(_Data):
    """Where the figures were measured."""

    cpu: str
    isa: str = ""
    threads: int = Field(ge=1)


class Metric(_Data):
    """One figure of merit, e.g. `Metric(name="entity F1", value=86.4, spread=0.2)`.

    value: in `unit` (F1 and accuracy in points, 0 to 100).
    spread: standard deviation over the seeds, same unit.
    """

    name: str
    value: float
    spread: float | None = Field(default=None, ge=0)
    unit: str = "points"
    higher_is_better: bool = True


class ResultRow(_Data):
    """One model in one engine: the float / PTQ / QAT / deployed table.

    name: "float", or "<variant>-ptq" / "<variant>-qat" (others are shown, but take no part in the summary).
    recovered: share of the PTQ loss won back by QAT, (qat - ptq) / (float - ptq); may leave 0 to 1. Left
    None, the page computes it from the float, PTQ and QAT rows.
    """

    name: str
    engine: str
    metric: Metric
    file_bytes: Count | None = None
    latency_ms: float | None = Field(default=None, gt=0)
    speedup_vs_float_same_engine: float | None = Field(default=None, gt=0)
    speedup_vs_torch_float: float | None = Field(default=None, gt=0)
    recovered: float | None = None


class TokenRow(_Data):
    """Precision, recall and F1 (0 to 1) of one class; support: tokens of that class in the reference."""

    label: str
    precision: Share
    recall: Share
    f1: Share
    support: Count


class TokenTable(_Data):
    """Per-class table of one model; averages are rows of their own ("macro average")."""

    name: str
    rows: list[TokenRow] = Field(min_length=1)


class Mark(_Data):
    """Something that happened at a training step, e.g. "fake quantization starts"."""

    step: Count
    text: str


class Curve(_Data):
    """What one training run logged: every series empty, or as long as `step` with None where nothing was
    logged.

    saturation: share of values clipped, 0 to 1.
    scale_drift: |scale / scale at the start - 1|, mean over the quantizers.
    """

    run: str
    step: list[Count]
    loss: Series = []
    metric: Series = []
    lr: Series = []
    saturation: Series = []
    scale_drift: Series = []
    metric_name: str = "metric"
    marks: list[Mark] = []

    @model_validator(mode="after")
    def _same_length(self) -> Curve:
        for name in ("loss", "metric", "lr", "saturation", "scale_drift"):
            length = len(getattr(self, name))
            if length not in (0, len(self.step)):
                raise ValueError(
                    f"curve {self.run!r}: {name} has {length} values for {len(self.step)} steps; "
                    "give one per step (None where nothing was logged) or leave it out"
                )
        return self


class LayerRow(_Data):
    """One quantized tensor. sqnr_*: 10 log10(sum x^2 / sum (x - x_hat)^2) in dB; infinite when exact.

    saturation: share of values clipped; zeros: share of codes equal to the zero point (after QAT, if
    trained).
    """

    name: str
    role: Literal["weight", "input", "output"]
    scheme: str
    bits: int | None = Field(default=None, ge=1)
    sqnr_ptq: float | None = None
    sqnr_qat: float | None = None
    saturation: Share | None = None
    zeros: Share | None = None
    bytes: Count | None = None
    variant: str = ""


class Grid(_Data):
    """The representable values (code - zero_point) * scale for lo <= code <= hi."""

    scale: float = Field(gt=0, allow_inf_nan=False)
    lo: int
    hi: int
    zero_point: int = 0

    @model_validator(mode="after")
    def _ordered(self) -> Grid:
        if self.lo >= self.hi:
            raise ValueError(f"grid: lo {self.lo} is not below hi {self.hi}; give the lowest and highest code")
        return self


class StageHistogram(_Data):
    """Counts per bin; edges has one entry more than counts. grid: None for a stage without quantization."""

    stage: Stage
    edges: list[Annotated[float, Field(allow_inf_nan=False)]]
    counts: list[Count] = Field(min_length=1)
    grid: Grid | None = None

    @model_validator(mode="after")
    def _bins(self) -> StageHistogram:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(
                f"histogram: {len(self.edges)} edges for {len(self.counts)} counts; give one edge more than counts"
            )
        if any(left >= right for left, right in pairwise(self.edges)):
            raise ValueError("histogram: edges do not increase; sort them and drop empty bins")
        return self


class LayerHistogram(_Data):
    """The values of one tensor at several stages, drawn over the grid of each."""

    layer: str
    role: Literal["weight", "input", "output"] = "weight"
    stages: list[StageHistogram] = Field(min_length=1)
    variant: str = ""


class PlanRow(_Data):
    """One row of the plan. scheme None: the tensor stays float, and `reason` says why."""

    tensor: str
    module_type: str
    role: str
    scheme: str | None = None
    rule: str = ""
    reason: str = ""
    bytes: Count | None = None
    variant: str = ""


class _FromVerify(BaseModel):
    """Part of a certificate: keys that this version does not know are passed over."""

    model_config = ConfigDict(extra="ignore", frozen=True, ser_json_inf_nan="strings")


class FirstDifference(_FromVerify):
    """The first code that differs, in the order of the forward pass. index: position in the tensor."""

    tensor: str
    index: list[int]
    left: float
    right: float


class LayerRate(_FromVerify):
    """Codes that differ in one tensor. operator: what computes it ("Softmax", "MatMulInteger")."""

    name: str
    operator: str = ""
    codes: Count
    different: Count


class Comparison(_FromVerify):
    """Two models, code by code. left, right: "QAT model", "integer model", "model.onnx".

    mode: "end to end", or "layer by layer" when each operator was fed with the other side's own codes.
    drift_began_at: the operator behind which the first codes differed.
    """

    left: str
    right: str
    engine: str = ""
    mode: str = ""
    tensors_compared: Count = 0
    codes_compared: Count = 0
    codes_different: Count = 0
    labels_compared: Count = 0
    labels_different: Count = 0
    first_difference: FirstDifference | None = None
    drift_began_at: str | None = None
    layers: list[LayerRate] = []
    verdict: Literal["pass", "fail"] | None = None


class FileDigest(_FromVerify):
    """A file that was compared. sha256: 64 hexadecimal digits."""

    path: str
    sha256: str
    bytes: Count | None = None


class Certificate(_FromVerify):
    """`verify`'s result. verdict: "pass" when nothing differs beyond the table that `allowed` sums up."""

    verdict: Literal["pass", "fail"]
    variant: str = ""
    comparisons: list[Comparison] = []
    allowed: str = ""
    isa: str = ""
    files: list[FileDigest] = []


class ReportData(_Data):
    """All of a report; only title and date are needed. command: what to type to make this report again."""

    title: str
    created: datetime
    job: str = ""
    command: str = ""
    machine: Machine | None = None
    versions: dict[str, str] = {}
    results: list[ResultRow] = []
    token_tables: list[TokenTable] = []
    curves: list[Curve] = []
    layers: list[LayerRow] = []
    histograms: list[LayerHistogram] = []
    plan: list[PlanRow] = []
    certificates: list[Certificate] = []

    @model_validator(mode="after")
    def _rows_once(self) -> ReportData:
        seen: set[tuple[str, str]] = set()
        for row in self.results:
            if (row.name, row.engine) in seen:
                raise ValueError(f"results: two rows for {row.name!r} in {row.engine!r}; keep one (mean, with spread)")
            seen.add((row.name, row.engine))
        return self
