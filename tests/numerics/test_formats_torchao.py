"""MX, NVFP4, FP8, BitNet and int4 groups against torchao, in codes, scales and values, bit for bit.

Where torchao departs from the specification or cannot do what we can, a test of its own says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.tensors import all_tensors, bits
from torch import Tensor

from qatana.numerics import Scheme, dequantize_by, quantize_by, scheme

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao speaks of compiled kernels for GPUs that are not here
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
    from torchao.prototype.quantized_training.bitnet import quantize_bitnet_weight
    from torchao.quantization import quant_primitives as primitives
    from torchao.quantization.quant_primitives import MappingType

TENSORS = all_tensors()
ELEMENTS = {
    "mxfp8:e4m3": torch.float8_e4m3fn, "mxfp8:e5m2": torch.float8_e5m2, "mxfp6:e2m3": "fp6_e2m3", "mxfp6:e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}  # fmt: skip


def ours(x: Tensor, s: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales in rows, values."""
    codes, p = quantize_by(x, s)
    return codes.reshape(x.shape), p.scale.reshape(x.shape[0], -1), dequantize_by(codes, p, s, x.shape)


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx(name: str, rule: str) -> None:
    for label, x in TENSORS.items():
        if rule == "rceil" and label in ("constant", "ties"):
            continue  # test_rceil_is_exact_where_torchao_takes_a_logarithm
        exponent, data = mx_tensor.to_mx(x, ELEMENTS[name], 32, getattr(ScaleCalculationMode, rule.upper()))
        codes, scale, values = ours(x, scheme(name, rule=rule))
        theirs = unpack_uint4(data) if name == "mxfp4" else data.view(torch.uint8)
        assert torch.equal(codes, theirs), label
        assert torch.equal(scale, mx_tensor.get_fp_scale(exponent)), label
        read = mx_tensor.to_dtype(data, exponent, ELEMENTS[name], 32, torch.float32)
        assert torch.equal(bits(values), bits(read)), label


def test_rceil_is_exact_where_torchao_takes_a_logarithm() -> None:
    """The specification (PTX cvt.rp.ue8m0) rounds max|x| / largest value up to a power of two. torchao without a GPU computes
    ceil(log2(.)) in float32, which loses quotients just above a power of two. We follow the specification."""
    quotient = torch.tensor([1.0, 1.0 + 2.0**-23, 2.0**20, 2.0**20 * (1 + 2.0**-23)])
    x = torch.zeros(4, 32)
    x[:, 0] = quotient * 448
    assert torch.equal(x[:, 0] / 448, quotient)
    _, scale, _ = ours(x, scheme("mxfp8", rule="rceil"))
    assert scale.flatten().tolist() == [1.0, 2.0, 2.0**20, 2.0**21]
    exponent, _ = mx_tensor.to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
    assert mx_tensor.get_fp_scale(exponent).flatten().tolist()[3] == 2.0**20


def test_nvfp4() -> None:
    for label, x in TENSORS.items():
        if label in ("zeros", "subnormal", "tiny"):
            continue  # torchao: 1 / tensor scale is infinite, every code 6 or -6 (NaN of zeros); ours is 2^-100 at least: zeros
        tensor_scale = x.abs().amax() / (448.0 * 6.0)
        block_scale, data = nvfp4_tensor.nvfp4_quantize(x, 16, tensor_scale)
        codes, scale, values = ours(x, scheme("nvfp4"))
        assert torch.equal(codes, unpack_uint4(data.view(torch.uint8))), label
        combined = tensor_scale * block_scale.float().reshape(len(x), -1)
        assert torch.equal(scale, combined), label
        read = f4_unpacked_to_f32(codes).view(len(x), -1, 16) * combined[..., None]
        assert torch.equal(bits(values), bits(read.view(x.shape))), label


def test_nvfp4_of_zeros_is_zero() -> None:
    """torchao gives NaN: its tensor scale is 0 and divides."""
    x = torch.zeros(2, 32)
    assert ours(x, scheme("nvfp4"))[2].count_nonzero() == 0


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("granularity", ["tensor", "token", "block4x64"])
def test_fp8(name: str, granularity: str) -> None:
    """torchao gives no scale to zeros (0 / 0); every block of the tensors here that is zero is left out by adding an element."""
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    for label, tensor in TENSORS.items():
        x = tensor.clone()
        x[:, ::64] = torch.where(x[:, ::64] == 0, 0.01, x[:, ::64])
        block = {"tensor": list(x.shape), "token": [1, x.shape[1]], "block4x64": [4, 64]}[granularity]
        scale = primitives._choose_scale_float8(x, block, dtype)
        data = primitives._quantize_affine_float8(x, scale, dtype)
        s = scheme(f"fp8:{name}/{granularity}", scale="dynamic")
        codes, p = quantize_by(x, s)
        assert torch.equal(p.scale.flatten(), scale.flatten()), label
        assert torch.equal(s.granularity.unview(codes, x.shape), data.view(torch.uint8)), label
        read = primitives._dequantize_affine_float8(data, scale)
        assert torch.equal(bits(dequantize_by(codes, p, s, x.shape)), bits(read)), label


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("name", "group"), [("int4", 32), ("int4", 128), ("int8", 64), ("int2", 32), ("uint4", 64)])
def test_integers_in_groups(name: str, group: int, symmetric: bool) -> None:
    """torchao's own equations: scales of half the range, codes from x * (1 / scale), an eps of the smallest normal."""
    s = scheme(name, group=group, symmetric=symmetric, scale="dynamic", rule="torchao")
    lo, hi = s.format.lo, s.format.hi  # type: ignore[union-attr]
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    for label, x in TENSORS.items():
        if x.shape[1] % group:
            continue
        block = [1, group]
        scale, zero = primitives.choose_qparams_affine(
            x, mapping, block, torch.int32, lo, hi, zero_point_dtype=torch.int32
        )
        theirs = primitives.quantize_affine(x, block, scale, zero, torch.int32, lo, hi)
        codes, p = quantize_by(x, s)
        assert torch.equal(p.scale.flatten(), scale.flatten()), label
        assert torch.equal(p.offset.flatten(), zero.float().flatten()), label
        assert torch.equal(codes.reshape(x.shape).int(), theirs), label
        read = primitives.dequantize_affine(theirs, block, scale, zero, torch.int32, lo, hi)
        assert torch.equal(dequantize_by(codes, p, s, x.shape), read), label


def test_bitnet() -> None:
    for label, x in TENSORS.items():
        if label == "huge":
            continue  # the sum of |x| overflows, here and there
        gamma = x.abs().mean()
        codes, p = quantize_by(x, scheme("bitnet"))
        assert torch.equal(p.scale, gamma), label
        theirs = quantize_bitnet_weight(x, gamma)
        assert torch.equal(codes.reshape(x.shape), theirs), label
        assert torch.equal(dequantize_by(codes, p, scheme("bitnet"), x.shape), theirs * gamma), label
