"""torch's own narrow dtypes, and the weights of its int4 CPU matmul."""

from __future__ import annotations

import pytest
import torch
from support.tensors import minilm

from qatana.errors import SchemeError
from qatana.numerics import storage
from qatana.numerics.formats import FloatFormat
from qatana.numerics.scales import Parameters

FORMATS = {"e4m3": FloatFormat(4, 3, "fn"), "e5m2": FloatFormat(5, 2, "ieee")}


@pytest.mark.parametrize("name", FORMATS)
def test_float8_is_torchs_cast(name: str) -> None:
    """Within the range torch's cast and ours agree; beyond it E4M3 becomes NaN there and saturates here."""
    format = FORMATS[name]
    x = torch.cat([minilm().flatten()[:4096] * 100, torch.linspace(-format.largest, format.largest, 4001)])
    codes = format.encode(format.round_(x.clone()))
    tensor = storage.pack_float8(codes, name)
    assert torch.equal(tensor.view(torch.uint8), x.to(tensor.dtype).view(torch.uint8))
    read, found = storage.unpack_float8(tensor)
    assert found == name
    assert torch.equal(read, codes)
    assert torch.equal(tensor.float(), format.decode(codes))


def test_e8m0() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    tensor = storage.pack_float8(codes, "e8m0")
    assert torch.equal(tensor.float().double(), 2.0 ** (codes.double() - 127))
    assert torch.equal(storage.unpack_float8(tensor)[0], codes)


def test_float4_holds_the_first_of_two_in_the_low_nibble() -> None:
    codes = torch.tensor([[1, 2, 3, 15]], dtype=torch.uint8)
    tensor = storage.pack_float4(codes)
    assert tensor.dtype == torch.float4_e2m1fn_x2
    assert tensor.view(torch.uint8).tolist() == [[0x21, 0xF3]]
    assert torch.equal(storage.unpack_float4(tensor), codes)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("rows", [16, 48, 96])
def test_int4_matmul(group: int, rows: int) -> None:
    """The packed order depends on the processor; what torch computes with it does not: x @ W.T in bfloat16."""
    codes = torch.randint(0, 16, (rows, 256), dtype=torch.uint8)
    scale = torch.rand(rows, 256 // group, 1).bfloat16().float() / 8
    offset = torch.full_like(scale, 8)
    tensors = storage.pack_int4_matmul(codes, Parameters(scale, offset, scale))
    read, parameters = storage.unpack_int4_matmul(tensors)
    assert torch.equal(read, codes)
    assert torch.equal(parameters.scale, scale)
    assert torch.equal(parameters.offset, offset)
    weight = ((codes.float().unflatten(-1, (-1, group)) - 8) * scale).flatten(-2)
    identity = torch.eye(256, dtype=torch.bfloat16)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(identity, tensors["weight"], group, tensors["scales_and_zeros"])
    assert torch.equal(out.t(), weight.bfloat16())


def test_int4_matmul_with_zero_points() -> None:
    codes = torch.randint(0, 16, (32, 128), dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-6, 0, (32, 4, 1)).float()
    offset = torch.randint(0, 16, (32, 4, 1)).float()
    tensors = storage.pack_int4_matmul(codes, Parameters(scale, offset, scale))
    read, parameters = storage.unpack_int4_matmul(tensors)
    assert torch.equal(read, codes)
    assert torch.equal(parameters.offset, offset)


def test_errors_name_cause_and_remedy() -> None:
    with pytest.raises(SchemeError, match="torch has no float8 'e3m4'; it has e4m3, e5m2, e8m0"):
        storage.pack_float8(torch.zeros(1), "e3m4")
    with pytest.raises(SchemeError, match=r"torch.float32 is not one of torch's float8 dtypes"):
        storage.unpack_float8(torch.zeros(1))
    with pytest.raises(SchemeError, match="the last dimension 3 must be even"):
        storage.pack_float4(torch.zeros(2, 3, dtype=torch.uint8))
    scale = torch.full((16, 4, 1), 0.1)
    with pytest.raises(SchemeError, match="scales_and_zeros: a scale does not fit bfloat16 exactly"):
        storage.pack_int4_matmul(torch.zeros(16, 128, dtype=torch.uint8), Parameters(scale, scale, scale))
    with pytest.raises(SchemeError, match="N % 16 = 0 and groups of 32, 64, 128 or 256"):
        storage.pack_int4_matmul(torch.zeros(8, 128, dtype=torch.uint8), Parameters(scale[:8], scale[:8], scale[:8]))
