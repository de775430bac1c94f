"""Tensors of one layer among those of a file, and errors that name it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qatana.errors import SchemeError


def parts_of(tensors: dict[str, Tensor], layer: str, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a layer ("model.layers.0.mlp.up_proj.", "" for the file itself) by their own names."""
    return {name: tensors[layer + name] for name in names if layer + name in tensors}


def rest_of(tensors: dict[str, Tensor], layers: Iterable[str], names: Iterable[str]) -> dict[str, Tensor]:
    """Everything but those."""
    names = tuple(names)
    used = {layer + name for layer in layers for name in names}
    return {name: tensor for name, tensor in tensors.items() if name not in used}


@contextmanager
def explained(layer: str) -> Iterator[None]:
    """Errors inside begin with the layer's name. What torch or JSON say of tensors that do not fit each other is one, too."""
    where = f"{layer.removesuffix('.')}: " if layer else ""
    try:
        yield
    except SchemeError as error:
        raise SchemeError(f"{where}{error}") from error
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        line = str(error).partition("\n")[0]
        raise SchemeError(
            f"{where}what the file says of it does not fit together ({line}); copy or save the file again"
        ) from error


def section(config: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json about quantization; empty where there is none."""
    found = config.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise SchemeError("quantization_config in config.json is no object; take the one that the model was saved with")
    return found
