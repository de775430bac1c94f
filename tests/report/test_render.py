"""The report as text: sentences, sections, escaping, policy, and writing it whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import subprocess
import sys
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qatana.errors import ArtifactError, MissingExtra
from qatana.report import readable
from qatana.report.charts import coarsen, thin
from qatana.report.data import (
    Certificate,
    Comparison,
    Curve,
    Grid,
    Metric,
    ReportData,
    ResultRow,
    StageHistogram,
)
from qatana.report.render import page, render
from qatana.report.results import best_cells, share_recovered, variants

NOW = datetime(2026, 11, 21, 14, 5)
HOSTILE = """</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'"&{{7*7}}"""


class Page(HTMLParser):
    """Elements with their attributes, and the text inside script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self.text: list[str] = []
        self._inside: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in self.raw else None

    def handle_endtag(self, tag: str) -> None:
        self._inside = None

    def handle_data(self, data: str) -> None:
        (self.raw[self._inside] if self._inside else self.text).append(data)

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for tag, attributes in self.elements if tag == "section"}


def row(name: str, value: float, engine: str = "torch", **more: Any) -> ResultRow:
    metric = {"name": "F1", "value": value}
    metric |= {key: more.pop(key) for key in ("spread", "unit", "higher_is_better") if key in more}
    return ResultRow(name=name, engine=engine, metric=Metric.model_validate(metric), **more)


def sentence(*rows: ResultRow) -> str:
    (variant,) = variants(list(rows))
    return variant.sentence.replace("\u00a0", " ")


# Sentences ------------------------------------------------------------------------------------------------


def test_the_sentence_says_lost_won_back_smaller_and_faster() -> None:
    assert sentence(
        row("float", 86.40),
        row("float", 86.40, "onnxruntime", file_bytes=3900),
        row("int8-ptq", 86.20),
        row("int8-qat", 86.37),  # 0.17 of 0.20 won back: 85 %
        row("int8-qat", 86.37, "onnxruntime", file_bytes=1000, speedup_vs_float_same_engine=1.8),
    ) == (
        "int8: 0.2 points lost by quantizing, 85 % of it won back by QAT, file 3.9 times smaller, "
        "1.8 times faster in ONNX Runtime."
    )


@pytest.mark.parametrize(
    ("float_", "ptq", "qat", "words"),
    [
        (86.0, 85.0, 86.2, "1.0 points lost by quantizing, all of it and 0.2 points more won back by QAT."),
        (86.0, 85.0, 86.0, "1.0 points lost by quantizing, all of it won back by QAT."),
        (86.0, 85.0, 84.5, "1.0 points lost by quantizing, QAT lost another 0.5 points."),
        (86.0, 86.0, 85.9, "nothing lost by quantizing, after QAT 0.1 points worse than float."),
        (86.0, 86.3, 86.0, "0.3 points gained by quantizing, after QAT level with float."),
        (86.0, 85.98, 86.0, "0.02 points lost by quantizing, after QAT level with float."),
        # 99.7 % rounds to 100 %, but something is still missing.
        (86.0, 76.0, 85.97, "10.0 points lost by quantizing, 99 % of it won back by QAT."),
        (86.0, None, 85.5, "0.5 points worse than float after QAT."),
        (86.0, 85.5, None, "0.5 points lost by quantizing."),
        (86.0, math.nan, 85.5, "0.5 points worse than float after QAT."),
        (math.nan, 85.0, 85.5, "nothing to compare with."),
    ],
)
def test_the_sentence_does_not_flatter(float_: float, ptq: float | None, qat: float | None, words: str) -> None:
    rows = [("float", float_), ("int8-ptq", ptq), ("int8-qat", qat)]
    assert sentence(*(row(name, value) for name, value in rows if value is not None)) == f"int8: {words}"


def test_a_loss_within_the_spread_gets_no_share() -> None:
    rows = (
        row("float", 86.0, spread=0.3),
        row("int8-ptq", 85.8, spread=0.2),
        row("int8-qat", 86.1, spread=0.2),
    )
    assert share_recovered(*rows) is None
    assert "0.2 points lost by quantizing (within the spread of the seeds), after QAT 0.1 points" in sentence(*rows)


def test_lower_is_better_turns_the_signs() -> None:
    def loss(name: str, value: float) -> ResultRow:
        return row(name, value, unit="nats", higher_is_better=False)

    rows = loss("float", 2.0), loss("int4-ptq", 2.5), loss("int4-qat", 2.25)
    # (2.25 - 2.5) / (2.0 - 2.5) = 0.5
    assert share_recovered(*rows) == 0.5
    assert sentence(*rows) == "int4: 0.5 nats lost by quantizing, 50 % of it won back by QAT."


def test_slower_and_larger_are_said() -> None:
    text = sentence(
        row("float", 90.0, "openvino", file_bytes=100),
        row("int8-ptq", 89.0, "openvino", file_bytes=200, speedup_vs_float_same_engine=0.5),
    )
    assert text.endswith("file 2.0 times larger, 2.0 times slower in OpenVINO.")


def test_best_values_are_sought_among_the_quantized_rows() -> None:
    rows = [
        row("float", 90.0, file_bytes=1),
        row("int8-qat", 89.0, file_bytes=20, latency_ms=5.0),
        row("int4-qat", 88.0, file_bytes=10, latency_ms=5.0),
    ]
    assert best_cells(rows) == {(1, "metric"), (2, "file_bytes"), (1, "latency_ms"), (2, "latency_ms")}


# Numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (readable.size(None), "–"),
        (readable.size(999), "999 bytes"),
        (readable.size(33_741_201), "33.7 MB"),
        (readable.size(999_700), "1.00 MB"),
        (readable.size(2_500_000_000), "2.50 GB"),
        (readable.share(0.0), "0 %"),
        (readable.share(1.0), "100 %"),
        (readable.share(0.0123), "1.23 %"),
        (readable.share(0.853), "85.3 %"),
        (readable.share(0.9999), "99.99 %"),
        (readable.share(3e-7), "3e-05 %"),
        (readable.rate(0, 100), "0"),
        (readable.rate(3, 1_000_000), "3.00 per million"),
        (readable.decibel(math.inf), "exact"),
        (readable.decibel(math.nan), "not a number"),
        (readable.times(1.8), "1.80×"),
        (readable.signed(0.2), "−0.20"),
        (readable.signed(-0.2), "+0.20"),
        (readable.signed(0.001), "0.00"),
        (readable.number(-12.0), "−12"),
        (readable.number(0.25), "0.25"),
        (readable.count(12345678), "12,345,678"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text.replace("\u00a0", " ") == expected


# The page -------------------------------------------------------------------------------------------------

SECTIONS = {
    "results": {"results", "summary"},
    "certificates": {"certificate"},
    "token_tables": {"tokens"},
    "curves": {"curves"},
    "layers": {"layers"},
    "histograms": {"histograms"},
    "plan": {"plan"},
}


def test_every_section_is_there_and_linked(sample: ReportData) -> None:
    parsed = Page(page(sample))
    everything = {"origin"}.union(*SECTIONS.values())
    assert parsed.ids() == everything
    links = {attributes["href"] for tag, attributes in parsed.elements if tag == "a" and "href" in attributes}
    assert links == {"#content"} | {f"#{name}" for name in everything}


@pytest.mark.parametrize("field", SECTIONS)
def test_an_absent_section_leaves_no_trace(sample: ReportData, field: str) -> None:
    without = Page(page(sample.model_copy(update={field: []})))
    only = Page(page(ReportData.model_validate({"title": "t", "created": NOW, field: getattr(sample, field)})))
    assert SECTIONS[field].isdisjoint(without.ids())
    assert only.ids() == SECTIONS[field] | {"origin"}


def test_what_happened_in_training_is_written_out(sample: ReportData) -> None:
    text = " ".join("".join(Page(page(sample)).text).split())
    qat = "(int8-qat, int4-qat, int2-qat)"
    assert f"step 100, fake quantization starts {qat}; step 560, ranges freeze {qat}." in text


def test_a_report_of_nothing_is_a_page() -> None:
    assert Page(page(ReportData(title="t", created=NOW))).ids() == {"origin"}


def test_the_page_is_small_and_reproducible(sample: ReportData) -> None:
    text = page(sample)
    assert len(text.encode()) < 1_000_000
    assert text == page(sample)


def _hostile(value: Any, fixed: tuple[str, ...] = ()) -> Any:
    """Every free string made hostile; those with a fixed set of values stay."""
    if isinstance(value, dict):
        kept = {"role", "stage", "verdict", "created"}
        return {key: one if key in kept else _hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_hostile(one) for one in value]
    return HOSTILE + value if isinstance(value, str) else value


def hostile_report(sample: ReportData) -> ReportData:
    data = _hostile(json.loads(sample.model_dump_json()))
    # Result names decide what is drawn, so keep their endings; dictionary keys are names too.
    data["versions"] = {HOSTILE: HOSTILE}
    return ReportData.model_validate(data)


def test_names_are_text_never_markup(sample: ReportData) -> None:
    clean, attacked = Page(page(sample)), Page(page(hostile_report(sample)))
    assert not [tag for tag, _ in attacked.elements if tag in ("img", "iframe", "object", "embed", "base", "form")]
    assert not [name for _, attributes in attacked.elements for name in attributes if name.startswith("on")]
    # The data block and our script, as many as ever.
    scripts = [attributes for tag, attributes in attacked.elements if tag == "script"]
    assert scripts == [attributes for tag, attributes in clean.elements if tag == "script"]
    # It is all there, as text, template syntax included.
    text = "".join(attacked.text)
    assert text.count("<img src=x") == text.count("{{7*7}}") > 100


def test_the_page_refers_to_nothing_outside(sample: ReportData) -> None:
    parsed = Page(page(sample))
    targets = [
        value
        for _, attributes in parsed.elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset", "xlink:href", "data")
    ]
    assert all(value is not None and value.startswith(("#", "data:,")) for value in targets)
    assert "@import" not in parsed.raw["style"][0]
    assert "url(" not in parsed.raw["style"][0]


def test_the_policy_allows_this_script_and_style_alone(sample: ReportData) -> None:
    parsed = Page(page(sample))
    (policy,) = (a["content"] for t, a in parsed.elements if t == "meta" and "http-equiv" in a)
    assert policy is not None

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    directives = dict(part.split(" ", 1) for part in policy.split("; "))
    assert directives["default-src"] == "'none'"
    assert directives["style-src"] == digest("".join(parsed.raw["style"]))
    # raw["script"] holds the data block, then the script.
    text = "".join(parsed.raw["script"])
    assert directives["script-src"] == digest(text[text.index('"use strict";\n') :])
    # A style attribute would be refused by this policy.
    assert not [a for _, a in parsed.elements if "style" in a]


def test_the_verdict_of_the_page_is_that_of_its_weakest_certificate(sample: ReportData) -> None:
    assert "<strong>Proven</strong>" in page(sample)
    failed = sample.certificates[2].model_copy(update={"verdict": "fail"})
    assert "<strong>Not proven</strong>" in page(
        sample.model_copy(update={"certificates": [*sample.certificates[:2], failed]})
    )
    partial = page(sample.model_copy(update={"certificates": sample.certificates[:1]}))
    assert "<strong>Proven in part</strong>" in partial
    assert "2 of 3 variants not verified" in partial


def test_a_certificate_claims_no_more_than_its_counts() -> None:
    def words(different: int, verdict: str) -> str:
        one = Comparison(left="a", right="b", codes_compared=10, codes_different=different)
        return readable.headline(Certificate.model_validate({"verdict": verdict, "comparisons": [one]}))

    assert words(0, "pass") == "the file's integers are the trained ones"
    assert "inside the written table" in words(3, "pass")
    assert "do not ship" in words(3, "fail")


# The data -------------------------------------------------------------------------------------------------


def test_json_keeps_everything_even_nan_and_infinity(sample: ReportData) -> None:
    layer = sample.layers[0].model_copy(update={"sqnr_qat": math.inf})
    curve = Curve(run="diverged", step=[0, 1], loss=[1.0, math.nan])
    data = sample.model_copy(update={"layers": [layer], "curves": [curve]})
    again = ReportData.model_validate_json(data.model_dump_json())
    assert again.layers[0].sqnr_qat == math.inf
    assert math.isnan(again.curves[0].loss[1] or 0.0)
    assert '"broken": 1' in page(data)
    assert 'data-v="Infinity">exact</td>' in "".join(page(data).split("\n"))
    assert again.plan == data.plan


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Curve(run="qat", step=[0, 1], loss=[1.0]), "'qat': loss has 1 values for 2 steps"),
        (lambda: Grid(scale=0.1, lo=3, hi=3), "lo 3 is not below hi 3"),
        (lambda: StageHistogram(stage="ptq", edges=[0.0, 1.0], counts=[1, 2]), "2 edges for 2 counts"),
        (lambda: StageHistogram(stage="ptq", edges=[0.0, 0.0], counts=[1]), "edges do not increase"),
        (
            lambda: ReportData(title="t", created=NOW, results=[row("a", 1.0)] * 2),
            "two rows for 'a' in 'torch'",
        ),
        (lambda: ReportData.model_validate({"title": "t", "created": NOW, "layer": []}), "layer"),
    ],
)
def test_data_that_cannot_be_drawn_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_a_certificate_of_another_version_is_read() -> None:
    certificate = Certificate.model_validate({"verdict": "pass", "signature": "unknown key"})
    assert certificate.verdict == "pass"


values = st.floats(-1e6, 1e6)


@given(st.lists(st.one_of(st.none(), values, st.just(math.nan)), max_size=400), st.integers(6, 60))
def test_thinning_keeps_order_ends_and_extremes(series: list[float | None], limit: int) -> None:
    known = [(step, v) for step, v in enumerate(series) if v is not None and math.isfinite(v)]
    steps, kept = thin(list(range(len(series))), series, limit)
    assert len(steps) == len(kept) <= limit
    assert steps == sorted(set(steps))
    if known:
        rounded = [float(f"{v:.6g}") for _, v in known]  # six digits are kept, as the module says
        assert (steps[0], steps[-1]) == (known[0][0], known[-1][0])
        assert (min(kept), max(kept)) == (min(rounded), max(rounded))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=300), st.integers(1, 50))
def test_coarser_bins_lose_no_value(counts: list[int], limit: int) -> None:
    edges = [float(place) for place in range(len(counts) + 1)]
    wide, joined = coarsen(edges, counts, limit)
    assert len(joined) <= limit
    assert len(wide) == len(joined) + 1
    for left, right, number in zip(wide, wide[1:], joined, strict=False):
        assert number == sum(counts[int(left) : int(right)])


# Writing --------------------------------------------------------------------------------------------------


def test_render_makes_folders_and_one_file(sample: ReportData, tmp_path: Path) -> None:
    target = tmp_path / "runs" / "demo" / "report.html"
    assert render(sample, str(target)) == target
    assert target.read_text(encoding="utf-8") == page(sample)
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_a_target_that_cannot_be_written_is_one_line(sample: ReportData, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ArtifactError, match=r"^cannot write .*report\.html: .+; [^\n]+$"):
        render(sample, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


FULL_DISK = """
import datetime, resource, signal, sys
from qatana.errors import ArtifactError
from qatana.report.data import ReportData
from qatana.report.render import render
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    render(ReportData(title="t", created=datetime.datetime(2026, 1, 1)), sys.argv[1])
except ArtifactError as error:
    sys.exit(0 if "cannot write" in str(error) else 3)
sys.exit(4)
"""


def test_the_old_report_survives_when_no_byte_fits(tmp_path: Path) -> None:
    old = tmp_path / "report.html"
    old.write_text("old")
    # A limit on file size makes the kernel refuse the write half-way, as a full disk does.
    assert subprocess.run([sys.executable, "-c", FULL_DISK, str(old)], check=False).returncode == 0
    assert old.read_text() == "old"
    assert list(tmp_path.iterdir()) == [old]


def test_without_jinja_the_extra_is_named(sample: ReportData, monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes Python's own import fail as if it were not installed.
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r'pip install "qatana\[report\]"'):
        page(sample)


def test_jinja_is_loaded_only_when_a_page_is_made() -> None:
    code = "import sys, qatana.report.render; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
