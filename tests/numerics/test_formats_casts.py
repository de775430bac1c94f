"""Float formats against ml_dtypes and torch, the affine integers against torch, HQQ against hqq."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from support.tensors import all_tensors
from torch import Tensor

from qatana.numerics import dequantize_by, fake_quantize_by, parse_format, quantize_by, scheme
from qatana.numerics.formats import FloatFormat
from qatana.numerics.half_quadratic import shrink

CASTS = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn, "e2m1": ml_dtypes.float4_e2m1fn, "float(4,3)ieee": ml_dtypes.float8_e4m3,
    "float(3,4)ieee": ml_dtypes.float8_e3m4, "float(5,10)ieee": np.float16,
}  # fmt: skip


def probes(format: FloatFormat) -> Tensor:
    """Every 2^13-th float32 within the range, all values of the format, all ties between them, and their float neighbours."""
    every = torch.arange(0, 0x7F800000, 2**13, dtype=torch.int32).view(torch.float32)
    values = format.decode(torch.arange(2 ** (format.bits - 1)))
    values = values[values.isfinite()].double()
    ties = ((values[1:] + values[:-1]) / 2).float()
    near = [torch.nextafter(ties, torch.tensor(float(side))) for side in (-1e9, 1e9)]
    x = torch.cat([every[every <= format.largest], values.float(), ties, *near])
    return torch.cat([x, -x])


@pytest.mark.parametrize("name", CASTS)
def test_casts(name: str) -> None:
    format = parse_format(name)
    assert isinstance(format, FloatFormat)
    x = probes(format)
    theirs = x.numpy().astype(CASTS[name])
    values = format.round_(x.clone())
    assert np.array_equal(values.numpy().view(np.int32), theirs.astype(np.float32).view(np.int32))
    codes = format.encode(values)
    assert np.array_equal(codes.numpy(), theirs.view(np.uint8 if format.bits <= 8 else np.uint16))
    assert torch.equal(format.decode(codes), values)
    finfo = ml_dtypes.finfo(CASTS[name])
    assert (format.largest, format.smallest_normal) == (float(finfo.max), float(finfo.smallest_normal))


@pytest.mark.parametrize(
    "format",
    [*(FloatFormat(e, m) for e in (1, 2, 3, 5) for m in (1, 2, 4)), FloatFormat(7, 2), FloatFormat(2, 7)],
    ids=str,
)
def test_any_float_is_its_closed_form(format: FloatFormat) -> None:
    """In float64: the nearest of all values; of two equally near ones that with the even code; saturating."""
    values = format.decode(torch.arange(2 ** (format.bits - 1))).double()
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat([ties, values, torch.rand(200, dtype=torch.float64) * 2 * values[-1]]).float()
    distance = (x.double()[:, None] - values).abs()
    odd = torch.arange(len(values)) % 2
    order = torch.argsort(distance + 0.0, dim=1, stable=True)[:, :2]
    first, second = order[:, 0], order[:, 1]
    tie = distance.gather(1, first[:, None]) == distance.gather(1, second[:, None])
    expected = torch.where(tie[:, 0] & (odd[first] == 1), second, first)
    assert torch.equal(format.round_(x.clone()).double(), values[expected])
    assert torch.equal(format.encode(format.round_(x.clone())).long(), expected)


def test_saturation() -> None:
    x = torch.tensor([1e30, -1e30, 464.0, 465.0, 480.0])
    assert parse_format("e4m3").round_(x.clone()).tolist() == [448.0, -448.0, 448.0, 448.0, 448.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_every_integer_width_is_its_closed_form(bits: int, symmetric: bool) -> None:
    """The quotient in float32 (that is what is rounded), all else in float64."""
    if bits == 1 and symmetric:
        return
    for sign in ("u", ""):
        s = scheme(f"{sign}int{bits}", "group64", symmetric=symmetric, scale="dynamic")
        lo, hi = (0, 2**bits - 1) if sign else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for x in all_tensors().values():
            blocks = x.reshape(-1, 64).numpy()
            low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
            if symmetric:
                zero = np.float64(2 ** (bits - 1) if sign else 0)
                scale = np.maximum(np.abs(low), np.abs(high)) / np.float32(hi - zero)
            else:
                low, high = np.minimum(low, 0), np.maximum(high, 0)
                scale = (high - low) / np.float32(hi - lo)
            scale = np.maximum(scale, np.float32(2.0**-100))
            if not symmetric:
                zero = np.clip(np.rint(np.float32(lo) - low / scale), lo, hi)
            code = np.clip(np.rint((blocks / scale).astype(np.float64)) + zero, lo, hi)
            codes, p = quantize_by(x, s)
            assert np.array_equal(codes.numpy(), code)
            assert np.array_equal(p.scale.numpy(), scale)
            values = (((code - zero).astype(np.float32)) * scale).reshape(x.shape)
            assert np.array_equal(fake_quantize_by(x, s).numpy(), values)


def test_torch_fused_operator_where_its_formula_is_ours() -> None:
    """torch multiplies by 1 / scale: with scales that are powers of two that is the same number."""
    x = torch.randn(16, 256)
    x[:, 0] = 127 / 32
    scale = torch.full((16,), 1 / 32)
    theirs = torch.fake_quantize_per_channel_affine(x.clamp(-127 / 32, 127 / 32), scale, torch.zeros(16), 0, -127, 127)
    ours = fake_quantize_by(x.clamp(-127 / 32, 127 / 32), scheme("int8", "channel", scale="dynamic"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq(bits: int) -> None:
    from hqq.core.optimize import shrink_lp_op
    from hqq.core.quantize import Quantizer

    assert torch.equal(shrink(torch.linspace(-2, 2, 999)), shrink_lp_op(torch.linspace(-2, 2, 999), 10.0, 0.7))
    for label, x in all_tensors().items():
        if label == "huge":
            continue  # its float zero point reaches 1e38 and |v|^(p-1) vanishes: no number is left to compare
        theirs, meta = Quantizer.quantize(x, nbits=bits, group_size=64, axis=1, bitpack=False, device="cpu")
        codes, p = quantize_by(x, scheme(f"hqq{bits}"))
        assert torch.equal(codes.float().view(theirs.shape), theirs.float()), label
        assert torch.equal(p.scale, meta["scale"]), label
        assert torch.equal(p.offset, meta["zero"]), label
        read = dequantize_by(codes, p, scheme(f"hqq{bits}"), x.shape)
        assert torch.equal(read, ((theirs - meta["zero"]) * meta["scale"]).view(x.shape)), label
