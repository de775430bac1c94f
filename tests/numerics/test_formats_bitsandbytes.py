"""NF4, FP4, the 8-bit dynamic map and doubly quantized scales against bitsandbytes on the CPU, bit for bit."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.tensors import all_tensors, bits
from torch import Tensor

from qatana.numerics import dequantize_by, quantize_by, scheme
from qatana.numerics.formats import BINARY, DYNAMIC8, DYNAMIC8_CPU, FP4, NF4, Codebook

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

TENSORS = all_tensors()


def nibbles(packed: Tensor) -> Tensor:
    """Two codes to a byte, the first in the high nibble."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten()


def nearest(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """(codes, absmax) by the equations of bitsandbytes' portable kernel, which the CPU's own hides: bucketize between midpoints."""
    code, blocks = bnb.create_dynamic_map(), x.reshape(-1, block)
    most = blocks.abs().amax(1, keepdim=True)
    return torch.bucketize((blocks * (1 / most)).clamp(-1, 1), (code[1:] + code[:-1]) / 2), most


def test_tables() -> None:
    for name, book in (("nf4", NF4), ("fp4", FP4)):
        assert torch.equal(torch.tensor(book.table), bnb.get_4bit_type(name, device="cpu"))
    assert torch.equal(torch.tensor(DYNAMIC8.table), bnb.create_dynamic_map())


@pytest.mark.parametrize("block", [64, 256])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_four_bits(name: str, block: int) -> None:
    for label, x in TENSORS.items():
        packed, state = bnb.quantize_4bit(x, quant_type=name, blocksize=block)
        s = scheme(name, f"flat{block}")
        codes, p = quantize_by(x, s)
        assert torch.equal(codes.flatten(), nibbles(packed)), label
        assert torch.equal(p.scale.flatten(), state.absmax), label
        values = dequantize_by(codes, p, s, x.shape)
        if x.shape[-1] % block:
            continue  # test_blocks_across_rows
        # adding 0.0: their table read from C has -0.0 nowhere, ours neither, but absmax 0 times a negative value is -0.0 in both
        assert torch.equal(bits(values + 0.0), bits(bnb.dequantize_4bit(packed, state) + 0.0)), label


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_double_quantization(name: str) -> None:
    """`rule="cpu"`: the 8-bit map as bitsandbytes' CPU kernel reads it; the default is the nearest value, as on its GPUs."""
    for label, x in TENSORS.items():
        packed, state = bnb.quantize_4bit(x, quant_type=name, blocksize=64, compress_statistics=True)
        s = scheme(f"{name}+double", rule="cpu")
        codes, p = quantize_by(x, s)
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(codes.flatten(), nibbles(packed)), label
        assert torch.equal(p.scale.flatten(), absmax), label
        values = dequantize_by(codes, p, s, x.shape)
        assert torch.equal(bits(values + 0.0), bits(bnb.dequantize_4bit(packed, state) + 0.0)), label


def test_double_quantization_by_the_nearest_value() -> None:
    """The default: as the portable kernels of bitsandbytes (and its CUDA ones) choose the code of the block maxima."""
    for label in ("random", "spread", "minilm"):
        x = TENSORS[label]
        limit = x.reshape(-1, 64).abs().amax(1)
        offset = limit.mean()
        codes, most = nearest(limit - offset, 256)
        expected = (bnb.create_dynamic_map()[codes] * most).flatten() + offset
        assert torch.equal(quantize_by(x, scheme("nf4+double"))[1].scale.flatten(), expected), label


@pytest.mark.parametrize("block", [64, 256, 4096])
def test_eight_bits(block: int) -> None:
    for label, x in TENSORS.items():
        theirs, state = bnb.quantize_blockwise(x, blocksize=block)
        s = scheme("dynamic8", f"flat{block}").with_(format=DYNAMIC8_CPU)
        codes, p = quantize_by(x, s)
        some = (p.scale > 1e-38).expand(codes.shape)  # below, their 1 / absmax overflows; zeros: 0 * inf
        flat = codes.flatten()[: x.numel()]
        inside = some.flatten()[: x.numel()]
        assert torch.equal(flat[inside], theirs.flatten()[inside]), label
        assert torch.equal(p.scale.flatten(), state.absmax), label
        values = dequantize_by(codes, p, s, x.shape).flatten()
        assert torch.equal(
            bits(values[inside] + 0.0), bits(bnb.dequantize_blockwise(theirs, state).flatten()[inside] + 0.0)
        ), label
        assert values[~inside].abs().max().item() < 1e-38 if (~inside).any() else True


def test_the_cpu_kernel_is_not_the_nearest_value() -> None:
    """bitsandbytes documents the nearest value; its CPU kernel looks it up at 65,536 steps and misses it in 1 of about 700."""
    x = torch.randn(256, 256)
    ours, _ = quantize_by(x, scheme("dynamic8"))
    theirs, _ = bnb.quantize_blockwise(x, blocksize=256)
    rate = float((ours.flatten() != theirs.flatten()).float().mean())
    assert 0 < rate < 0.005
    assert torch.equal(ours.long(), nearest(x, 256)[0])


@pytest.mark.parametrize("book", [NF4, FP4, DYNAMIC8, BINARY, Codebook("thirds", (0.3, -0.0, -1.0))], ids=str)
def test_the_nearest_value_of_every_kind_of_float(book: Codebook) -> None:
    """Against torch.bucketize, the rule of the portable kernels: a tie goes to the lower value, to the higher for signs. Every midpoint
    and its float neighbours, and the first and last float of each 65,536 in a row: of every bucket of the fast path, whatever its size."""
    values = torch.tensor(book.table).sort().values
    middle = (values[:-1] + values[1:]) / 2
    firsts = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    floats = torch.cat([firsts, firsts | 0xFFFF]).view(torch.float32)
    neighbours = [torch.nextafter(middle, torch.tensor(end)) for end in (-torch.inf, torch.inf)]
    t = torch.cat([middle, *neighbours, values, floats[~floats.isnan()]])
    nearest = torch.bucketize(t, middle, right=book is BINARY)
    assert torch.equal(book.positions(t), nearest)
    assert torch.equal(book.round_(t.clone()), values[nearest])
    assert (
        0 <= int(book.positions(floats).min()) <= int(book.positions(floats).max()) < len(values)
    )  # NaN too has a place


def test_a_short_last_block() -> None:
    x = torch.randn(5, 27)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=64)
    s = scheme("nf4")
    codes, p = quantize_by(x, s)
    assert torch.equal(codes.flatten()[:128], nibbles(packed)[:128])
    assert torch.equal(p.scale.flatten(), state.absmax)
    assert dequantize_by(codes, p, s, x.shape).shape == x.shape


def test_blocks_across_rows() -> None:
    """Blocks run on over the ends of rows; bitsandbytes' CPU reader takes a new block in each row instead, and so cannot read its
    own codes where the block does not divide the row. We follow its quantizer and its portable and CUDA readers."""
    x = TENSORS["smollm2"]  # rows of 576
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", blocksize=256)
    codes, p = quantize_by(x, scheme("nf4", "flat256"))
    ours = dequantize_by(codes, p, scheme("nf4", "flat256"), x.shape)
    by_hand = bnb.get_4bit_type("nf4", device="cpu")[nibbles(packed).long()].view(-1, 256) * state.absmax[:, None]
    assert torch.equal(ours, by_hand.view(x.shape))
    assert not torch.equal(ours, bnb.dequantize_4bit(packed, state))
