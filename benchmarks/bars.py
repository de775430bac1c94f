"""What a step has to reach: bars 1, 2 and 4 of the price of training, as ratios that may not be exceeded."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants import BFLOAT16, CONTESTANTS, FLOAT, LAYERS, LAYERS_BFLOAT16, W4A8, W8A8, W8A8_BFLOAT16

Found = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Bar:
    """`quantity` of `who` over that of `against` is at most `bar`, on one model.   quantity: "step", "saved" or "peak" """

    model: str
    quantity: str
    who: str
    against: str
    bar: float


_STEP = {"bert": (0.60, 0.45, 1.00), "llama": (0.65, 0.50, 1.05), "resnet": (1.00, 0.80, None)}
_SAVED = {"bert": 0.50, "llama": 0.60, "resnet": 0.60}
BLOCKS = 1.15
PEERS = tuple(name for name, contestant in CONTESTANTS.items() if contestant.peer)


def bars(model: str) -> list[Bar]:
    """The bars of a model: for every operator in integers, and for the layers alone. Ahead of a peer: the step of W8A8 in float32 takes
    less than the peer's."""
    plain, half, against_half = _STEP[model]
    found = []
    for who, with_half in ((W8A8, W8A8_BFLOAT16), (LAYERS, LAYERS_BFLOAT16)):
        found += [Bar(model, "step", who, FLOAT, plain), Bar(model, "step", with_half, FLOAT, half)]
        found += [Bar(model, "step", with_half, BFLOAT16, against_half)] if against_half else []
        found += [Bar(model, "step", W4A8, who, BLOCKS), *(Bar(model, "step", who, peer, 1.0) for peer in PEERS)]
        found += [Bar(model, "saved", who, FLOAT, _SAVED[model]), Bar(model, "peak", who, FLOAT, 1.0)]
    return found


def judge(bar: Bar, found: Found) -> dict[str, Any]:
    """The bar as JSON: with the ratio, its spread over the rounds where it has one, and whether it is reached. A contestant that is missing
    or lost leaves the ratio open (None), and so is a bar on a peer passed over; any other bar is missed then."""
    verdict: dict[str, Any] = {
        "model": bar.model, "quantity": bar.quantity, "who": bar.who, "against": bar.against, "bar": bar.bar,
    }  # fmt: skip
    ratios = _ratios(bar, found)
    if not ratios:
        return verdict | {"ratio": None, "pass": None}
    ratio = statistics.median(ratios)
    return verdict | {"ratio": ratio, "min": min(ratios), "max": max(ratios), "pass": ratio <= bar.bar}


def _ratios(bar: Bar, found: Found) -> list[float]:
    ours, theirs = found.get(bar.who, {}), found.get(bar.against, {})
    if "rounds" not in ours or "rounds" not in theirs:
        return []
    if bar.quantity == "step":
        return ratios(ours["rounds"], theirs["rounds"], lambda ms: ms["step"])
    mine, other = ours["memory"][bar.quantity], theirs["memory"][bar.quantity]
    return [mine / other] if mine is not None and other else []


def ratios(
    ours: list[dict[str, float]], theirs: list[dict[str, float]], of: Callable[[dict[str, float]], float]
) -> list[float]:
    """Round by round: both turns of a round met the same machine."""
    return [of(a) / of(b) for a, b in zip(ours, theirs, strict=True)]
