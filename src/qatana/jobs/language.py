"""Text for language models: files to blocks of tokens, blocks to batches."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatana.errors import DataError


def read_text(path: Path) -> str:
    """The whole of a UTF-8 text file, plain or .gz.   Raises: DataError if it cannot be read."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path} ({reason}); give a text file in UTF-8, plain or .gz") from error


def blocks(tokenizer: Any, path: Path, length: int) -> Tensor:
    """A text file as token ids, int64 (rows, length): consecutive pieces of one text; what is left behind the last whole one is dropped.

    Raises: DataError for a file that cannot be read or has fewer tokens than one block."""
    ids: list[int] = tokenizer(read_text(path), verbose=False)["input_ids"]
    rows = len(ids) // length
    if not rows:
        raise DataError(
            f"{path} has {len(ids)} tokens, not one block of {length}; give a longer text or a shorter block"
        )
    return torch.tensor(ids[: rows * length]).view(rows, length)


class Blocks:
    """Batches of blocks: {"input_ids", "labels"}, both the same int64 (rows, length), since a causal model shifts its labels by itself.

    `epoch(n)` depends on (rows, batch_size, seed, n) alone: `epoch(n, start=k)` goes on where a killed run had done k batches. The last
    batch of a shuffled epoch is dropped where it is not full, so that every step has as many tokens."""

    def __init__(self, rows: Tensor, batch_size: int, *, shuffle: bool = True, seed: int = 0) -> None:
        if shuffle and len(rows) < batch_size:
            raise DataError(f"{len(rows)} blocks are fewer than one batch of {batch_size}; lower batch_size or block")
        self.rows, self.batch_size, self.shuffle, self.seed = rows, batch_size, shuffle, seed

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self.rows) // self.batch_size if self.shuffle else -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of epoch `n`, from batch `start` on."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + n) % 2**63)
        order = torch.randperm(len(self.rows), generator=generator) if self.shuffle else torch.arange(len(self.rows))
        for chosen in order.split(self.batch_size)[start : len(self)]:
            ids = self.rows[chosen]
            yield {"input_ids": ids, "labels": ids}
