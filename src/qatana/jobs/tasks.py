"""What a job is about: its data as batches, and how outputs become a score.

A Task has `classes`, the loaders `train`, `calibration` and `test`, a `sample` batch for latency, and `score`. The three kinds
differ in nothing else, so that no stage asks which one it has."""

from __future__ import annotations

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qatana.errors import DataError
from qatana.jobs import images, metrics, models, text
from qatana.jobs.job import ImageData, Job, TextData, TokenData

SAMPLE_SEED = 0  # of the test rows that Evaluation.limit picks: the same ones for every model and seed
Score = dict[str, Any]
"""value (points, 0 to 100), rows, and of token classification: entities (EntityReport), tokens (TokenTable)"""


class Task(ABC):
    """Data and score of one kind of job."""

    metric: str
    key: str
    classes: list[str]
    fingerprint: str

    @abstractmethod
    def train(self, batch_size: int, seed: int) -> Any:
        """Shuffled batches, an object with epoch(n, start)."""

    @abstractmethod
    def calibration(self, batch_size: int, seed: int) -> Any:
        """Batches of the training part without augmentation."""

    @abstractmethod
    def test(self, batch_size: int) -> Any:
        """Batches of the test part, always in the same order."""

    @abstractmethod
    def sample(self, batch: int, sequence: int) -> Any:
        """One batch of exactly this size, of real data."""

    @abstractmethod
    def labels(self, outputs: Sequence[Tensor], batch_size: int) -> Tensor:
        """Predicted class ids, int64 (words or rows,), in the order of the file, from the logits of `test(batch_size)`."""

    @abstractmethod
    def score(self, labels: Tensor) -> Score:
        """The score of `labels`."""


def task(job: Job) -> Task:
    """The task of a job, its data read and checked. Raises: DataError, MissingExtra."""
    if isinstance(job.data, ImageData):
        return ImageTask(job, job.data)
    return TokenTask(job, job.data) if isinstance(job.data, TokenData) else TextTask(job, job.data)


def _limited(rows: list[Any], limit: int | None) -> list[Any]:
    """At most `limit` rows, drawn by a fixed seed, in the order of the file."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(SAMPLE_SEED).sample(range(len(rows)), limit))]


class _Encoded(Task):
    """Common to text tasks: encoded train and test parts."""

    train_data: text.Encoded
    test_data: text.Encoded
    pad_to_multiple: int

    def train(self, batch_size: int, seed: int) -> text.Batches:
        return text.Batches(self.train_data, batch_size, seed=seed, pad_to_multiple=self.pad_to_multiple)

    calibration = train

    def test(self, batch_size: int) -> text.Batches:
        return text.Batches(self.test_data, batch_size, shuffle=False, pad_to_multiple=self.pad_to_multiple)

    def sample(self, batch: int, sequence: int) -> dict[str, Tensor]:
        data = self.train_data
        fitting = [row for row in range(len(data)) if len(data.ids[row]) <= sequence]
        if not fitting:
            raise DataError(f"no text of at most {sequence} pieces to measure latency with; raise benchmark.sequence")
        rows = [fitting[i % len(fitting)] for i in range(batch)]
        return text.Batches(data, batch, pad_to_multiple=sequence).collate(rows)

    def _classes(self, job: Job, seen: list[str]) -> list[str]:
        """Classes in the order of the model's outputs where it has them already, else as the data gives them."""
        known = models.known_classes(job)
        if known is not None and set(seen) <= set(known):
            return known
        if job.float_.training is None:
            raise DataError(
                f"the model's classes {known} are not those of the data ({', '.join(seen)}); give float.training"
            )
        return seen


class TokenTask(_Encoded):
    """Tagging words; judged by entity-level F1."""

    metric, key = "entity F1", "f1"

    def __init__(self, job: Job, data: TokenData) -> None:
        paths = [text.resolve_path(job.path(where)) for where in (data.train, data.test)]
        train, test = (text.read_conll(_file(path)) for path in paths)
        test = _limited(test, job.evaluation.limit)
        tokenizer = models.tokenizer(job)
        self.classes = self._classes(job, text.label_names(train))
        self.gold = [list(sentence.tags) for sentence in test]
        self.train_data = text.encode_words(tokenizer, train, self.classes, data.max_length)
        self.test_data = text.encode_words(tokenizer, test, self.classes, data.max_length)
        self.pad_to_multiple = data.pad_to_multiple
        self.fingerprint = _digest(self.train_data.ids, self.train_data.labels, self.test_data.ids, self.gold)

    def labels(self, outputs: Sequence[Tensor], batch_size: int) -> Tensor:
        picked = [logits.argmax(-1) for logits in outputs]
        tags = text.word_tags(self.test_data, self.test(batch_size).rows(0), picked, self.classes)
        class_of = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([class_of[tag] for sentence in tags for tag in sentence])

    def score(self, labels: Tensor) -> Score:
        words = iter(self.classes[i] for i in labels.tolist())
        tags = [[next(words) for _ in sentence] for sentence in self.gold]
        entities = metrics.entity_report(self.gold, tags)
        table = metrics.token_table(self.gold, tags)
        return {"value": 100 * entities["f1"], "rows": len(self.gold), "entities": entities, "tokens": table}


class TextTask(_Encoded):
    """A class per text; judged by accuracy."""

    metric = key = "accuracy"

    def __init__(self, job: Job, data: TextData) -> None:
        path = _file(text.resolve_path(job.path(data.csv)))
        columns = (data.text_column, data.label_column)
        train = text.read_csv_classification(path, *columns, split="train", where=data.where)
        test = text.read_csv_classification(path, *columns, split="test", where=data.where)
        test = _limited(test, job.evaluation.limit)
        tokenizer = models.tokenizer(job)
        self.classes = self._classes(job, text.label_names(train))
        self.train_data = text.encode_texts(tokenizer, train, self.classes, data.max_length)
        self.test_data = text.encode_texts(tokenizer, test, self.classes, data.max_length)
        self.pad_to_multiple = data.pad_to_multiple
        self.fingerprint = _digest(
            self.train_data.ids, self.train_data.labels, self.test_data.ids, self.test_data.labels
        )

    def labels(self, outputs: Sequence[Tensor], batch_size: int) -> Tensor:
        rows = torch.tensor([row for batch in self.test(batch_size).rows(0) for row in batch])
        picked = torch.cat([logits.argmax(-1) for logits in outputs])
        return picked[torch.argsort(rows)]

    def score(self, labels: Tensor) -> Score:
        return _accuracy(labels, torch.tensor(self.test_data.labels))


class ImageTask(Task):
    """A class per image; judged by accuracy."""

    metric = key = "accuracy"

    def __init__(self, job: Job, data: ImageData) -> None:
        self.data = images.load_images(job.path(data.source))
        self.classes, self.augment, self.limit = list(self.data.classes), data.augment, job.evaluation.limit
        parts = (self.data.train_x, self.data.train_y, self.data.test_x[: self.limit], self.data.test_y[: self.limit])
        self.fingerprint = _digest(*parts, self.data.mean, self.data.std)

    def train(self, batch_size: int, seed: int) -> images.ImageBatches:
        return images.ImageBatches(self.data, "train", batch_size, augment=self.augment, seed=seed)

    def calibration(self, batch_size: int, seed: int) -> images.ImageBatches:
        return images.ImageBatches(self.data, "train", batch_size, seed=seed)

    def test(self, batch_size: int) -> images.ImageBatches:
        return images.ImageBatches(self.data, "test", batch_size, limit=self.limit)

    def sample(self, batch: int, sequence: int) -> Tensor:
        return self.data.normalise(self.data.train_x[:batch])

    def labels(self, outputs: Sequence[Tensor], batch_size: int) -> Tensor:
        return torch.cat([logits.argmax(-1) for logits in outputs])

    def score(self, labels: Tensor) -> Score:
        return _accuracy(labels, self.data.test_y[: self.limit])


def _accuracy(labels: Tensor, gold: Tensor) -> Score:
    return {"value": 100 * float((labels == gold).double().mean()), "rows": len(gold)}


def _file(path: Path | str) -> Path:
    if isinstance(path, str):
        raise DataError(f"'{path}' is no file here; data is read from files: give a path or package:NAME/path")
    return path


def _digest(*parts: Any) -> str:
    """sha256 over tensors and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())
    return digest.hexdigest()


def spread(loader: Any, batches: int) -> list[Any]:
    """So many batches, evenly spread over a loader with a length (text is sorted by length: the first are the longest)."""
    step = max(1, len(loader) // batches)
    found = list(itertools.islice(loader, step // 2, None, step))[:batches]
    if not found:
        raise DataError("the loader yielded no batch; check the data path, the split and the batch size")
    return found
