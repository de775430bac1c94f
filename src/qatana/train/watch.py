"""Watch: how far codes sit at the ends of their range, and how far scales have moved since training began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qatana.quantizer import Quantizer, quantizers

SAMPLED = 16384  # codes looked at per tensor


class Watch:
    """Samples a model's quantizers whose scale does not come from the batch itself.

    start   {quantizer name: scale when training began}, kept in checkpoints"""

    def __init__(self, model: nn.Module) -> None:
        stored = {n: q for n, q in quantizers(model).items() if q.scheme.scale != "dynamic" and q.scheme.fixed is None}
        self.quantizers: dict[str, Quantizer] = stored
        self.start: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Remember the scales; those set later by warm-up count from then on."""
        self.start = {n: q.scale.detach().clone() for n, q in self.quantizers.items() if bool(q.calibrated)}

    @contextmanager
    def sampling(self, wanted: bool) -> Iterator[list[tuple[Tensor, int]]]:
        """Listen to the codes of one forward pass; yields (codes at an end, codes looked at) per tensor."""
        counts: list[tuple[Tensor, int]] = []
        if not wanted:
            yield counts
            return
        before = {name: quantizer.tap for name, quantizer in self.quantizers.items()}
        for quantizer in self.quantizers.values():
            if not quantizer.scheme.is_integer:
                continue  # it shows no codes to a tap
            quantizer.tap = _listener(quantizer, counts)
        try:
            yield counts
        finally:
            for name, quantizer in self.quantizers.items():
                quantizer.tap = before[name]

    @torch.no_grad()
    def drift(self) -> float | None:
        """Mean over quantizers of mean |scale / scale at the start - 1|, None where no scale is stored."""
        for name, quantizer in self.quantizers.items():
            if name not in self.start and bool(quantizer.calibrated):
                self.start[name] = quantizer.scale.detach().clone()
        # in the model's order, since the order of a sum is seen in its last bit and a checkpoint has another
        began = [(q, self.start[name]) for name, q in self.quantizers.items() if name in self.start]
        moved = [(quantizer.scale / scale - 1).abs().mean() for quantizer, scale in began]
        return float(torch.stack(moved).mean()) if moved else None


def saturation(counts: list[tuple[Tensor, int]]) -> float | None:
    """Share of the sampled codes at an end of their range, None if nothing was sampled."""
    looked = sum(n for _, n in counts)
    return sum(int(ends) for ends, _ in counts) / looked if looked else None


@contextmanager
def watching(model: nn.Module) -> Iterator[Callable[[], float | None]]:
    """Look at the codes of every forward pass inside the block. Yields a function: the share of those seen so far that sit at an end
    of their range, of quantizers whose scale does not come from the batch itself; None where there is none. Samples of each tensor."""
    with Watch(model).sampling(True) as counts:
        yield lambda: saturation(counts)


def _listener(quantizer: Quantizer, counts: list[tuple[Tensor, int]]) -> Callable[[str, Tensor], None]:
    lo, hi = quantizer.scheme.integer.lo, quantizer.scheme.integer.hi
    # Where real 0 is the lowest code (after a ReLU) sitting there is no clipping.
    zero_is_lowest = not quantizer.is_weight and int(quantizer.zero_point) == lo

    def listen(_name: str, codes: Tensor) -> None:
        flat = codes.flatten()
        flat = flat[
            :: flat.numel() // SAMPLED | 1
        ]  # odd: an even stride would meet the same few columns again and again
        at_end = flat == hi if zero_is_lowest else (flat == hi) | (flat == lo)
        counts.append((at_end.sum(), flat.numel()))

    return listen
