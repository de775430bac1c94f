"""Files of image data: every layout is read exactly, and the cache follows the folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.image_files import write_cifar10, write_idx

from qatana.errors import DataError
from qatana.jobs.images import cache_folder, load_images


@pytest.mark.parametrize("compress", [True, False])
def test_idx_folder_is_read_exactly(tmp_path: Path, rng: np.random.Generator, compress: bool) -> None:
    arrays = write_idx(tmp_path / "data", rng, compress)
    data = load_images(str(tmp_path / "data"))
    assert data.train_x.dtype == torch.uint8
    assert data.train_y.dtype == torch.int64
    np.testing.assert_array_equal(data.train_x.numpy(), arrays["train-images-idx3-ubyte"][:, None])
    np.testing.assert_array_equal(data.test_x.numpy(), arrays["t10k-images-idx3-ubyte"][:, None])
    np.testing.assert_array_equal(data.train_y.numpy(), arrays["train-labels-idx1-ubyte"])
    np.testing.assert_array_equal(data.test_y.numpy(), arrays["t10k-labels-idx1-ubyte"])
    assert data.classes == ("0", "1", "2")


@pytest.mark.parametrize("kind", ["binary", "sheets"])
def test_cifar10_folder_is_read_exactly(tmp_path: Path, rng: np.random.Generator, kind: str) -> None:
    x, y = write_cifar10(tmp_path / "data", rng, kind)
    for _ in range(2):  # the second time, sheets come from the cache
        data = load_images(str(tmp_path / "data"), cache=tmp_path / "cache")
        np.testing.assert_array_equal(torch.cat((data.train_x, data.test_x)).numpy(), x)
        np.testing.assert_array_equal(torch.cat((data.train_y, data.test_y)).numpy(), y)
        assert len(data.test_x) == 4
        assert data.classes[3] == "cat"
        assert data.mean == (0.4914, 0.4822, 0.4465)


def test_measured_constants_equal_their_definition(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = write_idx(tmp_path, rng)["train-images-idx3-ubyte"] / 255
    data = load_images(str(tmp_path))
    assert data.mean == (round(float(pixels.mean()), 4),)
    assert data.std == (round(float(pixels.std()), 4),)


def test_cache_holds_whole_files_only_and_follows_the_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    folder, cache = tmp_path / "data", tmp_path / "cache"
    write_cifar10(folder, rng, "sheets")
    load_images(str(folder), cache)
    (cached,) = cache.iterdir()  # no temporary file is left
    cached.write_bytes(cached.read_bytes()[:1000])  # as after a disk fault
    load_images(str(folder), cache)
    assert set(load_file(cached)) == {"train_x", "train_y", "test_x", "test_y"}

    (folder / "test_lables.json").write_text("[9, 9, 9, 9, 9]")  # a change must not be hidden by the cache
    with pytest.raises(DataError, match="4 test images and 5 labels"):
        load_images(str(folder), cache)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QATANA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("QATANA_CACHE")
    assert cache_folder() == Path.home() / ".cache/qatana"
