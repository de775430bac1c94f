"""2-bit BitNet tensors against transformers' own packing, and a layer's output in both scale conventions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.tensors import minilm
from transformers.integrations import bitnet

from qatana.errors import SchemeError
from qatana.numerics import storage


def ternary() -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale of a real weight by absmean (Ma et al. 2024)."""
    w = minilm()
    scale = w.abs().mean()
    return (w / scale).round().clamp(-1, 1).to(torch.int8), scale


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_bytes_and_round_trip(linear_class: str) -> None:
    codes, scale = ternary()
    tensors = storage.pack_bitnet(codes, scale, linear_class)
    assert torch.equal(tensors["weight"], bitnet.pack_weights(codes.clone()))
    read, parameters = storage.unpack_bitnet(tensors, linear_class)
    assert torch.equal(read, codes)
    again = storage.pack_bitnet(read, parameters.scale, linear_class)
    assert torch.equal(again["weight"], tensors["weight"])
    if linear_class == "autobitlinear":
        assert torch.equal(parameters.scale, scale)
    else:  # the reciprocal of a reciprocal: at most two roundings
        assert torch.allclose(parameters.scale, scale, rtol=2**-23, atol=0)


@pytest.fixture
def eager() -> Iterator[None]:
    """transformers compiles these functions; uncompiled they are the same arithmetic, without a minute of compiling."""
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield


@pytest.mark.usefixtures("eager")
def test_unpacking_is_theirs() -> None:
    packed = torch.randint(0, 256, (16, 32), dtype=torch.uint8)
    packed = packed & ~(packed >> 1 & packed & 0x55)  # no field holds 3
    codes, _ = storage.unpack_bitnet({"weight": packed, "weight_scale": torch.ones(1)}, "autobitlinear")
    assert torch.equal(codes, bitnet.unpack_weights(packed, torch.int8))


@pytest.mark.usefixtures("eager")
def test_the_two_layers_read_opposite_scales() -> None:
    """BitLinear divides by weight_scale, AutoBitLinear multiplies by it; each in its own order of float32 operations."""
    codes, scale = ternary()
    x = torch.randn(3, codes.shape[1])
    plain, auto = (storage.pack_bitnet(codes, scale, name) for name in ("bitlinear", "autobitlinear"))
    assert torch.equal(plain["weight_scale"], 1 / auto["weight_scale"])
    in_scale = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    levels = (x * in_scale).round().clamp(-128, 127)

    layer = bitnet.BitLinear(codes.shape[1], len(codes), bias=False, dtype=torch.float32)
    layer.load_state_dict(plain)
    product = torch.nn.functional.linear(levels, codes.float())
    assert torch.equal(layer(x), product / (in_scale * plain["weight_scale"]))

    layer = bitnet.AutoBitLinear(codes.shape[1], len(codes), bias=False, dtype=torch.float32)
    layer.load_state_dict(
        {"weight": storage.unpack_bitnet(auto, "autobitlinear")[0].float(), "weight_scale": auto["weight_scale"]}
    )
    assert torch.equal(layer(x), torch.nn.functional.linear(levels / in_scale, codes.float()) * scale)


def test_errors_name_cause_and_remedy() -> None:
    one = torch.ones(())
    with pytest.raises(SchemeError, match="has no multiple of 4 rows"):
        storage.pack_bitnet(torch.zeros(6, 8, dtype=torch.int8), one, "bitlinear")
    with pytest.raises(SchemeError, match=r"BitNet codes are -1, 0 and 1, not 0\.\.2"):
        storage.pack_bitnet(torch.arange(12).reshape(4, 3) % 3, one, "bitlinear")
    with pytest.raises(SchemeError, match="one scale per weight, not 4: use granularity 'tensor'"):
        storage.pack_bitnet(torch.zeros(4, 8, dtype=torch.int8), torch.ones(4), "bitlinear")
    with pytest.raises(SchemeError, match="unknown BitNet linear_class 'bit'; it is one of bitlinear, autobitlinear"):
        storage.pack_bitnet(torch.zeros(4, 8, dtype=torch.int8), one, "bit")
    with pytest.raises(SchemeError, match="a 2-bit field holds 3"):
        storage.unpack_bitnet({"weight": torch.full((1, 8), 255, dtype=torch.uint8), "weight_scale": one}, "bitlinear")
