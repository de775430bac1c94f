"""The engines whose arithmetic qatana computes, by name."""

from __future__ import annotations

from qatana.errors import SchemeError, nearest
from qatana.numerics.engine import Engine
from qatana.numerics.openvino import OpenVino

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (Engine(), OpenVino())}


def engine(name: str) -> Engine:
    """The engine of that name. Raises: SchemeError naming the known ones."""
    if name not in ENGINES:
        raise SchemeError(f"unknown engine arithmetic '{name}'{nearest(name, ENGINES)}")
    return ENGINES[name]
