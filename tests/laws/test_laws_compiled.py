"""Laws 1 and 2 in compiled code, tensors drawn by Hypothesis: every format on every granularity, every named scheme, in every dtype.

Law 1: fake quantization is that of eager mode. Law 2: so are codes and parameters, and the values of the codes are those of fake
quantization. Symmetry, scale type and rule take turns.

One granularity is one graph, with dynamic shapes and without a break; dynamo makes another for each dtype, for no element and, where
a row is a block, for one row. The operators are opaque: what dynamo's trace, its guards and fake tensors see of them hangs on format,
granularity and dtype, and is tried for all. What follows, autograd's trace and functionalization ("aot_eager"), is the same for all
of them, and one dtype of each granularity goes through it. What a backend adds is the arithmetic around the operators: inductor adds
it here to five schemes, one of each family; to all of them, with gradients, on fixed tensors in numerics/test_inductor.

Graphs are kept, so that an example costs milliseconds; the first of its kind costs seconds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.schemes import (
    DTYPES,
    FLOATS,
    GRANULARITIES,
    INTEGERS,
    NAMED,
    RULES,
    SCALE_TYPES,
    float_scheme,
    integer_scheme,
)
from support.tensors import bits
from torch import Tensor

from qatana.numerics import Scheme, dequantize_by, fake_quantize_by, quantize_by, scheme

pytestmark = pytest.mark.slow
ANY, GROUPS, BLOCKS, ROWS = (1, 1), (1, 32), (4, 64), (1, 256)
"""What rows and columns are multiples of."""
EQUATIONS = [
    scheme("int8/channel", scale="dynamic"),
    scheme("uint4/group32", symmetric=False, scale="dynamic", rule="compressed-tensors"),
    *map(scheme, ["fp8:e4m3/token", "nf4+double", "gguf:q4_0"]),
]


def _product() -> dict[str, list[Scheme]]:
    """Granularity -> a scheme for each format, which has every scale type and every rule on one granularity or another."""
    found: dict[str, list[Scheme]] = {}
    for i, granularity in enumerate(GRANULARITIES):
        kept = [SCALE_TYPES[(i + j) % 5] for j in range(len(INTEGERS) + len(FLOATS))]
        found[granularity] = [
            integer_scheme(format, granularity, (i + j) % 2 == 0, kept[j], RULES[(i + j) % 3])
            for j, format in enumerate(INTEGERS)
        ]
        found[granularity] += [
            float_scheme(f, granularity, t) for f, t in zip(FLOATS, kept[-len(FLOATS) :], strict=True)
        ]
    return found | {f"named {i}": NAMED[i::3] for i in range(3)}


PRODUCT = _product()


def _fitting(granularity: str) -> tuple[int, int]:
    return {"group32": GROUPS, "block4x64": BLOCKS}.get(granularity, ROWS if granularity.startswith("named") else ANY)


def drawn(seed: int, kind: str, rows: int, columns: int) -> Tensor:
    """Float32, with what rounding goes wrong on: ties, signed zeros, subnormals, an outlier, constants."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "special":
        special = torch.tensor([0.0, -0.0, 1e-40, -3e-39, 6e-8, 2.0**-14, 0.5, -1.5, 300.0])
        return special[torch.arange(rows * columns).view(rows, columns).add(seed) % len(special)]
    return {"normal": x, "ties": (x * 4).round() / 8, "zeros": x * 0, "constant": x * 0 - 3, "small": x * 1e-5}[kind]


kinds = st.sampled_from(["normal", "special", "ties", "zeros", "constant", "small"])
odd = st.sampled_from([2, 3, 5, 7])
LAYOUTS = ["contiguous", "transposed", "strided"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.t().contiguous().t()
    return x.repeat_interleave(2, 1)[:, ::2] if layout == "strided" else x


Laws = Callable[[Tensor], list[list[Tensor]]]


def _compiled(function: Laws, backend: str) -> Laws:
    """Compiled with dynamic shapes, without a graph break. Exceeding the limit of graphs is an error, not eager mode."""
    torch.compiler.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=True)

    def run(x: Tensor) -> list[list[Tensor]]:
        with torch._dynamo.config.patch(recompile_limit=32, fail_on_recompile_limit_hit=True):  # type: ignore[attr-defined]
            return compiled(x)

    return run


def _all_ways(x: Tensor, s: Scheme) -> list[Tensor]:
    """Fake quantization, codes, values of the codes, parameters."""
    codes, p = quantize_by(x, s)
    return [fake_quantize_by(x, s), codes, dequantize_by(codes, p, s, x.shape, x.dtype), *p]


def _exact(x: Tensor) -> Tensor:
    return bits(x) if x.is_floating_point() else x


def _assert_laws(ours: list[Tensor], x: Tensor, s: Scheme) -> None:
    fake, _, values, *_ = ours
    assert (fake.shape, fake.dtype) == (values.shape, values.dtype) == (x.shape, x.dtype), s
    # adding 0.0: integer codes have no -0
    assert torch.equal(bits(fake + 0.0), bits(values + 0.0)), s
    for compiled, eager in zip(ours, _all_ways(x, s), strict=True):
        assert compiled.dtype == eager.dtype, s
        assert torch.equal(_exact(compiled), _exact(eager)), s


def _assert_fakes(ours: list[Tensor], x: Tensor, s: Scheme) -> None:
    """What the trace took the results for."""
    for real, fake in zip(ours, _all_ways(x.to("meta"), s), strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride()), s


@pytest.mark.parametrize("granularity", PRODUCT)
def test_laws(granularity: str) -> None:
    """Each dtype comes in a layout of its own, another one with each granularity: a graph is made for a pair of them."""
    schemes, (rows, columns), turn = PRODUCT[granularity], _fitting(granularity), list(PRODUCT).index(granularity)
    backends = ["aot_eager" if dtype == turn % 3 else "eager" for dtype in range(3)]
    compiled = [_compiled(lambda x: [_all_ways(x, s) for s in schemes], backend) for backend in backends]
    fewest = 1 if granularity in ("channel", "token") else 2  # where a row is a block, one row is one block

    @example(seed=1, kind="special", size=(3, 2), dtype=0)
    @example(seed=2, kind="ties", size=(2, 5), dtype=1)
    @example(seed=3, kind="normal", size=(5, 3), dtype=2)
    @example(seed=4, kind="normal", size=(0, 3), dtype=(turn + 1) % 3)
    @example(seed=5, kind="normal", size=(fewest, 3), dtype=(turn + 2) % 3)
    @given(
        seed=st.integers(0, 2**31), kind=kinds, size=st.tuples(odd, st.integers(2, 9)), dtype=st.sampled_from([0, 1, 2])
    )
    @settings(max_examples=8)
    def check(seed: int, kind: str, size: tuple[int, int], dtype: int) -> None:
        x = drawn(seed, kind, rows * size[0], columns * size[1]).to(DTYPES[dtype])
        x = laid_out(x, LAYOUTS[(dtype + turn) % 3])
        for ours, s in zip(compiled[dtype](x), schemes, strict=True):
            _assert_laws(ours, x, s)
            _assert_fakes(ours, x, s)

    check()


def test_laws_inductor() -> None:
    """With arithmetic around the operators that inductor compiles, exact in every dtype: doubling and a sign."""

    def around(x: Tensor) -> list[list[Tensor]]:
        found = [_all_ways(x * 2, s) for s in EQUATIONS]
        return [[-fake, codes, -values, *p] for fake, codes, values, *p in found]

    compiled = _compiled(around, "inductor")

    @given(
        seed=st.integers(0, 2**31),
        kind=st.sampled_from(["normal", "ties"]),
        rows=st.integers(1, 5),
        dtype=st.sampled_from(DTYPES),
    )
    @settings(max_examples=10)
    def check(seed: int, kind: str, rows: int, dtype: torch.dtype) -> None:
        x = drawn(seed, kind, 4 * rows, 256).to(dtype)
        for (fake, codes, values, *p), s in zip(compiled(x), EQUATIONS, strict=True):
            _assert_laws([-fake, codes, -values, *p], x * 2, s)

    check()
