"""Errors of qatana. Each message says what is wrong, where, and what to do, in one line; the CLI exits with `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType


class QatanaError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 2


class SchemeError(QatanaError):
    """A number format, granularity or scheme that cannot exist, or does not fit its tensor."""


class RecipeError(QatanaError):
    """A recipe, target or job file with an unknown key or an impossible value."""


class ModelError(QatanaError):
    """A model that cannot be quantized as asked (no quantizable layer, NaN weights, untraceable graph)."""


class DataError(QatanaError):
    """Calibration or training data that is empty, NaN, infinite or of the wrong shape."""


class ArtifactError(QatanaError):
    """A file or folder that is truncated, foreign, or cannot be written."""


class ExportError(QatanaError):
    """A model or operator that the target's file format cannot hold."""


class MissingExtra(QatanaError):
    """An optional dependency that is needed now and is not installed."""


class ParityError(QatanaError):
    """QAT model, integer model and deployed file disagree beyond the written table."""

    exit_code = 1


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'? Known: a, b, x"`: the tail of an error message about an unknown name."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    hint = f"; did you mean '{close[0]}'?" if close else ";"
    return f"{hint} Known: {', '.join(options)}"


def require(module: str, extra: str) -> ModuleType:
    """Import an optional third-party module, or raise `MissingExtra` naming the extra that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"'{module.partition('.')[0]}' is needed here and is not installed ({error}); "
            f'run: pip install "qatana[{extra}]"'
        ) from error
