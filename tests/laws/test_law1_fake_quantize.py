"""Law 1: fake_quantize(x) == dequantize(quantize(x)), bit for bit, for every format, granularity, dtype and memory layout."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qatana.numerics import Granularity, IntFormat, Scheme, dequantize, fake_quantize, quantize, scale_and_zero_point
from qatana.quantizer import Quantizer, tensor_range

FORMATS = [
    IntFormat(bits, signed=s, narrow=n)
    for bits in range(2, 9)
    for s, n in ((True, False), (True, True), (False, False))
]
GRANULARITIES = ["tensor", "channel", "channel1", "token", "group4", "group8", "block2x4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """2-D tensors that all granularities fit, of all magnitudes, in all layouts."""
    rows, columns = 2 * draw(st.integers(0, 4)), 8 * draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(DTYPES))
    seed, magnitude = draw(st.integers(0, 2**32 - 1)), draw(st.sampled_from([1e-4, 1.0, 300.0]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * magnitude
    ties = draw(st.booleans())
    x = ((x * 4).round() / 8 if ties else x).to(dtype)
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        return x.repeat_interleave(2, 1)[:, ::2]
    return x


def bits(x: Tensor) -> Tensor:
    """The bit pattern, so that -0.0 and 0.0 are told apart."""
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@given(
    x=tensors(),
    format=st.sampled_from(FORMATS),
    text=st.sampled_from(GRANULARITIES),
    symmetric=st.booleans(),
    clip=st.floats(0.3, 1.2),
)
def test_law1(x: Tensor, format: IntFormat, text: str, symmetric: bool, clip: float) -> None:
    granularity = Granularity.parse(text)
    scheme = Scheme(format, granularity, symmetric or format.narrow, scale="dynamic")
    view = granularity.view(x)
    if x.numel():
        low, high = tensor_range(x, scheme)
        scale, zero = scale_and_zero_point(low * clip, high * clip, scheme)
    else:
        scale, zero = torch.tensor(0.5), torch.tensor(float(scheme.zero_point))
    codes = quantize(view, scale, zero, format)
    fake = fake_quantize(view, scale, zero, format)
    assert codes.dtype == format.dtype
    assert codes.numel() == 0 or (format.lo <= int(codes.min()) and int(codes.max()) <= format.hi)
    assert fake.dtype == x.dtype
    # adding 0.0 turns -0.0, which codes cannot hold, into 0.0: the values are the same number
    assert torch.equal(bits(fake + 0.0), bits(dequantize(codes, scale, zero, x.dtype) + 0.0))


@given(x=tensors(), format=st.sampled_from(FORMATS), text=st.sampled_from(["tensor", "channel", "group4", "block2x4"]))
def test_law1_through_the_weight_quantizer(x: Tensor, format: IntFormat, text: str) -> None:
    """The codes that a weight quantizer shows its tap, dequantized, are its forward pass."""
    if not x.numel():
        return
    scheme = Scheme(format, Granularity.parse(text), scale="dynamic")
    quantizer = Quantizer(scheme, tuple(x.shape), "weight")
    quantizer.enabled = True
    seen: list[Tensor] = []
    quantizer.tap = lambda _, codes: seen.append(codes)
    fake = quantizer(x)
    scale, zero = quantizer.weight_parameters(x)
    expected = dequantize(seen[0], scale, zero, x.dtype).reshape(x.shape)
    assert torch.equal(bits(fake + 0.0), bits(expected + 0.0))
    assert fake.shape == x.shape


@given(x=tensors(), format=st.sampled_from(FORMATS))
def test_quantizing_twice_changes_nothing(x: Tensor, format: IntFormat) -> None:
    """quantize(dequantize(codes)) == codes: what lets converters cancel the pair."""
    if not x.numel():
        return
    scheme = Scheme(format)
    scale, zero = scale_and_zero_point(*tensor_range(x, scheme), scheme)
    codes = quantize(x, scale, zero, format)
    assert torch.equal(quantize(dequantize(codes, scale, zero), scale, zero, format), codes)
