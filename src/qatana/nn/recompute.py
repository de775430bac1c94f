"""Outputs that codes can give again are not kept for the backward pass.

An integer layer's float output y is often kept as a whole by what follows it (GELU and SiLU keep their input, a gate keeps both
factors), although the codes from which it was computed are kept anyway and the product takes a fifth of a float one. So inside a
prepared model such a tensor is saved as what computes it, and computed once more, bit for bit, when the backward pass asks. The same
holds for the outputs of activation functions behind one.

Other hooks on saved tensors (offloading, measuring) see everything else, as they would without this one; activation checkpointing keeps
nothing in the first place. A compiled model decides for itself what it keeps."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_autograd: Any = vars(torch._C)["_autograd"]
SMALLEST = 16384
"""Elements below which a tensor is kept: a call costs more than the memory is worth."""
MOST_WORK = 1024
"""Multiply-adds for an element: at 400 G a second, 1024 of them take as long as writing it to new memory and reading it again."""
FUNCTIONS = (
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.ReLU6,
    nn.ELU,
    nn.Mish,
    nn.Tanh,
    nn.Sigmoid,
    nn.Hardswish,
    nn.LeakyReLU,
    nn.Softplus,
)
MODULES_OF = "transformers.activations"
"""Where Hugging Face has its activation functions: each is elementwise and without state."""


class _Again:
    """Computes a tensor again.   saved  how often autograd has saved it, and not asked for it yet"""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self._compute, self.saved = compute, 0
        self._held: Tensor | None = None

    def __call__(self) -> Tensor:
        """For autograd."""
        self.saved -= 1
        held, self._held = self._held, None
        return self._compute() if held is None else held

    def on_the_way(self) -> Tensor:
        """For a function behind it, whose own backward pass comes next: held for that, if it has saved the tensor."""
        found = self._compute() if self._held is None else self._held
        self._held = found if self.saved > 0 else None
        return found


class _Source(NamedTuple):
    """How to compute a tensor that lives: the tensor, its version, the function."""

    tensor: weakref.ref[Tensor]
    version: int
    again: _Again


class _State(threading.local):
    """Of one thread: what can be computed again, by the tensor's id, and the models that run (None: one that needs no hooks)."""

    def __init__(self) -> None:
        self.sources: dict[int, _Source] = {}
        self.running: list[torch.autograd.graph.saved_tensors_hooks | None] = []


_state = _State()


def pays(y: Tensor, inner: int) -> bool:
    """Whether `note` is of use for y, a product over `inner` numbers: it is large for its work, will have a gradient, and a prepared
    model runs in training."""
    if inner > MOST_WORK or torch.compiler.is_compiling() or not _state.running or _state.running[-1] is None:
        return False
    return y.requires_grad and y.numel() >= SMALLEST


def note(y: Tensor, compute: Callable[[], Tensor]) -> None:
    """Say how y can be computed again."""
    key, sources = id(y), _state.sources
    sources[key] = _Source(weakref.ref(y, lambda _: sources.pop(key, None)), y._version, _Again(compute))


def _source(x: Tensor) -> _Source | None:
    found = _state.sources.get(id(x))
    return found if found is not None and found.tensor() is x and found.version == x._version else None


class _Kept(NamedTuple):
    """A saved tensor as it is: what the outer hook made of it, the tensor whose version tells of changes in place, its version."""

    packed: Any
    tensor: Tensor | None
    version: int


def _hooks() -> torch.autograd.graph.saved_tensors_hooks:
    outer = _autograd._top_saved_tensors_default_hooks(False)

    def pack(x: Tensor) -> _Kept | _Again:
        source = _source(x)
        if source is not None:
            source.again.saved += 1
            return source.again
        if outer is not None:
            return _Kept(outer[0](x), None, 0)
        return _Kept(x, x, x._version)

    def unpack(kept: _Kept | _Again) -> Tensor:
        if not isinstance(kept, _Kept):
            with torch.no_grad():
                return kept()
        if kept.tensor is not None and kept.tensor._version != kept.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(kept.tensor.shape)} needed for gradient computation has been modified by an inplace "
                f"operation: it is at version {kept.tensor._version}, expected version {kept.version}"
            )
        return outer[1](kept.packed) if outer is not None else kept.packed

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _enter(model: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.compiler.is_compiling():
        return
    wanted = torch.is_grad_enabled() and not _state.running and _autograd._saved_tensors_hooks_is_enabled()
    hooks = _hooks() if wanted else None
    _state.running.append(hooks)
    if hooks is not None:
        hooks.__enter__()


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or not _state.running:
        return
    hooks = _state.running.pop()
    if hooks is not None:
        hooks.__exit__()


def _after_function(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    if torch.compiler.is_compiling() or not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
        return
    source = _source(args[0])
    if source is not None and pays(output, 1):
        note(output, lambda: module(source.again.on_the_way()))


def _is_function(module: nn.Module) -> bool:
    return isinstance(module, FUNCTIONS) or type(module).__module__ == MODULES_OF


def install(model: nn.Module) -> None:
    """Let a prepared model keep codes where codes suffice."""
    model.register_forward_pre_hook(_enter)
    model.register_forward_hook(_leave, always_call=True)
    for module in model.modules():
        if _is_function(module):
            module.register_forward_hook(_after_function)
