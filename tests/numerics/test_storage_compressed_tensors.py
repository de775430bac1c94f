"""Checkpoint tensors against compressed-tensors (0.20.0): what it writes we write, what it writes we read, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.tensors import minilm
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics import storage
from qatana.numerics.formats import FloatFormat
from qatana.numerics.scales import Parameters

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

E2M1, E4M3 = FloatFormat(2, 1), FloatFormat(4, 3, "fn")


def weight() -> Tensor:
    return minilm()[:96]


def ranges(x: Tensor, group: int | None) -> tuple[Tensor, Tensor]:
    view = x if group is None else x.unflatten(-1, (-1, group))
    low, high = view.amin(-1), view.amax(-1)
    return (low, high) if group else (low.unsqueeze(-1), high.unsqueeze(-1))


def compress(name: str, args: QuantizationArgs, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The library's tensors and what it reads from them."""
    compressor = BaseCompressor.get_value_from_registry(name)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensors = compressor.compress(dict(state), scheme)
    return tensors, compressor.decompress(dict(tensors), scheme)["weight"]


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(raw(ours[name]), raw(tensor)), name


def values(codes: Tensor, parameters: Parameters, group: int | None) -> Tensor:
    view = codes.float() if group is None else codes.float().unflatten(-1, (-1, group))
    return ((view - parameters.offset) * parameters.scale).reshape(codes.shape)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(width: int, group: int | None, symmetric: bool) -> None:
    x = weight()
    args = QuantizationArgs(
        num_bits=width, symmetric=symmetric, strategy="group" if group else "channel", group_size=group
    )
    scale, zero = calculate_qparams(*ranges(x, group), args)
    state = {"weight": x, "weight_scale": scale, "weight_zero_point": zero}
    theirs, read = compress("pack-quantized", args, state)
    codes, parameters = storage.unpack_quantized(theirs, width)
    assert torch.equal(codes, quantize(x, scale, zero, args, dtype=torch.int8))
    assert torch.equal(values(codes, parameters, group), read)
    assert_same(storage.pack_quantized(codes, parameters, width, torch.float32, symmetric=symmetric), theirs)


@pytest.mark.parametrize("columns", [1, 7, 33, 100])
@pytest.mark.parametrize("width", [3, 4, 8])
def test_pack_quantized_rows_that_fill_no_word(columns: int, width: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-(2 ** (width - 1)), 2 ** (width - 1), (5, columns)).to(torch.int8)
    ours = storage.pack_quantized(
        codes, Parameters(torch.ones(5, 1), torch.zeros(5, 1), torch.ones(5, 1)), width, torch.float32
    )
    assert torch.equal(ours["weight_packed"], pack_to_int32(codes, width))
    assert torch.equal(storage.unpack_quantized(ours, width)[0], codes)


def test_pack_quantized_with_bfloat16_scales() -> None:
    """W4A16 as checkpoints hold it: scales rounded to the model's dtype before the codes are computed."""
    x = weight()
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=128)
    scale = calculate_qparams(*ranges(x, 128), args)[0].bfloat16()
    theirs, read = compress("pack-quantized", args, {"weight": x.bfloat16(), "weight_scale": scale})
    codes, parameters = storage.unpack_quantized(theirs, 4)
    assert torch.equal(values(codes, parameters, 128).bfloat16(), read)
    assert_same(storage.pack_quantized(codes, parameters, 4, torch.bfloat16), theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_int_quantized(symmetric: bool) -> None:
    x = weight()
    args = QuantizationArgs(num_bits=8, symmetric=symmetric, strategy="channel")
    scale, zero = calculate_qparams(*ranges(x, None), args)
    theirs, read = compress("int-quantized", args, {"weight": x, "weight_scale": scale, "weight_zero_point": zero})
    codes, parameters = storage.unpack_plain(theirs)
    assert torch.equal(values(codes, parameters, None), read)
    assert_same(storage.pack_plain(codes, parameters, torch.float32, symmetric=symmetric), theirs)


@pytest.mark.parametrize("strategy", ["channel", "tensor", "block"])
def test_float_quantized(strategy: str) -> None:
    x = weight()
    args = QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, block_structure=[32, 128] if strategy == "block" else None
    )
    if strategy == "block":
        blocks = x.reshape(3, 32, -1, 128)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        low, high = ranges(x, None) if strategy == "channel" else (x.min().reshape(1), x.max().reshape(1))
    scale, _ = calculate_qparams(low, high, args)
    theirs, read = compress("float-quantized", args, {"weight": x, "weight_scale": scale})
    codes, parameters = storage.unpack_plain(theirs)
    levels = E4M3.decode(codes)
    view = levels.reshape(3, 32, -1, 128) if strategy == "block" else levels
    assert torch.equal((view * parameters.scale).reshape(x.shape), read)
    assert_same(storage.pack_plain(codes, parameters, torch.float32), theirs)


def test_nvfp4() -> None:
    """The library reads back in bfloat16: our float32 value (scale / global scale, times the code), rounded once."""
    x = weight()
    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    whole = (448 * 6 / x.abs().amax()).reshape(1)
    local, _ = calculate_qparams(*ranges(x, 16), args, global_scale=whole)
    state = {"weight": x, "weight_scale": local, "weight_global_scale": whole}
    theirs, read = compress("nvfp4-pack-quantized", args, state)
    codes, parameters = storage.unpack_nvfp4(theirs)
    levels = quantize(x, local, None, args, global_scale=whole)
    assert torch.equal(E2M1.decode(codes), levels)
    ours = (E2M1.decode(codes).unflatten(-1, (-1, 16)) * parameters.scale).flatten(-2)
    exact = (levels.unflatten(-1, (-1, 16)) * (local.float() / whole).unsqueeze(-1)).flatten(-2)
    assert torch.equal(ours, exact)
    assert torch.equal(ours.bfloat16(), read)
    assert_same(storage.pack_nvfp4(codes, local.float().unsqueeze(-1), whole), theirs)


def test_mxfp4() -> None:
    x = weight()
    args = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scale, _ = calculate_qparams(*ranges(x, 32), args)
    theirs, read = compress("mxfp4-pack-quantized", args, {"weight": x, "weight_scale": scale})
    codes, parameters = storage.unpack_mxfp4(theirs)
    ours = (E2M1.decode(codes).unflatten(-1, (-1, 32)) * parameters.scale).flatten(-2)
    assert torch.equal(ours, read.float())  # a code times a power of two is exact in bfloat16
    assert_same(storage.pack_mxfp4(codes, parameters), theirs)


def test_mxfp8() -> None:
    x = weight()
    args = QuantizationArgs(num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8)
    scale, _ = calculate_qparams(*ranges(x, 32), args)
    theirs, read = compress("mxfp8-quantized", args, {"weight": x, "weight_scale": scale})
    codes, parameters = storage.unpack_mxfp8(theirs)
    ours = (E4M3.decode(codes).unflatten(-1, (-1, 32)) * parameters.scale).flatten(-2)
    assert torch.equal(ours, read.float())
    assert_same(storage.pack_mxfp8(codes, parameters), theirs)


def test_errors_name_cause_and_remedy() -> None:
    codes, scale = torch.zeros(4, 32, dtype=torch.int8), torch.full((4, 1), 0.1)
    parameters = Parameters(scale, torch.zeros(4, 1), scale)
    with pytest.raises(SchemeError, match="weight_scale: a scale does not fit bfloat16 exactly"):
        storage.pack_quantized(codes, parameters, 4, torch.bfloat16)
    with pytest.raises(SchemeError, match=r"do not fit uint4"):
        storage.pack_quantized(codes + 8, parameters, 4, torch.float32)
    tensors = storage.pack_quantized(codes, parameters, 4, torch.float32)
    with pytest.raises(SchemeError, match="3 words a row cannot hold 32 codes of 4 bits: the tensor is truncated"):
        storage.unpack_quantized(tensors | {"weight_packed": tensors["weight_packed"][:, :3]}, 4)
    with pytest.raises(SchemeError, match="weight_shape is missing"):
        storage.unpack_quantized({k: v for k, v in tensors.items() if k != "weight_shape"}, 4)
    with pytest.raises(SchemeError, match="without activation ordering"):
        storage.unpack_quantized(tensors | {"weight_g_idx": torch.arange(32)}, 4)
    with pytest.raises(SchemeError, match="an MX scale is a power of two"):
        storage.pack_mxfp4(codes.to(torch.uint8), parameters)
