"""Checkpoint tensors against bitsandbytes (0.50.2) on the CPU: its state_dict is ours, its values are ours, bit for bit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from support.tensors import minilm
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics import storage
from qatana.numerics.formats import CODEBOOKS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb
    from bitsandbytes.nn import Linear8bitLt, Params4bit

STATE = "weight.quant_state.bitsandbytes__"


def state_dict(x: Tensor, book: str, nested: bool, block: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """What Linear4bit saves (its own code path: QuantState.as_dict), and what the library reads from it."""
    data, state = bnb.quantize_4bit(x, blocksize=block, quant_type=book, compress_statistics=nested)
    tensors = {"weight": data} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    return tensors, bnb.dequantize_4bit(data, state)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same tensors; the JSON one as an object, since its spelling is free."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        if name.startswith(STATE):
            assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize("book", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [64, 128])
def test_linear4bit(book: str, nested: bool, block: int) -> None:
    x = minilm()
    theirs, read = state_dict(x, book, nested, block)
    codes, absmax, state = storage.unpack_4bit(theirs)
    parameters = storage.parameters_4bit(absmax, tuple(x.shape), block)
    levels = CODEBOOKS[book].decode(codes).unflatten(-1, (-1, block))
    assert torch.equal((levels * parameters.scale).reshape(x.shape), read)
    assert state["quant_type"] == book
    assert isinstance(absmax, storage.Nested) == nested
    assert_same(storage.pack_4bit(codes, absmax, book, torch.float32, block), theirs)


@pytest.mark.parametrize("shape", [(3, 5), (7, 33), (1, 1), (2, 130)])
def test_weights_that_fill_no_byte_or_block(shape: tuple[int, int]) -> None:
    theirs, _ = state_dict(torch.randn(shape), "nf4", nested=False)
    codes, absmax, _ = storage.unpack_4bit(theirs)
    assert codes.shape == shape
    ours = storage.pack_4bit(codes, absmax, "nf4", torch.float32)
    if (
        codes.numel() % 2
    ):  # the low nibble after the last element is padding: the library leaves there what its kernel computed
        assert torch.equal(ours["weight"][:-1], theirs["weight"][:-1])
        assert int(ours["weight"][-1]) >> 4 == int(theirs["weight"][-1]) >> 4
    else:
        assert_same(ours, theirs)
    with pytest.raises(SchemeError, match="blocks of 64 run over the rows"):
        storage.parameters_4bit(absmax, shape, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_library_reads_what_we_wrote(dtype: torch.dtype) -> None:
    x = minilm()[:64].to(dtype)
    data, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    theirs = {"weight": data} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    codes, absmax, _ = storage.unpack_4bit(theirs)
    ours = storage.pack_4bit(codes, absmax, "nf4", dtype)
    loaded = Params4bit.from_prequantized(
        ours["weight"], {name: tensor for name, tensor in ours.items() if name != "weight"}, device="cpu"
    )
    assert loaded.quant_state.dtype == dtype
    assert torch.equal(bnb.dequantize_4bit(loaded.data, loaded.quant_state), bnb.dequantize_4bit(data, state))


def test_other_storage_dtypes_read_too() -> None:
    """bnb_4bit_quant_storage: the same bytes under another dtype."""
    x = minilm()[:64]
    theirs, _ = state_dict(x, "nf4", nested=False)
    codes, _, _ = storage.unpack_4bit(theirs)
    data, state = bnb.quantize_4bit(x, quant_type="nf4", quant_storage=torch.bfloat16)
    other = {"weight": data} | {f"weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    assert torch.equal(storage.unpack_4bit(other)[0], codes)


def test_linear8bit() -> None:
    """The library multiplies a code by SCB and then by 1/127; the scale SCB / 127 gives the same values but for roundings."""
    x = minilm()[:64]
    codes, absmax, _ = bnb.int8_vectorwise_quant(x)
    ours = storage.pack_8bit(codes, absmax)
    layer = Linear8bitLt(x.shape[1], len(x), bias=False, has_fp16_weights=False)
    layer.weight.data, layer.weight.CB, layer.weight.SCB = codes, codes, absmax
    theirs = {name: tensor.detach() for name, tensor in layer.state_dict().items()}
    assert_same(ours, theirs)
    read_codes, read_absmax = storage.unpack_8bit(theirs)
    assert torch.equal(read_codes, codes)
    exact = bnb.int8_vectorwise_dequant(read_codes, read_absmax)
    scale = read_absmax.unsqueeze(1) / torch.tensor(127.0)
    # Two roundings here, three there (1/127 is one), each of at most 2^-24.
    assert torch.allclose(read_codes * scale, exact, rtol=5 * 2**-24, atol=0)


def test_errors_name_cause_and_remedy() -> None:
    tensors, _ = state_dict(torch.randn(4, 64), "nf4", nested=False)
    with pytest.raises(SchemeError, match="found: weight"):
        storage.unpack_4bit({"weight": tensors["weight"]})
    with pytest.raises(SchemeError, match="the table of quant_type 'nf4' is not one of nf4, fp4"):
        storage.unpack_4bit(tensors | {"weight.quant_map": torch.zeros(16)})
    with pytest.raises(SchemeError, match="127 bytes cannot hold 256 codes of 4 bits: the tensor is truncated"):
        storage.unpack_4bit(tensors | {"weight": tensors["weight"][:-1]})
    with pytest.raises(SchemeError, match="3 absmax for 256 elements in blocks of 64"):
        storage.pack_4bit(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(3), "nf4", torch.float32)
    with pytest.raises(SchemeError, match="weight_format is not row-major"):
        storage.unpack_8bit({"weight": torch.zeros(1), "SCB": torch.ones(1), "weight_format": torch.tensor(2)})
