"""Validated values from plain data: the first problem of a recipe or job file in one line, with the nearest known key."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from qatana.errors import RecipeError, nearest

Model = TypeVar("Model", bound=BaseModel)


def make(cls: type[Model], values: dict[str, Any], where: str = "") -> Model:
    """Construct a pydantic model. Raises: RecipeError that names key, value and what is allowed.

    where  how messages call the mapping that `values` is ("data" of a job file); default: the class's name in lower case"""
    try:
        return cls(**values)
    except ValidationError as error:
        raise RecipeError(explain(error, cls, where)) from error


def explain(error: ValidationError, cls: type[BaseModel], where: str = "") -> str:
    """The first problem of a pydantic error in one line."""
    problem = error.errors(include_url=False)[0]
    *parents, key = problem["loc"] or ("",)
    place = ".".join(str(part) for part in (where, *parents) if str(part))
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}' in {place or cls.__name__.lower()}{nearest(str(key), _fields(parents, cls))}"
    name = ".".join(part for part in (place, str(key)) if part) or cls.__name__
    if problem["type"] == "missing":
        return f"{name}: this key is required"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if problem["type"] == "value_error" else f" (got {problem.get('input')!r})"
    return f"{name}: {message}{shown}" if key != "" else message


def _fields(parents: list[Any], cls: type[BaseModel]) -> list[str]:
    """Field names of the (possibly nested) model in which an unknown key stood."""
    current: type[BaseModel] = cls
    for part in parents:
        field = _by_key(current).get(str(part))
        current = (_model_in(field.annotation) if field else None) or current
    return list(_by_key(current))


def _by_key(cls: type[BaseModel]) -> dict[str, Any]:
    """Fields by the key that stands in a file."""
    return {field.alias or name: field for name, field in cls.model_fields.items()}


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_in(inner)
        if found:
            return found
    return None
