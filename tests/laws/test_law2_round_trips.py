"""Law 2: packing, JSON, YAML and state_dict round trips lose nothing."""

from __future__ import annotations

import json
from typing import Any

import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qatana.numerics import Granularity, IntFormat, Scheme, pack, unpack
from qatana.quantizer import Quantizer
from qatana.recipe import TARGETS, Recipe, Rule

formats = st.builds(lambda b, s: IntFormat(b, s), st.integers(2, 8), st.booleans())
any_format = st.builds(lambda b, k: IntFormat(b, k != "u", k == "n"), st.integers(2, 8), st.sampled_from("usn"))
sizes = st.integers(1, 512)
granularities = st.one_of(
    st.sampled_from([Granularity("tensor"), Granularity("token")]),
    st.builds(lambda a: Granularity("channel", axis=a), st.integers(0, 5)),
    st.builds(lambda n: Granularity("group", size=n), sizes),
    st.builds(lambda r, n: Granularity("block", rows=r, size=n), sizes, sizes),
)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    format, granularity = draw(any_format), draw(granularities)
    scale = "dynamic" if granularity.kind == "token" else draw(st.sampled_from(["static", "dynamic", "learned"]))
    known = st.tuples(st.floats(1e-6, 1e3), st.integers(format.lo, format.hi))
    return Scheme(
        format,
        granularity,
        symmetric=format.narrow or draw(st.booleans()),
        scale=scale,  # type: ignore[arg-type]
        range=draw(st.sampled_from(["minmax", "moving_average", "percentile", "mse"])),
        fixed=draw(st.none() | known),
    )


@given(format=formats, shape=st.lists(st.integers(0, 9), min_size=1, max_size=3), data=st.data())
def test_packing(format: IntFormat, shape: list[int], data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = torch.randint(format.lo, format.hi + 1, shape, generator=torch.Generator().manual_seed(seed)).to(
        format.dtype
    )
    packed = pack(codes, format)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], -(-shape[-1] * format.bits // 8))
    assert torch.equal(unpack(packed, shape[-1], format), codes)


@given(scheme=schemes())
def test_schemes(scheme: Scheme) -> None:
    written = json.loads(json.dumps(scheme.to_dict()))
    assert Scheme.from_dict(written) == scheme
    assert hash(Scheme.from_dict(written)) == hash(scheme)
    assert IntFormat.parse(str(scheme.format)) == scheme.format
    assert Granularity.parse(str(scheme.granularity)) == scheme.granularity


changes = st.fixed_dictionaries(
    {},
    optional={"format": any_format.map(str), "symmetric": st.just(True), "range": st.sampled_from(["mse", "minmax"])},
)
text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)
rules = st.builds(
    Rule,
    match=text,
    type=text,
    skip=st.booleans(),
    reason=text,
    schemes=st.dictionaries(st.sampled_from(["weight", "input", "output", "key"]), st.none() | changes, max_size=3),
)


@given(target=st.sampled_from(sorted(TARGETS)), listed=st.lists(rules, max_size=3), reduce=st.booleans())
def test_recipes(target: str, listed: list[Rule], reduce: bool) -> None:
    recipe = Recipe(target=target, rules=tuple(listed), reduce_range=reduce)
    assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


@given(scheme=schemes(), seed=st.integers(0, 1000))
def test_state_of_a_quantizer(scheme: Scheme, seed: int) -> None:
    """Weights: state_dict -> a fresh quantizer -> the same codes; nothing is derived again."""
    rows = 2 * max(1, scheme.granularity.rows)
    shape: tuple[int, ...] = (rows, 2 * max(1, scheme.granularity.size))
    if scheme.granularity.kind == "channel":
        shape = (3,) * (scheme.granularity.axis + 1)
    if shape[0] * shape[-1] > 2**14:
        return  # as true of large tensors, only slower
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    a, b = (_quantizer(scheme, shape) for _ in range(2))
    a.settle(weight)
    b.load_state_dict(a.state_dict())
    for quantizer in (a, b):
        quantizer.enabled = True
    assert torch.equal(a(weight), b(weight))
    assert _all_equal(a.state_dict(), b.state_dict())


def _quantizer(scheme: Scheme, shape: tuple[int, ...]) -> Quantizer:
    return Quantizer(scheme, shape, "w")


def _all_equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
