"""Formats, granularities and schemes: their values, their spelling, and every way to write one that cannot exist."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qatana.errors import SchemeError
from qatana.numerics import Granularity, IntFormat, Scheme, engine, scale_and_zero_point, scheme
from qatana.numerics.parameters import SMALLEST_SCALE


@pytest.mark.parametrize(
    ("name", "lo", "hi", "stored", "dtype"),
    [
        ("int8", -128, 127, 8, torch.int8),
        ("int8n", -127, 127, 8, torch.int8),
        ("uint8", 0, 255, 8, torch.uint8),
        ("int7n", -63, 63, 8, torch.int8),
        ("uint5", 0, 31, 8, torch.uint8),
        ("int4", -8, 7, 4, torch.int8),
        ("uint3", 0, 7, 4, torch.uint8),
        ("int2", -2, 1, 2, torch.int8),
        ("int2n", -1, 1, 2, torch.int8),
        ("uint1", 0, 1, 1, torch.uint8),
        ("int1", -1, 0, 1, torch.int8),
    ],
)
def test_formats(name: str, lo: int, hi: int, stored: int, dtype: torch.dtype) -> None:
    format = IntFormat.parse(name)
    assert (format.lo, format.hi, format.stored_bits, format.dtype, str(format)) == (lo, hi, stored, dtype, name)


@pytest.mark.parametrize("name", ["int9", "int0", "float8", "uint8n!", "INT8", "", "int", "int16"])
def test_unknown_formats(name: str) -> None:
    with pytest.raises(SchemeError, match=f"unknown number format '{name}'; write 'int8'"):
        IntFormat.parse(name)


def test_impossible_formats() -> None:
    with pytest.raises(SchemeError, match="1 to 8 bits, not 9"):
        IntFormat(9)
    with pytest.raises(SchemeError, match="narrow range exists for signed formats only"):
        IntFormat.parse("uint4n")


@pytest.mark.parametrize("text", ["tensor", "token", "channel", "channel1", "group32", "block16x32"])
def test_granularities_read_as_written(text: str) -> None:
    assert str(Granularity.parse(text)) == text


@pytest.mark.parametrize("text", ["row", "group", "group-1", "block16", "Channel", "channel-1"])
def test_unknown_granularities(text: str) -> None:
    with pytest.raises(SchemeError, match=f"unknown granularity '{text}'"):
        Granularity.parse(text)


@pytest.mark.parametrize("text", ["group0", "block0x4", "block4x0"])
def test_empty_blocks(text: str) -> None:
    with pytest.raises(SchemeError, match=f"at least one element: '{text}'"):
        Granularity.parse(text)


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        ("group32", (8, 40), r"fc.weight: group size 32 does not divide the last dimension 40 of shape \(8, 40\)"),
        ("group32", (), "group size 32 does not divide the last dimension none"),
        ("block4x4", (8, 6), r"blocks of 4x4 do not tile shape \(8, 6\)"),
        ("block4x4", (8, 4, 4), "must be 2-D"),
        ("channel2", (8, 6), r"shape \(8, 6\) has no axis 2"),
    ],
)
def test_shapes_that_do_not_fit(text: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        Granularity.parse(text).check(shape, "fc.weight")


@pytest.mark.parametrize("text", ["tensor", "channel", "channel1", "token", "group4", "block2x4"])
def test_scales_belong_to_the_right_elements(text: str) -> None:
    """The largest element per scale, against numpy on index arithmetic written out by hand."""
    x = torch.randn(6, 8)
    array, granularity = x.numpy(), Granularity.parse(text)
    expected = {
        "tensor": array.max(),
        "channel": array.max(1, keepdims=True),
        "channel1": array.max(0, keepdims=True),
        "token": array.max(1, keepdims=True),
        "group4": np.stack([array[:, :4].max(1), array[:, 4:].max(1)], 1)[..., None],
        "block2x4": np.array([[array[2 * i : 2 * i + 2, 4 * j : 4 * j + 4].max() for j in range(2)] for i in range(3)])[
            :, None, :, None
        ],
    }[text]
    view = granularity.view(x)
    found = view.amax(granularity.reduced_dims(view.ndim), keepdim=text != "tensor")
    assert found.shape == granularity.scale_shape(x.shape)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scheme("int8", scale="dynamo"), "unknown scale mode 'dynamo'; did you mean 'dynamic'"),  # type: ignore[arg-type]
        (lambda: scheme("int8", range="mes"), "unknown range estimator 'mes'; did you mean 'mse'"),  # type: ignore[arg-type]
        (lambda: scheme("int8", "token"), "set scale='dynamic'"),
        (lambda: scheme("int8n", symmetric=False), "no room for a zero point"),
        (lambda: scheme("uint8", fixed=(0.0, 0)), "scale > 0"),
        (lambda: scheme("uint8", fixed=(0.1, 256)), "zero point within uint8"),
        (
            lambda: Scheme.from_dict({"format": "int8", "granularty": "tensor"}),
            "unknown key 'granularty' in a scheme; did you mean 'granularity'",
        ),
        (lambda: Scheme.from_dict({"symmetric": True}), "needs a 'format'"),
        (lambda: engine("onnxrt"), "unknown engine arithmetic 'onnxrt'"),
    ],
)
def test_impossible_schemes(make: Any, message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        make()


def test_schemes_print_and_count() -> None:
    assert str(scheme("int4", "group32", scale="learned", range="mse")) == "int4/group32 sym learned mse"
    assert str(scheme("uint8", symmetric=False, fixed=(0.5, 3))) == "uint8/tensor asym fixed=0.5,3"
    assert str(scheme("int8", "token", scale="dynamic")) == "int8/token sym dynamic"
    assert scheme("int4", "group32").bits_per_element == 5.0  # 4 + 32 / 32
    assert scheme("int2", "block4x16").bits_per_element == 2.5  # 2 + 32 / 64
    assert (scheme("int4").zero_point, scheme("uint4").zero_point) == (0, 8)


def test_parameters_of_a_range() -> None:
    """scale = (high - low) / 255 and max|x| / 127 in float32; zero is always a code."""
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([3.0, 2.0, -1.0, 0.0])
    scale, zero = scale_and_zero_point(low, high, scheme("uint8", symmetric=False))
    expected = (np.float32([3, 2, 0, 0]) - np.float32([-1, 0, -3, 0])) / np.float32(255)
    assert scale.tolist() == [*expected[:3].tolist(), SMALLEST_SCALE]
    assert zero.tolist() == [64.0, 0.0, 255.0, 0.0]
    scale, zero = scale_and_zero_point(low, high, scheme("int8"))
    assert scale.tolist() == [*(np.float32([3, 2, 3]) / np.float32(127)).tolist(), SMALLEST_SCALE]
    assert zero.tolist() == [0.0] * 4
