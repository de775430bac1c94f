"""Laws 1 and 2 for every scheme: fake_quantize == dequantize(quantize), bit for bit, in every dtype, layout and shape; text, JSON and
codes lose nothing. Eager mode; compiled code is test_laws_compiled."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
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

from qatana.errors import DataError
from qatana.numerics import Scheme, dequantize_by, fake_quantize_by, quantize_by, scheme

scale_types = st.sampled_from(["float32", *SCALE_TYPES])
integers = st.builds(
    integer_scheme,
    st.sampled_from(INTEGERS),
    st.sampled_from(GRANULARITIES),
    st.booleans(),
    scale_types,
    st.sampled_from(RULES),
)
floats = st.builds(float_scheme, st.sampled_from(FLOATS), st.sampled_from(GRANULARITIES), scale_types)
schemes = st.one_of(integers, floats, st.sampled_from(NAMED))


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    rows, columns = 4 * draw(st.integers(0, 2)), 256 * draw(st.integers(1, 2))
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
    kind = draw(st.sampled_from(["normal", "ties", "sparse", "small", "large"]))
    x = {"normal": x, "ties": (x * 4).round() / 8, "sparse": x * (x > 1), "small": x * 1e-5, "large": x * 300}[kind]
    x = x.to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return x.t().contiguous().t()
    return x.repeat_interleave(2, 1)[:, ::2] if layout == "strided" else x


@given(x=tensors(), s=schemes)
@settings(max_examples=150)
def test_law1(x: Tensor, s: Scheme) -> None:
    fake = fake_quantize_by(x, s)
    assert (fake.shape, fake.dtype) == (x.shape, x.dtype)
    codes, p = quantize_by(x, s)
    values = dequantize_by(codes, p, s, x.shape, x.dtype)
    # adding 0.0: integer codes have no -0
    assert torch.equal(bits(fake + 0.0), bits(values + 0.0))
    assert s.is_gguf or torch.equal(s.grid.codes(s.granularity.stack(x.contiguous()).float(), p), codes)


@given(s=schemes)
def test_text_and_json(s: Scheme) -> None:
    assert Scheme.parse(str(s)) == s
    written = json.loads(json.dumps(s.to_dict()))
    assert Scheme.from_dict(written) == s
    assert hash(Scheme.from_dict(written)) == hash(s)
    assert scheme(str(s)) == s


@given(x=tensors(), s=schemes.filter(lambda s: s.takes_scale and not s.rounds_scale))
@settings(max_examples=60)
def test_law1_with_a_given_scale(x: Tensor, s: Scheme) -> None:
    """A static scale that clips: values are those of the codes, the gradient is 1 inside and 0 outside."""
    if not x.numel():
        return
    x = x.float().contiguous()
    _, p = quantize_by(x, s)
    shape = s.granularity.scale_shape(x.shape)
    scale, offset = (p.scale * 0.6).reshape(shape), p.offset.reshape(shape)
    leaf = x.clone().requires_grad_()
    fake = fake_quantize_by(leaf, s, scale, offset)
    stack = s.granularity.stack(x)
    given = s.grid.of(s.granularity.stack_scale(scale), s.granularity.stack_scale(offset))
    values = s.grid.values(s.grid.codes(stack, given), given)
    assert torch.equal(fake + 0.0, s.granularity.unview(values, x.shape) + 0.0)
    fake.sum().backward()
    assert leaf.grad is not None
    assert set(leaf.grad.unique().tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    "s", [scheme("int8/channel", scale="dynamic"), scheme("mxfp4"), scheme("nf4+double"), scheme("gguf:q4_0")], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_law1_compiled(s: Scheme, dtype: torch.dtype) -> None:
    """One graph, no break, the bits of eager mode, forward and backward (the operators are opaque to every compiler backend)."""
    torch.compiler.reset()  # one lambda for all cases would reach dynamo's limit of recompilations
    x = torch.randn(8, 512).to(dtype).requires_grad_()
    compiled = torch.compile(lambda t: fake_quantize_by(t * 2, s), backend="aot_eager", fullgraph=True)
    eager = fake_quantize_by(x * 2, s)
    ours = compiled(x)
    assert torch.equal(bits(ours.detach()), bits(eager.detach()))
    upstream = torch.randn_like(eager)
    (a,), (b,) = (torch.autograd.grad(y, x, upstream) for y in (ours, eager))
    assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "s", [*NAMED, scheme("int4/group32", scale="dynamic"), scheme("uint8", symmetric=False, scale="dynamic")], ids=str
)
def test_numbers_that_are_not_finite_are_refused(s: Scheme, bad: float) -> None:
    x = torch.randn(4, 256)
    x[2, 77] = bad
    for product in (fake_quantize_by, quantize_by):
        with pytest.raises(DataError, match=r"shape \(4, 256\) holds (NaN|infinite values)"):
            product(x, s)


@pytest.mark.parametrize("shape", [(0,), (0, 256), (4, 0), (3, 0, 256)])
def test_zero_elements(shape: tuple[int, ...]) -> None:
    for s in [*NAMED, scheme("int8", scale="dynamic"), scheme("e4m3", scale="dynamic")]:
        x = torch.empty(shape, requires_grad=True)
        y = fake_quantize_by(x, s)
        y.sum().backward()
        assert y.shape == x.shape
