"""Image data sets of a few files, written byte by byte from the published descriptions of their formats.

So what a test expects never comes from the reader under test."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")


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
