"""What a job is about: its data as batches, and how outputs become a score.

A Task has `classes`, the loaders `train`, `calibration` and `test`, a `sample` batch for latency, and `score`. The kinds
differ in nothing else, so that no stage asks which one it has."""

from __future__ import annotations

import hashlib
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from qatana.errors import DataError
from qatana.jobs import images, language, metrics, models, text
from qatana.jobs.job import ImageData, Job, LanguageData, TextData, TokenData

SAMPLE_SEED = 0  # of the test rows that Evaluation.limit picks: the same ones for every model and seed
Score = dict[str, Any]
"""value (points, 0 to 100; perplexity), rows, and of token classification: entities (EntityReport), tokens (TokenTable)"""
Predictions = dict[str, Tensor]
"""What is kept of a model's outputs on the test part: labels (predicted classes, integers), of language modeling also nll (float32)"""


class Task(ABC):
    """Data and score of one kind of job."""

    metric: str
    key: str
    shown: ClassVar[dict[str, Any]] = {}
    """How a report shows the metric, where it is no points of which more is better"""
    classes: list[str]
    trained_on: str
    """sha256 of what models are trained and calibrated on"""
    judged_on: str
    """sha256 of the test part, as far as it is used"""

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

    def read(self, logits: Tensor, batch: Any) -> Predictions:
        """What is kept of the logits of one batch."""
        return {"labels": logits.argmax(-1)}

    @abstractmethod
    def gather(self, parts: Sequence[Predictions], batch_size: int) -> Predictions:
        """What `read` kept of each batch of `test(batch_size)`, as one, in the order of the file, each tensor with one dimension."""

    @abstractmethod
    def score(self, found: Predictions) -> Score:
        """The score of what `gather` made."""


def task(job: Job) -> Task:
    """The task of a job, its data read and checked. Raises: DataError, MissingExtra."""
    if isinstance(job.data, ImageData):
        return ImageTask(job, job.data)
    if isinstance(job.data, LanguageData):
        return LanguageTask(job, job.data)
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
        self.trained_on = _digest(self.train_data.ids, self.train_data.labels, self.classes)
        self.judged_on = _digest(self.test_data.ids, self.gold)

    def gather(self, parts: Sequence[Predictions], batch_size: int) -> Predictions:
        picked = [part["labels"] for part in parts]
        tags = text.word_tags(self.test_data, self.test(batch_size).rows(0), picked, self.classes)
        class_of = {name: i for i, name in enumerate(self.classes)}
        labels = [class_of[tag] for sentence in tags for tag in sentence]
        return {"labels": torch.tensor(labels, dtype=torch.int16)}

    def score(self, found: Predictions) -> Score:
        words = iter(self.classes[i] for i in found["labels"].tolist())
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
        self.trained_on = _digest(self.train_data.ids, self.train_data.labels, self.classes)
        self.judged_on = _digest(self.test_data.ids, self.test_data.labels)

    def gather(self, parts: Sequence[Predictions], batch_size: int) -> Predictions:
        rows = torch.tensor([row for batch in self.test(batch_size).rows(0) for row in batch])
        return {"labels": _labels(parts)[torch.argsort(rows)]}

    def score(self, found: Predictions) -> Score:
        return _accuracy(found["labels"], torch.tensor(self.test_data.labels))


class ImageTask(Task):
    """A class per image; judged by accuracy."""

    metric = key = "accuracy"

    def __init__(self, job: Job, data: ImageData) -> None:
        self.data = images.load_images(job.path(data.source))
        self.classes, self.augment, self.limit = list(self.data.classes), data.augment, job.evaluation.limit
        how = (self.data.mean, self.data.std)
        self.trained_on = _digest(self.data.train_x, self.data.train_y, *how)
        self.judged_on = _digest(self.data.test_x[: self.limit], self.data.test_y[: self.limit], *how)

    def train(self, batch_size: int, seed: int) -> images.ImageBatches:
        return images.ImageBatches(self.data, "train", batch_size, augment=self.augment, seed=seed)

    def calibration(self, batch_size: int, seed: int) -> images.ImageBatches:
        return images.ImageBatches(self.data, "train", batch_size, seed=seed)

    def test(self, batch_size: int) -> images.ImageBatches:
        return images.ImageBatches(self.data, "test", batch_size, limit=self.limit)

    def sample(self, batch: int, sequence: int) -> Tensor:
        return self.data.normalise(self.data.train_x[:batch])

    def gather(self, parts: Sequence[Predictions], batch_size: int) -> Predictions:
        return {"labels": _labels(parts)}

    def score(self, found: Predictions) -> Score:
        return _accuracy(found["labels"], self.data.test_y[: self.limit])


class LanguageTask(Task):
    """Predicting the next token; judged by perplexity: the exponential of the mean negative log-likelihood of a token, in nats.

    The text is cut into blocks without overlap, and the first token of each is not predicted. The fewer tokens a block has, the less
    context its tokens have: figures compare at one `test_block` only."""

    metric = key = "perplexity"
    shown: ClassVar[dict[str, Any]] = {"unit": "perplexity", "higher_is_better": False}

    def __init__(self, job: Job, data: LanguageData) -> None:
        tokenizer = models.tokenizer(job)
        paths = (_file(text.resolve_path(job.path(where))) for where in (data.train, data.test))
        sizes = (data.block, data.test_block)
        self.train_rows, test = (language.blocks(tokenizer, p, size) for p, size in zip(paths, sizes, strict=True))
        self.test_rows = test[_limited(list(range(len(test))), job.evaluation.limit)]
        self.classes = []
        self.trained_on, self.judged_on = _digest(self.train_rows), _digest(self.test_rows)

    def train(self, batch_size: int, seed: int) -> language.Blocks:
        return language.Blocks(self.train_rows, batch_size, seed=seed)

    calibration = train

    def test(self, batch_size: int) -> language.Blocks:
        return language.Blocks(self.test_rows, batch_size, shuffle=False)

    def sample(self, batch: int, sequence: int) -> dict[str, Tensor]:
        tokens = self.train_rows.flatten()
        if len(tokens) < batch * sequence:
            raise DataError(
                f"{len(tokens)} tokens are too few for {batch} rows of {sequence}; lower benchmark.sequence"
            )
        return {"input_ids": tokens[: batch * sequence].view(batch, sequence)}

    def read(self, logits: Tensor, batch: Any) -> Predictions:
        ahead, tokens = logits[:, :-1], batch["input_ids"][:, 1:]
        nll = F.cross_entropy(ahead.flatten(0, 1).float(), tokens.flatten(), reduction="none").view(tokens.shape)
        return {"labels": ahead.argmax(-1).to(torch.int32), "nll": nll}

    def gather(self, parts: Sequence[Predictions], batch_size: int) -> Predictions:
        return {key: torch.cat([part[key].flatten() for part in parts]) for key in parts[0]}

    def score(self, found: Predictions) -> Score:
        return {"value": float(found["nll"].double().mean().exp()), "rows": len(self.test_rows)}


def _labels(parts: Sequence[Predictions]) -> Tensor:
    return torch.cat([part["labels"] for part in parts]).to(torch.int16)


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
