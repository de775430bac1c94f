"""Integers, FP8 and NVFP4 against compressed-tensors (0.20.0): its scales, zero points, codes and values from the same tensor, bit for bit.

`calculate_qparams` makes the parameters, `quantize` and `dequantize` the rest. The layouts of its files are
test_storage_compressed_tensors."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.tensors import all_tensors, bits
from torch import Tensor

from qatana.errors import DataError, SchemeError
from qatana.numerics import Parameters, Scheme, dequantize_by, fake_quantize_by, quantize_by, scheme

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        compute_dynamic_scales_and_zp,
        generate_gparam,
    )

TENSORS = all_tensors()
RULE = "compressed-tensors"


def fitting(group: int) -> dict[str, Tensor]:
    return {label: x for label, x in TENSORS.items() if x.shape[1] % group == 0}


def ranges(x: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Smallest and largest element as an observer hands them over."""
    if args.strategy == "tensor":
        return x.amin().reshape(1), x.amax().reshape(1)
    if args.group_size:
        view = x.unflatten(-1, (-1, args.group_size))
        return view.amin(-1), view.amax(-1)
    return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)


def theirs(x: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale, zero point, codes (floats: levels) and values."""
    scale, zero = calculate_qparams(*ranges(x, args), args)
    codes = quantize(x, scale, zero, args, dtype=args.pytorch_dtype())
    return scale, zero, codes, dequantize(codes, scale, zero, args)


def assert_integers_same(label: str, x: Tensor, s: Scheme, reference: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scale, zero, codes, values = reference
    ours, p = quantize_by(x, s)
    assert torch.equal(bits(p.scale.flatten()), bits(scale.flatten())), label
    assert torch.equal(p.offset.flatten(), zero.float().flatten()), label
    assert torch.equal(ours.reshape(x.shape), codes.reshape(x.shape)), label
    assert torch.equal(bits(dequantize_by(ours, p, s, x.shape)), bits(values.reshape(x.shape))), label
    assert torch.equal(fake_quantize_by(x, s), values.reshape(x.shape)), label


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["group128", "group32", "channel", "tensor"])
@pytest.mark.parametrize("width", [2, 3, 4, 5, 6, 7, 8])
def test_integer_weights(width: int, granularity: str, symmetric: bool) -> None:
    group = int(granularity[5:]) if granularity.startswith("group") else None
    args = QuantizationArgs(
        num_bits=width, symmetric=symmetric, strategy="group" if group else granularity, group_size=group
    )
    s = scheme(f"int{width}/{granularity}", symmetric=symmetric, scale="dynamic", rule=RULE)
    for label, x in fitting(group or 1).items():
        assert_integers_same(label, x, s, theirs(x, args))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [4, 8])
def test_integer_activations_per_token(width: int, symmetric: bool) -> None:
    """Their tokens are the first two dimensions of (batch, tokens, features); of a matrix they take one scale for all."""
    args = QuantizationArgs(num_bits=width, symmetric=symmetric, strategy="token", dynamic=True)
    s = scheme(f"int{width}/token", symmetric=symmetric, rule=RULE)
    for label, matrix in TENSORS.items():
        x = matrix.unflatten(0, (2, -1))
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
        codes = quantize(x, scale, zero, args, dtype=torch.int8)
        assert_integers_same(label, x, s, (scale, zero, codes, dequantize(codes, scale, zero, args)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_of_fewer_bits(symmetric: bool, dtype: torch.dtype) -> None:
    """`scale_dtype`: scales are rounded to it after the zero point was found; zeros have the eps of that type."""
    args = QuantizationArgs(num_bits=4, symmetric=symmetric, strategy="group", group_size=32, scale_dtype=dtype)
    kept = str(dtype).removeprefix("torch.")
    s = scheme("int4/group32", symmetric=symmetric, scale="dynamic", rule=RULE, scale_type=kept)
    for label, x in fitting(32).items():
        assert_integers_same(label, x, s, theirs(x, args))


def test_ties_go_to_even_codes() -> None:
    """By hand: range -1 .. 14 has scale 1 and zero point -7, so 0.5 is -6.5 and goes to the code -6, level 1. As a level it goes to 0."""
    x = torch.zeros(1, 32)
    x[0, :4] = torch.tensor([-1.0, 14.0, 0.5, 1.5])
    s = scheme("int4/channel", symmetric=False, scale="dynamic", rule=RULE)
    codes, p = quantize_by(x, s)
    assert (p.scale.item(), p.offset.item()) == (1.0, -7.0)
    assert codes[0, :5].tolist() == [-8, 7, -6, -6, -7]
    assert quantize_by(x, s.with_(rule=""))[0][0, :5].tolist() == [-8, 7, -7, -5, -7]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype: torch.dtype) -> None:
    """compressed-tensors computes in the weight's dtype: x / scale is rounded to 8 or 11 bits, and then to an integer. We follow its
    equation in float32, which rounds once, because a QAT weight is float32. Its scales in that dtype are ours with that scale type, bit
    for bit; its codes are ours of its own rounded quotients, and another code is the neighbour, where the quotient lies within its last
    place of a tie."""
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    s = scheme("compressed-tensors:int4", scale_type=str(dtype).removeprefix("torch."))
    for label in ("random", "minilm"):
        x = TENSORS[label].to(dtype)
        scale, _, codes, _ = theirs(x, args)
        ours, p = quantize_by(x, s)
        assert torch.equal(p.scale.flatten(), scale.float().flatten()), label
        assert p.scale.dtype == torch.float32
        view = x.unflatten(-1, (-1, 128))
        quotient = view.float() / scale.float().unsqueeze(-1)
        other = ours.reshape(x.shape) != codes
        apart = (quotient - quotient.floor() - 0.5).abs().flatten(-2)[other]
        assert float(apart.max()) <= 2 * torch.finfo(dtype).eps, (
            label
        )  # quotients lie below 8: half a last place of 4 .. 8
        assert int((ours.reshape(x.shape).int() - codes.int()).abs().max()) == 1, label
        rounded = (view / scale.unsqueeze(-1)).float()
        one = Parameters(torch.ones(()), torch.zeros(()), torch.ones(()))
        assert torch.equal(s.grid.codes(rounded, one).reshape(x.shape), codes), label


@pytest.mark.parametrize(
    ("preset", "s"),
    [
        ("W4A16", scheme("compressed-tensors:int4")),
        ("W4A16_ASYM", scheme("compressed-tensors:int4", symmetric=False)),
        ("W8A16", scheme("compressed-tensors:int8")),
        ("W8A8", scheme("compressed-tensors:int8/channel")),
    ],
)
def test_presets(preset: str, s: Scheme) -> None:
    """The short names stand for the weights of the library's own presets."""
    weights = preset_name_to_scheme(preset, ["Linear"]).weights
    assert weights is not None
    assert_integers_same(preset, TENSORS["minilm"], s, theirs(TENSORS["minilm"], weights))


FP8 = {"channel": {}, "tensor": {}, "group128": {"strategy": "group", "group_size": 128}}


@pytest.mark.parametrize("granularity", FP8)
def test_fp8(granularity: str) -> None:
    options: dict[str, Any] = {"strategy": granularity} | FP8[granularity]
    args = QuantizationArgs(num_bits=8, type="float", **options)
    s = scheme(f"fp8:e4m3/{granularity}", scale="dynamic")
    for label, x in fitting(args.group_size or 1).items():
        assert_floats_same(label, x, s, theirs(x, args))


def test_fp8_activations_per_token() -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    for label, matrix in TENSORS.items():
        x = matrix.unflatten(0, (2, -1))
        scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module())
        codes = quantize(x, scale, None, args, dtype=args.pytorch_dtype())
        reference = scale, zero, codes, dequantize(codes, scale, None, args)
        assert_floats_same(label, x, scheme("fp8:e4m3/token"), reference)


def assert_floats_same(label: str, x: Tensor, s: Scheme, reference: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    scale, _, codes, values = reference
    ours, p = quantize_by(x, s)
    assert torch.equal(bits(p.scale.flatten()), bits(scale.flatten())), label
    # adding 0.0: an added zero point of 0 turns their -0 into 0, where they have one
    levels = ours.view(torch.float8_e4m3fn).float().reshape(x.shape)
    assert torch.equal(bits(levels + 0.0), bits(codes.float().reshape(x.shape) + 0.0)), label
    assert torch.equal(dequantize_by(ours, p, s, x.shape), values.reshape(x.shape)), label


def test_nvfp4() -> None:
    """With rule "compressed-tensors"; without it NVFP4 is torchao's, whose global scale is not stored inverse."""
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    s = scheme("nvfp4", rule=RULE)
    assert str(s) == "e2m1/group16 sym dynamic e4m3:compressed-tensors"
    for label, x in TENSORS.items():
        whole = generate_gparam(x.amin(), x.amax())
        local, _ = calculate_qparams(*ranges(x, args), args, global_scale=whole)
        levels = quantize(x, local, None, args, global_scale=whole)
        ours, p = quantize_by(x, s)
        assert torch.equal(bits(p.scale.flatten()), bits((local / whole).flatten())), label
        assert torch.equal(s.format.decode(ours).reshape(x.shape), levels), label  # type: ignore[union-attr]
        read = dequantize(levels, local, None, args, global_scale=whole)
        assert torch.equal(dequantize_by(ours, p, s, x.shape), read), label
        assert torch.equal(fake_quantize_by(x, s), read), label


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("s", [scheme("compressed-tensors"), scheme("nvfp4", rule=RULE)], ids=str)
def test_numbers_that_are_not_finite_are_refused(s: Scheme, bad: float) -> None:
    x = torch.randn(2, 128)
    x[1, 3] = bad
    with pytest.raises(DataError, match=r"holds (NaN|infinite values)"):
        quantize_by(x, s)


def test_powers_of_two_are_refused() -> None:
    with pytest.raises(SchemeError, match="rule 'compressed-tensors' stores float32, float16 or bfloat16 scales"):
        scheme("int4/group32 sym dynamic e8m0:floor rule=compressed-tensors")
