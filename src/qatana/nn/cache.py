"""Keys and values of earlier tokens as codes: what attention with quantized keys and values reads again at each step of a generation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qatana.errors import ModelError
from qatana.numerics import Scheme
from qatana.numerics.cache import from_cache, grows, to_cache
from qatana.quantizer import Quantizer

_MARK = "_qatana_from_codes"


class CodedStates:
    """Keys or values (B, H, T, D) in the codes of their quantizer, which grow along T. No quantizer: the numbers themselves.

    Reading gives what the quantizer makes of the whole tensor, bit for bit.
    Raises: ModelError for schemes whose scale follows from all tokens together."""

    def __init__(self, quantizer: Quantizer | None) -> None:
        if quantizer is not None and not grows(quantizer.scheme):
            raise ModelError(
                f"{quantizer.name}: {quantizer.scheme} has scales that follow from all tokens together, so a cache of codes cannot grow; "
                f"use scales per token ('int8/token', 'int4/group32', 'fp8:e4m3/token') or a static one ('int8/tensor')"
            )
        self.quantizer = quantizer
        self.parts: list[Tensor] = []
        self._size, self._dtype = 0, torch.float32

    def append(self, x: Tensor) -> Tensor:
        """Add tokens; returns all of them, read back."""
        self._size, self._dtype = x.shape[-1], x.dtype
        new = [x] if self._off else to_cache(x, self._scheme, *self._given())
        self.parts = [torch.cat(pair, dim=-2) for pair in zip(self.parts, new, strict=True)] if self.parts else new
        found = self.parts[0] if self._off else self._read()
        setattr(found, _MARK, True)
        return found

    def change(self, how: Callable[[Tensor], Tensor]) -> None:
        """Put `how(part)` in the place of every part: another order of the batch, fewer tokens, another device."""
        self.parts = [how(part) for part in self.parts]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.parts[0].shape[-2] if self.parts else 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def _off(self) -> bool:
        return self.quantizer is None or not self.quantizer.enabled

    @property
    def _scheme(self) -> Scheme:
        assert self.quantizer is not None
        return self.quantizer.scheme

    def _given(self) -> tuple[Tensor, Tensor] | tuple[()]:
        """The static scale and zero point."""
        assert self.quantizer is not None
        if self._scheme.scale == "dynamic":
            return ()
        return self.quantizer.scale.detach(), self.quantizer.zero_point

    def _read(self) -> Tensor:
        return from_cache(self.parts, self._scheme, self._size, self._dtype, *self._given())


def from_codes(x: Tensor) -> bool:
    """Whether a cache of codes gave this tensor: it is quantized already, and scales of its own would not be the same again."""
    return getattr(x, _MARK, False)
