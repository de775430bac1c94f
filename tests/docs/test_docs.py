"""What the documentation says is what the code does: its programs run, its tables are those of the sources, its links lead somewhere."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import qatana as qt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
QUICK = [page for page in sorted(DOCS.glob("*.md")) if page.name != "concepts.md" and "```python" in page.read_text()]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


# --- programs ---------------------------------------------------------------------------------------------


def run_page(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Run all Python blocks of a page as one program. Line numbers in a traceback are those of the page."""
    text = page.read_text()
    lines = [""] * len(text.splitlines())
    for match in FENCE.finditer(text):
        if match[1] == "python":
            first = text.count("\n", 0, match.start(2))
            code = match[2].splitlines()
            lines[first : first + len(code)] = code
    assert any(lines), f"{page.name} has no Python block"
    names["__name__"] = page.stem
    exec(compile("\n".join(lines), str(page), "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.engine
def test_the_concepts_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(DOCS / "concepts.md", {})
    assert json.loads((tmp_path / "certificate.json").read_text())["verdict"] == "pass"
    assert (tmp_path / "report.html").stat().st_size > 0
    assert len(names["history"].records) == 4


@pytest.mark.slow
@pytest.mark.engine
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`model`, `example` and `loader` are the reader's own, as the text below the program says."""
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    images = torch.randn(32, 1, 8, 8)
    loader = [(x, torch.randint(0, 3, (8,))) for x in images.split(8)]
    run_page(ROOT / "README.md", {"model": model, "example": images[:2], "loader": loader})
    assert (tmp_path / "model.onnx").stat().st_size > 0


@pytest.mark.parametrize("page", QUICK, ids=relative)
def test_the_programs_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page, {})


def test_recipe_files_are_recipes() -> None:
    found = [qt.Recipe.from_dict(yaml.safe_load(body)) for body in blocks(DOCS / "recipes.md", "yaml")]
    assert [recipe.target for recipe in found] == ["ort:int8", "ort:int8", "ort:int2"]


def test_the_recipe_in_yaml_is_the_recipe_in_python() -> None:
    written = qt.Recipe.from_dict(yaml.safe_load(blocks(DOCS / "recipes.md", "yaml")[0]))
    built = run_page(DOCS / "recipes.md", {})["recipe"]
    # A bare name is three patterns when it is skipped in Python.
    assert built.rules[0] == written.rules[0]
    assert written.rules[1] in built.rules


def test_the_job_file_is_a_job() -> None:
    from qatana.jobs.job import job_of

    (body,) = blocks(DOCS / "jobs.md", "yaml")
    assert [section.name for section in job_of(yaml.safe_load(body)).recipes] == ["int8", "int4"]


# --- commands ---------------------------------------------------------------------------------------------


def shell_lines() -> list[tuple[Path, list[str]]]:
    found = []
    for page in PAGES:
        for body in (*blocks(page, "sh"), *re.findall(r"`((?:make|qatana) [^`]+)`", prose(page))):
            found += [(page, shlex.split(line, comments=True)) for line in body.splitlines()]
    return [(page, words) for page, words in found if words]


def test_every_qatana_command_exists() -> None:
    from typer.main import get_command

    from qatana.cli import app

    known = get_command(app).commands  # type: ignore[attr-defined]
    called = [(page, words[1:]) for page, words in shell_lines() if words[0].endswith("qatana") and len(words) > 1]
    assert {words[0] for _, words in called} >= set(known), "a command is nowhere in the documentation"
    for page, (name, *rest) in called:
        if name == "--help":
            continue
        assert name in known, f"{page.name}: qatana {name}"
        flags = {flag for parameter in known[name].params for flag in (*parameter.opts, *parameter.secondary_opts)}
        for word in rest:
            if word.startswith("-"):
                assert word in flags, f"{page.name}: qatana {name} {word}"
            if word.startswith("examples/"):
                assert (ROOT / word).is_file(), f"{page.name}: {word}"


def test_every_make_target_exists() -> None:
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for _, words in shell_lines() if words[0] == "make"}
    assert used - known == set()
    assert {"demo", "test", "check", "bench"} <= used


# --- tables -----------------------------------------------------------------------------------------------


def rows(page: Path, heading: str) -> list[list[str]]:
    """Cells of the first table behind a heading, without its head."""
    text = page.read_text().split(f"# {heading}\n", 1)[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


def ticked(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def test_the_index_names_the_whole_facade() -> None:
    listed = [name for row in rows(DOCS / "index.md", "The Python interface") for name in sorted(ticked(row[0]))]
    assert sorted(listed) == sorted(set(qt.__all__) - {"__version__"})


def test_the_parity_table_is_the_one_that_decides() -> None:
    from qatana.verify import ALLOWED

    written = {
        name: (float(rate), float(labels)) for name, rate, labels, _ in rows(DOCS / "parity.md", "What may differ")
    }
    assert written == {name: (row.rate, row.labels) for name, row in ALLOWED.items()}


def test_the_certificate_table_names_every_key() -> None:
    written = {key for row in rows(DOCS / "parity.md", "certificate.json") for key in ticked(row[0])}
    certificate = qt.Certificate("ort:int8", "onnxruntime", {}, {}, {})
    assert written == set(certificate.to_dict())


def test_every_target_is_described() -> None:
    headings = set(re.findall(r"^### (.+)$", (DOCS / "recipes.md").read_text(), re.MULTILINE))
    assert headings == set(qt.TARGETS)
    assert [row[0].split("`")[1] for row in rows(ROOT / "README.md", "Targets")] == list(qt.TARGETS)


@pytest.mark.parametrize("target", qt.TARGETS)
def test_a_target_is_called_planned_as_long_as_it_is(target: str) -> None:
    """Whoever makes a target work takes the words out of the pages, and nobody sooner."""
    text = (DOCS / "recipes.md").read_text().split(f"### {target}\n")[1].split("\n#")[0]
    (row,) = (row for row in rows(ROOT / "README.md", "Targets") if f"`{target}`" in row[0])
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)), torch.randn(2, 64)
    try:
        qt.prepare(model, qt.plan(model, target, x))
        planned = False
    except qt.QatanaError:
        planned = True
    assert ("**Planned only.**" in text, "planned only" in row[0]) == (planned, planned)


def test_every_example_that_a_page_names_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"`[^`]*?(examples/[\w./-]+)", page.read_text()):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


def test_every_training_field_is_described() -> None:
    written = {name for row in rows(DOCS / "training.md", "Fields") for name in ticked(row[0])}
    assert written == set(qt.Training.model_fields)


def test_every_job_key_is_described() -> None:
    from qatana.jobs import job

    written = {name for row in rows(DOCS / "jobs.md", "The job file") for name in ticked(row[0])}
    assert written == {field.alias or name for name, field in job.Job.model_fields.items()} - {"folder"}
    words = ticked(prose(DOCS / "jobs.md"))
    for section in (
        job.TokenData,
        job.TextData,
        job.ImageData,
        job.RecipeSection,
        job.Calibration,
        job.Evaluation,
        job.Benchmark,
    ):
        assert set(section.model_fields) <= words, section.__name__


# --- words and links --------------------------------------------------------------------------------------


def glossary() -> list[str]:
    return [term for line in re.findall(r"^\*\*.*?(?=:)", (DOCS / "glossary.md").read_text(), re.MULTILINE)
            for term in re.findall(r"\*\*(.+?)\*\*", line)]  # fmt: skip


def test_every_glossary_term_is_used() -> None:
    pages = [page.read_text() for page in PAGES if page.name != "glossary.md"]
    sources = [path.read_text() for path in (ROOT / "src").rglob("*.py")]
    text = re.sub(r"\s+", " ", " ".join([*pages, *sources])).lower()
    unused = [term for term in glossary() if not re.search(rf"\b{re.escape(term.lower())}(?:s|es)?\b", text)]
    assert len(glossary()) > 30
    assert unused == []


def test_the_glossary_is_in_order() -> None:
    first = [
        line.split("**")[1].lower() for line in (DOCS / "glossary.md").read_text().splitlines() if line.startswith("**")
    ]
    assert first == sorted(first)


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them: lower case, punctuation gone, spaces as hyphens."""
    heads = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    found = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
    assert page.name == "CHANGELOG.md" or len(found) == len(set(found)), f"{page.name}: two headings give one anchor"
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_index() -> None:
    linked = set(re.findall(r"\]\((\w+\.md)", (DOCS / "index.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} == linked


def test_the_picture_names_every_verb() -> None:
    words = {text.text for text in ET.parse(DOCS / "flow.svg").iter("{http://www.w3.org/2000/svg}text")}
    verbs = {"plan", "prepare", "calibrate", "train", "convert", "export", "verify", "report"}
    assert verbs <= words
    headings = set(re.findall(r"^## (\w+)$", (DOCS / "concepts.md").read_text(), re.MULTILINE))
    assert verbs <= headings


# --- tables of measured figures ---------------------------------------------------------------------------

README = (
    "before\n"
    + "".join(f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in ("demo", "ner", "speed"))
    + "after\n"
)
SUMMARY = {
    "rows": [
        {"name": "float", "engine": "torch", "f1": 86.0, "file_bytes": 90_000_000, "latency_ms": 100.0,
         "speedup_vs_float_same_engine": 1.0, "speedup_vs_torch_float": 1.0},
        {"name": "int8-ptq", "engine": "torch", "f1": 84.0, "file_bytes": 22_500_000, "latency_ms": 200.0,
         "speedup_vs_float_same_engine": 0.5, "speedup_vs_torch_float": 0.5},
        {"name": "int8-qat", "engine": "onnxruntime", "f1": 85.5, "file_bytes": 22_500_000, "latency_ms": 40.0,
         "speedup_vs_float_same_engine": 2.25, "speedup_vs_torch_float": 2.5},
    ],
    "parity": {"codes_compared": 1_000_000, "codes_different": 12, "labels_compared": 2_000, "labels_different": 0},
    "drift": {"codes_compared": 1_000, "codes_different": 15},
    "seconds": {"float": 120.4, "qat": 60.0},
}  # fmt: skip
SPEED = {
    "inference": [{
        "title": "BERT-base", "milliseconds": {"PyTorch float32": {"median": 9.0, "min": 8.0, "max": 10.0}},
        "bars": [{"fast": "OpenVINO int8", "slow": "PyTorch float32", "ratio": 6.5, "bar": 6.0}],
    }],
    "machine": {"processor": "a processor", "isa": "avx2", "threads": 2}, "versions": {"torch": "2.13.0"},
    "command": "python -m benchmarks",
}  # fmt: skip


def make_tables(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCS / "make_tables.py"), "--root", str(folder), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/summary.json").write_text(json.dumps(SUMMARY))
    return tmp_path


def test_the_table_is_that_of_the_summary(checkout: Path) -> None:
    assert make_tables(checkout, "--check").returncode == 1
    assert (checkout / "README.md").read_text() == README
    assert make_tables(checkout).returncode == 0
    assert json.loads((checkout / "docs/measured/demo.json").read_text()) == SUMMARY
    text = (checkout / "README.md").read_text()
    assert text.startswith("before\n<!-- demo:begin -->\n| model |")
    assert text.endswith("<!-- speed:end -->\nafter\n")
    # 22.5 MB of 90 MB is a quarter; of 2 points lost 1.5 were won back
    assert "| int8-qat | ONNX Runtime | 85.50 | 75 % | 22.5 MB | 0.250 | 40.0 ms | 2.25× | 2.50× |" in text
    assert "1,000,000 outputs of integer operators, of which 12 differ, and 2,000 labels, of which 0 differ" in text
    assert "End to end, 1.5 % of the codes differ." in text
    assert "float 120, qat 60" in text
    assert "No figures yet: `qatana run examples/ner.yaml` measures them." in text
    assert make_tables(checkout, "--check").returncode == 0


def test_the_kept_figures_make_the_same_table_without_the_run(checkout: Path) -> None:
    make_tables(checkout)
    shown = (checkout / "README.md").read_text()
    (checkout / "runs/demo/summary.json").unlink()
    assert make_tables(checkout).returncode == 0
    assert (checkout / "README.md").read_text() == shown


def test_several_seeds_show_their_spread(checkout: Path) -> None:
    summary = SUMMARY | {"seeds": [0, 1], "spread": {"int8-qat onnxruntime": 0.25}}
    (checkout / "runs/demo/summary.json").write_text(json.dumps(summary))
    assert make_tables(checkout).returncode == 0
    text = (checkout / "README.md").read_text()
    assert "| 85.50 ± 0.25 |" in text
    assert "Means over the seeds 0, 1" in text


def test_the_speed_table_names_machine_and_command(checkout: Path) -> None:
    (checkout / "benchmarks/results").mkdir(parents=True)
    (checkout / "benchmarks/results/speed.json").write_text(json.dumps(SPEED))
    assert make_tables(checkout).returncode == 0
    text = (checkout / "README.md").read_text()
    assert "| PyTorch float32 | 9.0 ms | 8.0 ms | 10.0 ms |" in text
    assert "OpenVINO int8 is 6.50 times as fast as PyTorch float32." in text
    assert "`python -m benchmarks` on a processor (avx2), 2 threads; torch 2.13.0." in text


def _contestant(name: str, title: str, ms: float, ratio: float, saved: float) -> dict[str, Any]:
    spread = {"median": ratio, "min": ratio - 0.01, "max": ratio + 0.01}
    parts = ("step", "without optimizer", "forward", "backward", "optimizer")
    return {
        "name": name, "title": title, "peer": False, "remark": "", "versions": {"torch": "2.13.0"},
        "milliseconds": {part: {"median": ms} for part in parts}, "ratio": dict.fromkeys(parts, spread),
        "memory": {"saved": int(saved * 2**20), "peak": None}, "memory_ratio": {"saved": saved / 100, "peak": None},
        "operators": {"aten::mm": 60.0, "qatana::encode": 30.0, "aten::add": 10.0},
    }  # fmt: skip


STEP = {
    "models": [{
        "model": "bert", "title": "BERT <small>", "contestants": [
            _contestant("float32", "float32", 900.0, 1.0, 100.0),
            _contestant("qatana-w8a8", "qatana W8A8", 495.0, 0.55, 45.0),
            {"name": "aimet", "title": "AIMET W8A8", "peer": True, "reason": "not installed: a | b"},
        ],
        "bars": [
            {"who": "qatana-w8a8", "against": "float32", "quantity": "step", "bar": 0.6, "ratio": 0.55, "min": 0.54, "max": 0.56,
             "pass": True},
            {"who": "qatana-w8a8", "against": "float32", "quantity": "saved", "bar": 0.4, "ratio": 0.45, "min": 0.45, "max": 0.45,
             "pass": False},
            {"who": "qatana-w8a8", "against": "aimet", "quantity": "step", "bar": 1.0, "ratio": None, "pass": None},
        ],
    }],
    "machine": {"processor": "a processor", "isa": "avx2", "threads": 2}, "versions": {"torch": "2.13.0"},
    "command": "python -m benchmarks --only step",
}  # fmt: skip


def test_the_step_table_marks_what_is_missed(checkout: Path) -> None:
    (checkout / "benchmarks/results").mkdir(parents=True)
    (checkout / "benchmarks/results/step.json").write_text(json.dumps(STEP))
    (checkout / "docs").mkdir()
    marks = "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("step", "quantizers"))
    (checkout / "docs/performance.md").write_text(marks)
    assert make_tables(checkout).returncode == 0
    text = (checkout / "docs/performance.md").read_text()
    assert "| qatana W8A8 | 495 ms | 0.55 | 0.54–0.56 | 0.55 | 0.55 | 45 MiB | 0.45 | – | – |" in text
    assert "| AIMET W8A8 | not measured: not installed: a \\| b |" in text
    assert "| qatana W8A8 over float32, step | 0.55 | 0.54–0.56 | 0.60 | reached |" in text
    assert "| qatana W8A8 over float32, bytes saved | 0.45 | 0.45–0.45 | 0.40 | **missed** |" in text
    assert "| qatana W8A8 over AIMET W8A8, step | – |  | 1.00 | not measured |" in text
    assert "No figures yet: `python -m benchmarks --only quantizers` measures them." in text
    picture = (checkout / "docs/measured/step-bert.svg").read_text()
    # Of 100 ms, 60 are products, 30 quantizers and 10 others; the longest bar is 600 wide. Then the keys of the colours.
    widths = [float(rect.attrib["width"]) for rect in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")]
    assert widths == [12.0] * 5 + [360.0, 0.0, 0.0, 180.0, 60.0] * 2
    assert make_tables(checkout, "--check").returncode == 0


@pytest.mark.parametrize("content", ["{", '{"rows": []}', "[]"], ids=["truncated", "foreign", "list"])
def test_no_table_from_a_damaged_file(checkout: Path, content: str) -> None:
    (checkout / "runs/demo/summary.json").write_text(content)
    done = make_tables(checkout)
    assert done.returncode == 1
    assert "make demo" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert (checkout / "README.md").read_text() == README


def test_the_documents_show_the_kept_figures() -> None:
    done = make_tables(ROOT, "--check")
    assert done.returncode == 0, done.stderr
