"""Byte layouts written out by hand, and against ONNX's own int4 packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from qatana.errors import SchemeError
from qatana.numerics import IntFormat, pack, unpack


def test_four_bits_low_nibble_first() -> None:
    codes = torch.tensor([[1, 2, 15, 0, 7]], dtype=torch.uint8)
    assert pack(codes, IntFormat(4, signed=False)).tolist() == [[0x21, 0x0F, 0x07]]


def test_four_bits_signed_twos_complement() -> None:
    codes = torch.tensor([-8, 7, -1], dtype=torch.int8)
    assert pack(codes, IntFormat(4)).tolist() == [0x78, 0x0F]


def test_two_bits_from_the_low_end() -> None:
    codes = torch.tensor([3, 0, 1, 2, 1], dtype=torch.uint8)
    assert pack(codes, IntFormat(2, signed=False)).tolist() == [0b10_01_00_11, 0b01]
    assert pack(torch.tensor([-2, -1, 0, 1], dtype=torch.int8), IntFormat(2)).tolist() == [0b01_00_11_10]


def test_three_bits_run_over_byte_borders() -> None:
    """Codes 1, 2, 7 occupy bits 0-2, 3-5, 6-8: 0b1_11_010_001."""
    assert pack(torch.tensor([1, 2, 7], dtype=torch.uint8), IntFormat(3, signed=False)).tolist() == [0b11_010_001, 0b1]


def test_rows_begin_on_bytes() -> None:
    codes = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8)
    assert pack(codes, IntFormat(4, signed=False)).tolist() == [[0x21, 0x03], [0x54, 0x06]]


@pytest.mark.parametrize(("name", "kind"), [("int4", TensorProto.INT4), ("uint4", TensorProto.UINT4)])
def test_four_bits_are_onnx_int4(name: str, kind: int) -> None:
    format = IntFormat.parse(name)
    codes = torch.arange(format.lo, format.hi + 1, dtype=torch.int16).to(format.dtype)
    theirs = helper.make_tensor("t", kind, [16], codes.tolist())
    raw = theirs.raw_data or np.asarray(theirs.int32_data, np.uint8).tobytes()
    assert bytes(pack(codes, format).tolist()) == raw


def test_errors_name_the_codes_and_the_format() -> None:
    with pytest.raises(SchemeError, match=r"codes -3..2 do not fit int2"):
        pack(torch.tensor([-3, 2], dtype=torch.int8), IntFormat(2))
    with pytest.raises(SchemeError, match="3 bytes a row cannot hold 7 codes of 4 bits"):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 7, IntFormat(4))
