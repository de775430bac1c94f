"""Entity and token scores against hand-counted cases and scikit-learn."""

from __future__ import annotations

import sys
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatana.errors import DataError, MissingExtra
from qatana.jobs.metrics import accuracy, entity_report, token_table

TAG = st.sampled_from(["O", "B-PER", "I-PER", "B-LOC"])
PAIRS = st.lists(st.lists(st.tuples(TAG, TAG), min_size=1, max_size=8), min_size=1, max_size=6)
CLOSE = 1e-12  # a few roundings of float64 division, in another order


def test_entities_by_hand() -> None:
    """Gold: PER, LOC, LOC. Predicted: the PER, a LOC one word too short, an ORG; so 1 of 3 is found."""
    gold = [["B-PER", "I-PER", "O", "B-LOC", "I-LOC"], ["B-LOC", "O"]]
    guess = [["B-PER", "I-PER", "O", "B-LOC", "O"], ["B-ORG", "O"]]
    report = entity_report(gold, guess)
    third = pytest.approx(1 / 3, abs=CLOSE)
    assert (report["precision"], report["recall"], report["f1"], report["support"]) == (
        third,
        third,
        third,
        3,
    )
    assert report["per_type"]["PER"] == {"precision": 1, "recall": 1, "f1": 1, "support": 1}
    assert report["per_type"]["LOC"] == {"precision": 0, "recall": 0, "f1": 0, "support": 2}
    assert report["per_type"]["ORG"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_precision_and_recall_are_not_exchanged() -> None:
    report = entity_report([["B-PER", "O", "O"]], [["B-PER", "B-LOC", "O"]])
    assert (report["precision"], report["recall"]) == (0.5, 1.0)
    assert report["f1"] == pytest.approx(2 / 3, abs=CLOSE)


@pytest.mark.parametrize(
    ("gold", "guess", "f1"),
    [
        (["B-PER", "I-PER"], ["I-PER", "I-PER"], 1.0),  # an I- after nothing begins an entity
        (["B-PER", "B-PER"], ["B-PER", "I-PER"], 0.0),  # two entities are not one
        (["B-PER", "B-LOC"], ["B-PER", "I-LOC"], 1.0),  # an I- of another type begins an entity
        (["O", "O"], ["O", "O"], 0.0),  # nothing to find, nothing found
    ],
)
def test_spans_are_read_as_conlleval_reads_them(gold: list[str], guess: list[str], f1: float) -> None:
    assert entity_report([gold], [guess])["f1"] == f1


@given(PAIRS)
def test_token_table_equals_scikit_learn(pairs: list[list[tuple[str, str]]]) -> None:
    from sklearn.metrics import precision_recall_fscore_support

    gold = [[g for g, _ in sentence] for sentence in pairs]
    guess = [[p for _, p in sentence] for sentence in pairs]
    table = token_table(gold, guess)
    flat = list(chain(*gold)), list(chain(*guess))
    names = list(table["classes"])
    assert names == sorted({*flat[0], *flat[1]}, key=lambda name: (name == "O", name))
    expected = precision_recall_fscore_support(*flat, labels=names, zero_division=0)
    for name, *scores in zip(names, *expected, strict=True):
        row = table["classes"][name]
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(scores, abs=CLOSE)
    for average in ("micro", "macro"):
        scores = precision_recall_fscore_support(*flat, average=average, zero_division=0)[:3]
        row = table[average]
        assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(scores, abs=CLOSE)
    assert table["tokens"] == table["micro"]["support"] == table["macro"]["support"] == len(flat[0])
    assert table["micro"]["f1"] == pytest.approx(accuracy(gold, guess), abs=CLOSE)


def test_accuracy_by_hand() -> None:
    assert accuracy([["1", "0", "1"], ["0"]], [["1", "1", "1"], ["0"]]) == 0.75


@pytest.mark.parametrize("metric", [entity_report, token_table, accuracy])
@pytest.mark.parametrize(
    ("gold", "guess", "message"),
    [
        ([], [], "no gold tags"),
        ([[]], [[]], "no gold tags"),
        ([["O"]], [], "0 predicted sequences for 1 gold ones"),
        ([["O"], ["O", "O"]], [["O"], ["O"]], "sequence 1: 1 predicted tags for 2 words"),
    ],
)
def test_lists_that_do_not_match_are_refused(metric, gold: list, guess: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(gold, guess)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "seqeval.metrics", None)
    with pytest.raises(MissingExtra, match=r"qatana\[hf\]"):
        entity_report([["O"]], [["O"]])
