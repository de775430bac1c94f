"""What a job is judged by: entity-level F1, the token-level table, accuracy.

Every function takes two lists of tag sequences, gold first, one per sentence with one tag per word.
All shares are fractions in [0, 1]; multiply by 100 for the points in which the literature prints them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypedDict

from qatana.errors import DataError, require

__all__ = ["EntityReport", "Scores", "TokenTable", "accuracy", "entity_report", "token_table"]

Tags = Sequence[Sequence[str]]


class Scores(TypedDict):
    """Precision, recall and F1 in [0, 1]; support counts gold entities or tokens."""

    precision: float
    recall: float
    f1: float
    support: int


class EntityReport(TypedDict):
    """Micro-averaged entity scores, and the scores of each type by name."""

    precision: float
    recall: float
    f1: float
    support: int
    per_type: dict[str, Scores]


class TokenTable(TypedDict):
    """Scores of each class, `O` last, their micro and macro averages; tokens = support of all classes."""

    classes: dict[str, Scores]
    micro: Scores
    macro: Scores
    tokens: int


def entity_report(gold: Tags, predicted: Tags) -> EntityReport:
    """Entity-level scores: an entity counts as found if its type, first and last word all agree.

    precision = found / predicted,  recall = found / gold,  f1 = 2 found / (predicted + gold);  0 / 0 gives 0.
    Spans are read as conlleval reads them (seqeval's default mode): an `I-X` after no `X` begins an entity.
    Raises: DataError if the lists are empty or differ in length; MissingExtra without seqeval.
    Reference: Tjong Kim Sang and De Meulder 2003; Nakayama 2018 (seqeval).
    """
    _check(gold, predicted)
    seqeval: Any = require("seqeval.metrics", extra="hf")
    if all(tag == "O" for sentence in (*gold, *predicted) for tag in sentence):
        return EntityReport(precision=0.0, recall=0.0, f1=0.0, support=0, per_type={})  # seqeval averages nothing
    report = seqeval.classification_report(
        [list(tags) for tags in gold], [list(tags) for tags in predicted], output_dict=True, zero_division=0
    )
    averages = {"micro avg", "macro avg", "weighted avg"}
    per_type = {name: _from_seqeval(row) for name, row in report.items() if name not in averages}
    return EntityReport(**_from_seqeval(report["micro avg"]), per_type=per_type)


def _from_seqeval(row: dict[str, float]) -> Scores:
    return Scores(
        precision=float(row["precision"]),
        recall=float(row["recall"]),
        f1=float(row["f1-score"]),
        support=int(row["support"]),
    )


def token_table(gold: Tags, predicted: Tags) -> TokenTable:
    """Token-level scores of every class that occurs in gold or predicted, `O` included.

    Each token counts once. micro pools the counts of all classes, so that its precision, recall and F1 all
    equal accuracy; macro is the plain mean over classes.
    Raises: DataError if the lists are empty or differ in length.
    """
    _check(gold, predicted)
    pairs = Counter(pair for g, p in zip(gold, predicted, strict=True) for pair in zip(g, p, strict=True))
    in_gold: Counter[str] = Counter()
    in_predicted: Counter[str] = Counter()
    for (true, guess), count in pairs.items():
        in_gold[true] += count
        in_predicted[guess] += count
    names = sorted(in_gold | in_predicted, key=lambda name: (name == "O", name))
    classes = {name: _scores(pairs[name, name], in_predicted[name], in_gold[name]) for name in names}
    tokens = sum(pairs.values())
    hits = sum(pairs[name, name] for name in names)
    return TokenTable(
        classes=classes,
        micro=_scores(hits, tokens, tokens),
        macro=_macro(list(classes.values())),
        tokens=tokens,
    )


def _scores(hits: int, predicted: int, gold: int) -> Scores:
    return Scores(
        precision=hits / predicted if predicted else 0.0,
        recall=hits / gold if gold else 0.0,
        f1=2 * hits / (predicted + gold) if predicted + gold else 0.0,
        support=gold,
    )


def _macro(rows: list[Scores]) -> Scores:
    return Scores(
        precision=sum(row["precision"] for row in rows) / len(rows),
        recall=sum(row["recall"] for row in rows) / len(rows),
        f1=sum(row["f1"] for row in rows) / len(rows),
        support=sum(row["support"] for row in rows),
    )


def accuracy(gold: Tags, predicted: Tags) -> float:
    """Share of equal tags (for texts: pass one sequence with a class name per text).

    Raises: DataError if the lists are empty or differ in length.
    """
    _check(gold, predicted)
    hits = total = 0
    for true, guess in zip(gold, predicted, strict=True):
        hits += sum(t == g for t, g in zip(true, guess, strict=True))
        total += len(true)
    return hits / total


def _check(gold: Tags, predicted: Tags) -> None:
    if not any(len(tags) for tags in gold):
        raise DataError("no gold tags to compare with: the evaluation data is empty; check path and split")
    if len(gold) != len(predicted):
        raise DataError(f"{len(predicted)} predicted sequences for {len(gold)} gold ones; give one for each")
    for number, (true, guess) in enumerate(zip(gold, predicted, strict=True)):
        if len(true) != len(guess):
            raise DataError(f"sequence {number}: {len(guess)} predicted tags for {len(true)} words; give one each")
