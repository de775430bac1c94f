"""Elementwise passes over large tensors: one compiled loop each, or the same function in pieces.

`sweep` computes outs = function(ins) where row i of every result depends on row i of the operands alone. torch.compile makes one loop of
the function: each number is read and written once, on all threads. Where it cannot (no C++ compiler, a small tensor, an arithmetic that
looks at its numbers) the function itself runs on pieces that stay in the processor's cache. Both give the same bits, which is a test:
the compiler neither reorders nor contracts float operations (no fast-math), and casts are kept.

QATANA_COMPILE=0 in the environment, or `compiled(False)`, does without the compiler. What it makes is kept on disk by torch
(TORCHINDUCTOR_CACHE_DIR): a loop takes 1 to 4 seconds the first time on a machine, a fraction of one in later processes."""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qatana.numerics.pieces import pieces

WORTH = 2**18
"""Elements below which a call of the compiled loop is no gain over torch's own operators."""

_state: dict[str, Any] = {"asked": os.environ.get("QATANA_COMPILE", "1") != "0"}
_loops: dict[Hashable, Callable[..., None] | None] = {}


@contextmanager
def compiled(wanted: bool) -> Iterator[None]:
    """Whether passes are compiled inside the block."""
    before, _state["asked"] = _state["asked"], wanted
    try:
        yield
    finally:
        _state["asked"] = before


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call on this machine; None: there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def sweep(
    function: Callable[..., tuple[Tensor, ...]],
    outs: Sequence[Tensor],
    ins: Sequence[Tensor | None],
    *constants: Hashable,
    compile: bool = True,
) -> None:
    """outs = function(*ins, *constants), row by row.   outs (R, *any), at least one; a result may be of another dtype than its out.

    ins        (R, *any): cut with the outs; others go to every row as they are (a vector for the columns as (1, N)); None is passed on.
               One may be an out, which is then overwritten
    function   pure, at a module's top level (compiled once per function, constants and kinds of operands)
    constants  hashable: numbers, names, schemes
    compile    False: the function branches on values of its operands"""
    if not outs[0].numel():
        return
    rows, largest = outs[0].shape[0], max((*outs, *(t for t in ins if t is not None)), key=Tensor.numel)
    worth = compile and _state["asked"] and largest.numel() >= WORTH and outs[0].device.type in ("cpu", "cuda")
    if worth and _ran(function, outs, ins, constants):
        return
    with torch.no_grad():
        for piece in pieces(largest):
            parts = (t[piece] if t is not None and t.ndim and t.shape[0] == rows else t for t in ins)
            for out, value in zip(outs, function(*parts, *constants), strict=True):
                out[piece] = value


def _kind(t: Tensor | None) -> Hashable:
    return None if t is None else (t.dtype, t.device.type, tuple(n == 1 for n in t.shape))


def _place(t: Tensor | None, outs: Sequence[Tensor]) -> int | None:
    """Which of the outs t is, if it is one: two views of the same numbers are more than the compiler can follow."""
    if t is None:
        return None
    same = (t.data_ptr() == o.data_ptr() and (t.shape, t.stride()) == (o.shape, o.stride()) for o in outs)
    return next((i for i, found in enumerate(same) if found), None)


def _loop(
    function: Callable[..., Any], outs: Sequence[Tensor], ins: Sequence[Tensor | None], constants: tuple[Hashable, ...],
    places: tuple[int | None, ...],
) -> Callable[..., None] | None:  # fmt: skip
    key = (function, constants, tuple(map(_kind, outs)), tuple(map(_kind, ins)), places)
    if key not in _loops:
        _loops[key] = _compile(function, constants, places) if compiler() else None
    return _loops[key]


def _compile(
    function: Callable[..., Any], constants: tuple[Hashable, ...], places: tuple[int | None, ...]
) -> Callable[..., None]:
    def run(outs: list[Tensor], ins: list[Tensor | None]) -> None:
        operands = [t if place is None else outs[place] for t, place in zip(ins, places, strict=True)]
        for out, value in zip(outs, function(*operands, *constants), strict=True):
            out.copy_(value)

    # torch counts recompilations by code object: each loop gets one of its own.
    own = FunctionType(run.__code__.replace(co_name=function.__name__), globals(), None, None, run.__closure__)
    compiled_loop = torch.compile(own, dynamic=True, fullgraph=True, backend=_backend)
    return lambda outs, ins: compiled_loop(
        outs, [t if place is None else None for t, place in zip(ins, places, strict=True)]
    )


def _backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    """Inductor, which tells what was called with what."""
    from torch._inductor.compile_fx import compile_fx

    inner: Any = compile_fx(graph, examples, config_patches={"emulate_precision_casts": True})

    def call(*operands: Any) -> Any:
        _called.last = inner, operands
        return inner(*operands)

    return call


class _Called(threading.local):
    """The compiled code that ran last in this thread, and its operands: tensors and sizes."""

    last: tuple[Callable[..., Any], tuple[Any, ...]] | None = None

    def take(self) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
        """What ran since the last time. It is forgotten, or it would keep the operands alive."""
        last, self.last = self.last, None
        return last


_called = _Called()


# -- calls that were made before -----------------------------------------------------------------------------------------
class _Ready(NamedTuple):
    """Compiled code for operands of certain shapes.   operands  for each, its place among outs and ins, or None and the number itself"""

    code: Callable[..., Any]
    operands: list[tuple[int | None, Any]]


_ready: dict[Hashable, _Ready] = {}
MOST_READY = 4096
"""Calls remembered; a model makes a few dozen for each shape of its batches."""


def _call_key(
    function: Callable[..., Any], outs: Sequence[Tensor], ins: Sequence[Tensor | None], constants: tuple[Hashable, ...],
    places: tuple[int | None, ...],
) -> Hashable:  # fmt: skip
    """All that torch.compile's guards ask of a call, exactly, so that one with the same key needs none of them: they take longer than many
    a loop. None where a tensor that is written shares memory with another one."""
    written = [t.untyped_storage().data_ptr() for t in outs]
    others = (t for t, place in zip(ins, places, strict=True) if t is not None and place is None)
    if len(set(written)) < len(written) or any(t.untyped_storage().data_ptr() in written for t in others):
        return None
    kinds = tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in (*outs, *ins))
    return function, constants, places, kinds, torch.get_num_threads()


def _ran(
    function: Callable[..., Any], outs: Sequence[Tensor], ins: Sequence[Tensor | None], constants: tuple[Hashable, ...]
) -> bool:
    """Whether the compiled loop did it."""
    tensors, places = (*outs, *ins), tuple(_place(t, outs) for t in ins)
    try:
        with torch.no_grad():
            key = _call_key(function, outs, ins, constants, places)
            ready = None if key is None else _ready.get(key)
            if ready is not None:
                ready.code(*(n if place is None else tensors[place] for place, n in ready.operands))
                return True
            loop = _loop(function, outs, ins, constants, places)
            if loop is None:
                return False
            _called.take()
            loop(list(outs), list(ins))
            last = _called.take()
            if key is not None and last is not None:
                _remember(key, tensors, *last)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compiler stumbles over: the result can be had without it
        _state["asked"] = False
        warnings.warn(
            f"torch.compile failed on {function.__name__} ({type(error).__name__}: {' '.join(str(error).split())[:300]}); "
            "quantized training goes on with slower operators, bit for bit the same; set QATANA_COMPILE=0 to do without this attempt",
            RuntimeWarning,
            stacklevel=3,
        )
        return False
    return True


def _remember(
    key: Hashable, tensors: Sequence[Tensor | None], code: Callable[..., Any], operands: tuple[Any, ...]
) -> None:
    """Keep what ran for later calls with this key, unless it took something else than the operands and numbers."""
    places = [next((i for i, t in enumerate(tensors) if t is x), None) for x in operands]
    if all(place is not None or isinstance(x, int) for place, x in zip(places, operands, strict=True)):
        if len(_ready) >= MOST_READY:
            _ready.clear()
        _ready[key] = _Ready(code, [(p, None if p is not None else x) for p, x in zip(places, operands, strict=True)])
