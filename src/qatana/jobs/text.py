"""Text tasks of a job: find the data, read it, tokenize it, serve it in batches.

The path of a sentence is `resolve_path` -> `read_conll` or `read_csv_classification` -> `encode_words` or
`encode_texts` -> `Batches`, and back again with `word_tags`. Three promises hold along it:

* nothing is lost silently: what truncation cuts is counted in `Encoded.truncation` and logged;
* every word stays countable: `word_tags` gives one tag per word of the file, whatever the tokenizer cut;
* the order is a function of (seed, epoch) alone, so a killed training resumes on the very next batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qatana.errors import DataError
from qatana.jobs.text_files import (
    Example,
    Sentence,
    label_names,
    read_conll,
    read_csv_classification,
    resolve_path,
)

__all__ = [
    "Batches",
    "Encoded",
    "Example",
    "Sentence",
    "Truncation",
    "encode_texts",
    "encode_words",
    "label_names",
    "read_conll",
    "read_csv_classification",
    "resolve_path",
    "word_tags",
]

IGNORE = -100  # torch's cross entropy skips this label
POOL = 50  # batches sorted by length together: little padding, yet other neighbours every epoch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Truncation:
    """What did not fit: rows cut, and words without any piece left (cut off, or empty for the tokenizer)."""

    rows: int = 0
    words: int = 0
    max_length: int = 0

    def __str__(self) -> str:
        return f"{self.rows} rows cut at {self.max_length} pieces, {self.words} words lost"


# --- words to integers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """A tokenized data set.

    ids: word-piece ids with special tokens, a list per row.
    labels: per row a label per piece (words; -100 but at the first piece of a word) or one int (texts).
    first_piece: per row and word the place of its first piece, -1 if it has none; empty for texts.
    inputs: names of the tensors that the model takes. pad: id to pad with.
    """

    ids: list[list[int]]
    labels: list[list[int]] | list[int]
    first_piece: list[list[int]]
    inputs: tuple[str, ...]
    pad: int
    truncation: Truncation

    def __len__(self) -> int:
        return len(self.ids)


def encode_words(tokenizer: Any, sentences: Sequence[Sentence], names: Sequence[str], max_length: int = 128) -> Encoded:
    """Tokenize sentences; the label of a word goes to its first word piece, every other piece gets -100.

    tokenizer: a fast Hugging Face one. names[i]: the tag of class i. max_length: in pieces, special ones too.
    Raises: DataError for no sentences, an unknown tag, a slow tokenizer, max_length too small.
    """
    _check(tokenizer, sentences, max_length)
    class_of = {name: number for number, name in enumerate(names)}
    batch = tokenizer([list(s.words) for s in sentences], is_split_into_words=True, verbose=False)
    ids: list[list[int]] = []
    labels: list[list[int]] = []
    first_piece: list[list[int]] = []
    cut = lost = 0
    for row, sentence in enumerate(sentences):
        pieces, word_of = _cut(batch["input_ids"][row], batch.word_ids(row), max_length)
        cut += len(pieces) < len(batch["input_ids"][row])
        first = _first_pieces(word_of, len(sentence.words))
        lost += first.count(-1)
        row_labels = [IGNORE] * len(pieces)
        for place, tag in zip(first, sentence.tags, strict=True):
            if tag not in class_of:
                raise DataError(f"tag {tag!r} in sentence {row} is none of the classes {', '.join(names)}")
            if place >= 0:
                row_labels[place] = class_of[tag]
        ids.append(pieces)
        labels.append(row_labels)
        first_piece.append(first)
    return _encoded(tokenizer, ids, labels, first_piece, Truncation(cut, lost, max_length))


def encode_texts(tokenizer: Any, examples: Sequence[Example], names: Sequence[str], max_length: int = 128) -> Encoded:
    """Tokenize texts, one class id each; `names[i]` is class i. Raises: as `encode_words`."""
    _check(tokenizer, examples, max_length)
    class_of = {name: number for number, name in enumerate(names)}
    for row, example in enumerate(examples):
        if example.label not in class_of:
            raise DataError(f"label {example.label!r} of text {row} is none of the classes {', '.join(names)}")
    batch = tokenizer([e.text for e in examples], verbose=False)
    ids: list[list[int]] = []
    cut = lost = 0
    for row, whole in enumerate(batch["input_ids"]):
        word_of = batch.word_ids(row)
        pieces, kept = _cut(whole, word_of, max_length)
        cut += len(pieces) < len(whole)
        lost += len(set(word_of) - set(kept))
        ids.append(pieces)
    labels = [class_of[e.label] for e in examples]
    return _encoded(tokenizer, ids, labels, [], Truncation(cut, lost, max_length))


def _check(tokenizer: Any, data: Sequence[object], max_length: int) -> None:
    if not data:
        raise DataError("no data to tokenize: the list of texts is empty; check the path and the split")
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} cannot map pieces to words; take a fast (Rust) tokenizer")
    limit = tokenizer.model_max_length
    if not 3 <= max_length <= limit:
        raise DataError(f"max_length={max_length} is outside 3..{limit} of this tokenizer; choose one within")


def _cut(ids: list[int], word_of: list[int | None], length: int) -> tuple[list[int], list[int | None]]:
    """Drop pieces of words from the end until `length` is left; the special pieces behind them stay."""
    excess = len(ids) - length
    if excess <= 0:
        return ids, word_of
    end = max(place for place, word in enumerate(word_of) if word is not None) + 1
    return ids[: end - excess] + ids[end:], word_of[: end - excess] + word_of[end:]


def _first_pieces(word_of: Sequence[int | None], words: int) -> list[int]:
    first = [-1] * words
    for place in range(len(word_of) - 1, -1, -1):
        word = word_of[place]
        if word is not None:
            first[word] = place
    return first


def _encoded(
    tokenizer: Any,
    ids: list[list[int]],
    labels: list[list[int]] | list[int],
    first_piece: list[list[int]],
    truncation: Truncation,
) -> Encoded:
    if truncation.rows or truncation.words:
        log.warning("%s; raise max_length to keep them", truncation)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    known = ("input_ids", "attention_mask", "token_type_ids")
    inputs = tuple(name for name in known if name in tokenizer.model_input_names)
    return Encoded(ids, labels, first_piece, inputs, pad or 0, truncation)


# --- integers to tensors ----------------------------------------------------------------------------------


class Batches:
    """Batches of an `Encoded` data set: dicts of int64 tensors (rows, length) as the model takes them.

    Labels are (rows, length) for words, (rows,) for texts. Rows of like length stand together, and a batch is
    padded on the right to a multiple of `pad_to_multiple`, so that little is computed on padding.
    `epoch(n)` depends on (data, batch_size, seed, n) alone: two runs agree, and `epoch(n, start=k)` goes on
    where a killed run had done k batches. Iterating over the object itself gives epoch 0, always the same.
    With `shuffle=False` rows are sorted by length, longest first (a lack of memory shows at once).
    `rows(n)` names the rows in each batch, to put predictions back in the order of the file: see `word_tags`.

    Raises: DataError for no data or a batch size below 1.
    """

    def __init__(
        self, data: Encoded, batch_size: int, *, shuffle: bool = True, seed: int = 0, pad_to_multiple: int = 8
    ) -> None:
        if not len(data):
            raise DataError("no rows to make batches of: the data set is empty; check the path and the split")
        if batch_size < 1 or pad_to_multiple < 1:
            raise DataError(f"batch_size={batch_size}, pad_to_multiple={pad_to_multiple}: both must be at least 1")
        self.data = data
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.pad_to_multiple = pad_to_multiple

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.epoch(0)

    def epoch(self, n: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of epoch `n`, from batch `start` on."""
        for rows in self.rows(n)[start:]:
            yield self.collate(rows)

    def rows(self, n: int = 0) -> list[list[int]]:
        """The rows of the data set in each batch of epoch `n`; each row stands in exactly one batch."""
        size = self.batch_size
        lengths = torch.tensor([len(ids) for ids in self.data.ids])
        if not self.shuffle:
            order = torch.sort(lengths, descending=True, stable=True).indices
            return [part.tolist() for part in order.split(size)]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + n) % 2**63)
        order = torch.randperm(len(self.data), generator=generator)
        pools = [pool[torch.sort(lengths[pool], stable=True).indices] for pool in order.split(size * POOL)]
        batches = [part.tolist() for pool in pools for part in pool.split(size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of the given rows, padded to their longest one rounded up."""
        longest = max(len(self.data.ids[row]) for row in rows)
        length = -(-longest // self.pad_to_multiple) * self.pad_to_multiple
        ids = torch.full((len(rows), length), self.data.pad)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        for i, row in enumerate(rows):
            pieces = self.data.ids[row]
            ids[i, : len(pieces)] = torch.tensor(pieces)
            mask[i, : len(pieces)] = 1
        tensors = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        return {name: tensors[name] for name in self.data.inputs} | {"labels": self._labels(rows, length)}

    def _labels(self, rows: Sequence[int], length: int) -> Tensor:
        picked = [self.data.labels[row] for row in rows]
        padded = [x if isinstance(x, int) else x + [IGNORE] * (length - len(x)) for x in picked]
        return torch.tensor(padded)


def word_tags(
    data: Encoded, rows: Sequence[Sequence[int]], classes: Sequence[Tensor], names: Sequence[str]
) -> list[list[str]]:
    """One tag per word, sentences in the order of the file, from class ids per piece, batch by batch.

    rows: `Batches.rows(n)`; classes: for each of those batches the predicted class ids, int64 (rows, length).
    A word without a piece, cut by truncation, gets `O`: it counts in every metric as a miss if it was a name.
    """
    tags: list[list[str]] = [[] for _ in range(len(data))]
    for batch, predicted in zip(rows, classes, strict=True):
        for row, ids in zip(batch, predicted.tolist(), strict=True):
            tags[row] = [names[int(ids[place])] if place >= 0 else "O" for place in data.first_piece[row]]
    return tags
