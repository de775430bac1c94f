"""The report in a real headless Chromium, opened from a file as a user would."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

from qatana.report.data import Curve, LayerRow, ReportData
from qatana.report.render import render

pytestmark = pytest.mark.browser

# No sandbox: tests may run as root. The others keep Chromium from asking Google's hosts on its own.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)
HOSTILE = """</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'"&"""


def _program(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        # Not a skip: a report that nobody looked at is not tested.
        pytest.fail(
            f"{names[0]} is not installed, and the report's test needs a real browser; "
            "run: apt-get install chromium chromium-driver"
        )
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = Options()
    options.binary_location = _program("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = Chrome(options=options, service=Service(_program("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def sample_file(sample: ReportData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(sample, tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def opened(browser: Chrome, sample_file: Path) -> Chrome:
    return _open(browser, sample_file)


def _open(browser: Chrome, path: Path, width: int = 1280, dark: bool = False) -> Chrome:
    features = [
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # a click must not chase a gliding page
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for log in ("browser", "performance"):
        browser.get_log(log)  # reading empties it
    browser.get(path.as_uri())
    return browser


def _settled(browser: Chrome, selector: str) -> WebElement:
    """Charts are drawn when the page knows its width: wait for the first one."""
    return WebDriverWait(browser, 10).until(lambda driver: driver.find_element(By.CSS_SELECTOR, selector))


def _requests(browser: Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def _column(browser: Chrome, table: str, column: int, only_shown: bool = True) -> list[str]:
    """The data-v (or else the text) of a column's cells, in the order shown."""
    script = """
        return [...document.getElementById(arguments[0]).tBodies[0].rows]
            .filter((row) => !(arguments[2] && row.hidden))
            .map((row) => row.cells[arguments[1]].dataset.v ?? row.cells[arguments[1]].textContent.trim())"""
    return browser.execute_script(script, table, column, only_shown)


def _press_header(browser: Chrome, table: str, column: int) -> WebElement:
    header = browser.find_elements(By.CSS_SELECTOR, f"#{table} thead th")[column]
    button = header.find_element(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    return header


def _int8(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row.variant == "int8"]


def test_it_opens_quietly_and_asks_for_nothing(opened: Chrome, sample_file: Path) -> None:
    for chart in ("chart-results", "chart-curves", "chart-layers", "chart-histogram"):
        _settled(opened, f"#{chart} svg path, #{chart} svg circle")
    assert opened.get_log("browser") == []
    requests = _requests(opened)
    assert requests[0] == sample_file.as_uri()
    assert all(url.startswith("data:") for url in requests[1:])


def test_the_tables_have_every_row(opened: Chrome, sample: ReportData) -> None:
    assert _column(opened, "table-results", 2) == [repr(row.metric.value) for row in sample.results]
    assert len(_column(opened, "table-layers", 0, only_shown=False)) == len(sample.layers)
    assert len(_column(opened, "table-plan", 0, only_shown=False)) == len(sample.plan)
    # One variant at a time.
    assert _column(opened, "table-layers", 0) == [row.name for row in _int8(sample.layers)]
    note = opened.find_element(By.CSS_SELECTOR, "[data-shown=table-layers]").text
    assert note == f"{len(_int8(sample.layers))} of {len(sample.layers)} rows"


def test_headers_sort_by_number_with_missing_values_last(opened: Chrome, sample: ReportData) -> None:
    sizes = [row.bytes for row in _int8(sample.layers)]
    known = sorted(size for size in sizes if size is not None)
    missing = [""] * (len(sizes) - len(known))
    header = _press_header(opened, "table-layers", 8)
    assert header.get_attribute("aria-sort") == "descending"
    assert _column(opened, "table-layers", 8) == [str(size) for size in reversed(known)] + missing
    header.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert header.get_attribute("aria-sort") == "ascending"
    assert _column(opened, "table-layers", 8) == [str(size) for size in known] + missing


def test_sorting_by_name_leaves_one_sorted_column(opened: Chrome, sample: ReportData) -> None:
    _press_header(opened, "table-layers", 5)
    _press_header(opened, "table-layers", 0)
    # Lower-case ASCII names with one-digit numbers: plain order and the natural order of the page agree.
    assert _column(opened, "table-layers", 0) == sorted(row.name for row in _int8(sample.layers))
    assert len(opened.find_elements(By.CSS_SELECTOR, "#table-layers [aria-sort]")) == 1


def test_the_plan_shows_what_stays_float(opened: Chrome, sample: ReportData) -> None:
    Select(opened.find_element(By.CSS_SELECTOR, "[data-filter=table-plan][data-field=kept]")).select_by_value("float")
    floating = [row.tensor for row in _int8(sample.plan) if row.scheme is None]
    assert _column(opened, "table-plan", 0) == floating
    search = opened.find_element(By.CSS_SELECTOR, "input[data-filter=table-plan]")
    search.send_keys("CLASSIFIER")
    assert _column(opened, "table-plan", 0) == ["classifier.weight"]


def _paths(browser: Chrome) -> dict[str, str]:
    script = """
        return Object.fromEntries([...document.querySelectorAll("#chart-histogram svg")]
            .map((one) => [one.dataset.stage, one.querySelector("path.area").getAttribute("d")]))"""
    return browser.execute_script(script)


def test_the_drop_down_changes_the_histogram(opened: Chrome, sample: ReportData) -> None:
    _settled(opened, "#chart-histogram path")
    before = _paths(opened)
    assert list(before) == ["float", "ptq", "qat"]
    select = Select(opened.find_element(By.ID, "histogram-layer"))
    assert len(select.options) == len(sample.histograms)
    place = 20
    select.select_by_index(place)
    entry = sample.histograms[place]
    after = _paths(opened)
    assert all(before[stage] != after[stage] for stage in before)
    label = opened.find_element(By.CSS_SELECTOR, "#chart-histogram svg").get_attribute("aria-label") or ""
    assert entry.layer in label
    assert f"{sum(entry.stages[0].counts)} values" in label
    opened.find_element(By.ID, "histogram-log").click()
    assert _paths(opened)["float"] != after["float"]


def test_two_bits_show_their_four_codes(opened: Chrome, sample: ReportData) -> None:
    _settled(opened, "#chart-histogram path")
    place = next(index for index, entry in enumerate(sample.histograms) if entry.variant == "int2")
    Select(opened.find_element(By.ID, "histogram-layer")).select_by_value(str(place))
    panel = opened.find_element(By.CSS_SELECTOR, "#chart-histogram svg[data-stage=ptq]")
    assert len(panel.find_elements(By.CSS_SELECTOR, ".gridline")) == 4
    assert len(panel.find_elements(By.CSS_SELECTOR, ".clip")) == 2
    texts = [one.text for one in panel.find_elements(By.CSS_SELECTOR, "text.halo")]
    assert texts == ["−2", "−1", "0", "1"]


def test_a_layer_name_leads_to_its_histogram(opened: Chrome, sample: ReportData) -> None:
    _settled(opened, "#chart-histogram path")
    name = "bert.encoder.layer.3.intermediate.dense"
    row = opened.find_element(By.CSS_SELECTOR, f"tr[data-name='{name}'][data-role=weight][data-variant=int8]")
    button = row.find_element(By.TAG_NAME, "button")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    chosen = Select(opened.find_element(By.ID, "histogram-layer")).first_selected_option
    assert chosen.text.strip() == f"{name} (weight)"


def test_the_worst_layers_are_named_and_follow_the_filter(opened: Chrome, sample: ReportData) -> None:
    _settled(opened, "#chart-layers circle")

    def named() -> list[str]:
        return [one.text for one in opened.find_elements(By.CSS_SELECTOR, "#worst li code")]

    def worst(rows: list[LayerRow]) -> list[str]:
        return [row.name for row in sorted(rows, key=lambda row: row.sqnr_qat or 0.0)[:5]]

    rows = _int8(sample.layers)
    assert named() == worst(rows)
    _press_header(opened, "table-layers", 5)  # sorting the table must not change the chart
    assert named() == worst(rows)
    role = "[data-filter=table-layers][data-field=role]"
    Select(opened.find_element(By.CSS_SELECTOR, role)).select_by_value("weight")
    weights = [row for row in rows if row.role == "weight"]
    assert named() == worst(weights)
    assert len(opened.find_elements(By.CSS_SELECTOR, "#chart-layers circle.c-qat")) == len(weights)


def test_charts_can_be_read_with_the_keyboard(opened: Chrome, sample: ReportData) -> None:
    chart = _settled(opened, "#chart-layers svg")
    chart.send_keys(Keys.HOME)
    tip = opened.find_element(By.ID, "tip")
    first, second = _int8(sample.layers)[:2]
    assert tip.text.split("\n") == [
        first.name,
        "weight",
        f"PTQ {first.sqnr_ptq:.1f} dB",
        f"QAT {first.sqnr_qat:.1f} dB",
    ]
    chart.send_keys(Keys.ARROW_RIGHT)
    assert tip.text.startswith(second.name)
    chart.send_keys(Keys.ESCAPE)
    assert not tip.is_displayed()


def test_a_run_can_be_hidden(opened: Chrome, sample: ReportData) -> None:
    _settled(opened, "#chart-curves path")
    buttons = opened.find_elements(By.CSS_SELECTOR, "#runs button")
    assert [one.text.strip() for one in buttons] == [curve.run for curve in sample.curves]

    def lines() -> int:
        return len(opened.find_elements(By.CSS_SELECTOR, "#chart-curves path.run1"))

    assert lines() > 0
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", buttons[1])
    buttons[1].click()
    assert buttons[1].get_attribute("aria-pressed") == "false"
    assert lines() == 0
    buttons[1].click()
    assert lines() > 0


def test_printing_unfolds_everything_with_its_charts(opened: Chrome, sample: ReportData) -> None:
    _settled(opened, "#chart-results svg")
    details = opened.find_elements(By.TAG_NAME, "details")
    assert not any(one.get_attribute("open") for one in details)
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    assert all(one.get_attribute("open") for one in details)
    assert len(opened.find_elements(By.CSS_SELECTOR, "[data-rates] svg")) == len(sample.certificates)
    opened.execute_script("window.dispatchEvent(new Event('afterprint'))")
    assert not any(one.get_attribute("open") for one in details)


@pytest.mark.parametrize("width", [360, 390, 768])
def test_a_narrow_screen_scrolls_in_one_direction_only(browser: Chrome, sample_file: Path, width: int) -> None:
    _open(browser, sample_file, width=width)
    _settled(browser, "#chart-histogram path")
    content, room = browser.execute_script(
        "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert content == room <= width  # less by the scroll bar where there is one


def _luminance(color: list[int]) -> float:
    """WCAG 2.2, relative luminance."""
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: list[int], other: list[int]) -> float:
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


TEXTS = [(text, ground) for text in ("ink", "muted", "qat", "star") for ground in ("page", "card", "soft")]
TEXTS += [("good", "good-soft"), ("bad", "bad-soft")]
MARKS = [(name, "card") for name in ("float", "ptq", "qat", "run1", "run2", "run3", "run4", "run5")]


@pytest.mark.parametrize("dark", [False, True])
def test_colors_contrast_in_both_schemes(browser: Chrome, sample_file: Path, dark: bool) -> None:
    _open(browser, sample_file, dark=dark)
    script = """
        const probe = document.body.appendChild(document.createElement("i"));
        return Object.fromEntries(arguments[0].map((name) => {
            probe.style.color = `var(--${name})`;
            return [name, getComputedStyle(probe).color];
        }))"""
    names = sorted({name for pair in (*TEXTS, *MARKS) for name in pair})
    colors = {
        name: [int(number) for number in re.findall(r"\d+", color)[:3]]
        for name, color in browser.execute_script(script, names).items()
    }
    assert (_luminance(colors["page"]) < 0.2) == dark
    # WCAG 2.2 AA: 4.5 for text (1.4.3), 3 for what a chart needs to be read (1.4.11).
    assert {pair for pair in TEXTS if _contrast(*(colors[name] for name in pair)) < 4.5} == set()
    assert {pair for pair in MARKS if _contrast(*(colors[name] for name in pair)) < 3} == set()


def test_every_control_has_a_name(opened: Chrome) -> None:
    script = """
        const controls = "button, select, input, a, svg[tabindex], [role=region]";
        return [...document.querySelectorAll(controls)].filter((one) =>
            !(one.textContent.trim() || one.getAttribute("aria-label") || one.getAttribute("aria-labelledby")
              || one.labels?.[0]?.textContent.trim())).length"""
    _settled(opened, "#chart-histogram path")
    assert opened.execute_script(script) == 0


def test_a_hostile_name_stays_text(browser: Chrome, sample: ReportData, tmp_path: Path) -> None:
    curve = sample.curves[1].model_copy(update={"run": HOSTILE, "metric_name": HOSTILE})
    layers = [row.model_copy(update={"name": HOSTILE + row.name, "variant": HOSTILE}) for row in _int8(sample.layers)]
    histogram = sample.histograms[0].model_copy(update={"layer": layers[0].name, "variant": HOSTILE})
    results = [row.model_copy(update={"name": row.name.replace("int8", HOSTILE)}) for row in sample.results]
    certificate = json.loads(sample.certificates[0].model_dump_json())
    for layer in certificate["comparisons"][2]["layers"]:
        layer["name"] = layer["operator"] = HOSTILE
    data = json.loads(sample.model_dump_json()) | {
        "title": HOSTILE,
        "results": [json.loads(row.model_dump_json()) for row in results],
        "layers": [json.loads(row.model_dump_json()) for row in layers],
        "histograms": [json.loads(histogram.model_dump_json())],
        "curves": [json.loads(curve.model_dump_json())],
        "certificates": [certificate],
    }
    _open(browser, render(ReportData.model_validate(data), tmp_path / "hostile.html"))
    _settled(browser, "#chart-layers circle")
    _settled(browser, "[data-rates] circle")
    browser.find_element(By.CSS_SELECTOR, "#chart-layers svg").send_keys(Keys.HOME)
    assert HOSTILE in browser.find_element(By.ID, "tip").text
    browser.find_element(By.CSS_SELECTOR, "#table-layers tbody button").click()
    assert browser.execute_script("return window.hacked") is None
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert browser.title == HOSTILE
    assert browser.get_log("browser") == []


def test_a_sparse_report_draws_what_there_is(browser: Chrome, tmp_path: Path) -> None:
    nan = float("nan")
    data = ReportData.model_validate(
        {
            "title": "sparse",
            "created": "2026-11-21T14:05:00",
            "curves": [
                Curve(run="diverged", step=[0, 1, 2], loss=[1.0, nan, nan]),
                Curve(run="one point", step=[5], loss=[0.5]),
                Curve(run="nothing", step=[]),
            ],
            "layers": [
                LayerRow(name="exact", role="weight", scheme="int8", sqnr_ptq=float("inf")),
                LayerRow(name="unknown", role="input", scheme="int8"),
            ],
            "results": [{"name": "float", "engine": "torch", "metric": {"name": "accuracy", "value": nan}}],
        }
    )
    _open(browser, render(data, tmp_path / "sparse.html"))
    _settled(browser, "#chart-layers svg")
    _settled(browser, "#chart-curves svg")
    assert "diverged: not a number from step 1" in browser.find_element(By.ID, "chart-curves").text
    assert "exact" in browser.find_element(By.ID, "table-layers").text
    assert "not a number" in browser.find_element(By.ID, "table-results").text
    assert browser.get_log("browser") == []
    assert "NaN" not in browser.execute_script("return document.getElementById('content').innerHTML")
