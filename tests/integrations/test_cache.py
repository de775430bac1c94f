"""The cache of codes: attention reads in generation what it read in training, and the cache is as small as its codes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import qatana as qt
from qatana.integrations.huggingface import CodedCache, attach, integer_model

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))
SCHEMES = [
    ("int8/token", "int8/token"), ("int8/token", "int4/group32"), ("fp8:e4m3/token", "fp8:e5m2/token"), ("int8/tensor", "fp8:e4m3"),
    ("mxfp8", "mxfp4"), ({"format": "uint4", "granularity": "group32", "symmetric": False, "scale": "dynamic"}, "int8/token"),
    ({"format": "uint8", "symmetric": False}, "uint8"), ("int8/token", None),
]  # fmt: skip


def float_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # logits that differ by more than rounding, so that tokens tell something
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model


def quantized(key: Any, value: Any) -> Any:
    batch = {"input_ids": IDS, "use_cache": False}
    recipe = qt.recipe("torch", weight="int8/channel", key=key, value=value)
    model = qt.prepare(float_model(), qt.plan(float_model(), recipe, batch, mode="modules"))
    return attach(qt.calibrate(model, [batch]))


def steps(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits after a prompt of five tokens, then one by one."""
    with torch.no_grad():
        parts = [ids[:, :5], *ids[:, 5:].split(1, dim=1)]
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], 1)


@pytest.mark.parametrize("made", ["training", "integers"])
@pytest.mark.parametrize(("key", "value"), SCHEMES, ids=str)
def test_attention_reads_the_numbers_of_training(key: Any, value: Any, made: str) -> None:
    model = quantized(key, value)
    model = integer_model(model) if made == "integers" else model
    found = steps(model, CodedCache(model), IDS)
    # A float cache, whose keys and values attention quantizes anew at each step, as it does in training: the same products in the same
    # order, so equality.
    assert torch.equal(found, steps(model, DynamicCache(), IDS))
    # In one pass products have other sizes, so their sums another order: an ulp of a key may fall on the other side of a tie, which one
    # step of its scale then is. Tokens are what they were.
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
    assert torch.equal(whole.argmax(-1), found.argmax(-1))


def test_sums_without_rounding_are_equal_in_one_pass_too() -> None:
    """In float64 the sums differ by 2^-53, which no rounding to a code sees here: the whole pass and the steps give the same codes."""
    model = quantized("int8/token", "int4/group32")
    caches = CodedCache(model), CodedCache(model)
    model.double()
    steps(model, caches[0], IDS)
    with torch.no_grad():
        model(IDS, past_key_values=caches[1])
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        for a, b in zip(one._states, other._states, strict=True):
            assert torch.equal(a.parts[0], b.parts[0])


def test_generate() -> None:
    model = integer_model(quantized("int8/token", "int4/group32"))
    for how in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        found = []
        for cache in (CodedCache(model), DynamicCache()):
            torch.manual_seed(0)
            found.append(model.generate(IDS, past_key_values=cache, max_new_tokens=12, **{"do_sample": False} | how))
        assert torch.equal(*found)
        assert found[0].shape[1] == 21


def test_memory() -> None:
    """A token of a head with 32 numbers: 32 codes of 8 bits with a float32 scale, and 32 codes of 4 bits with another."""
    model = quantized("int8/token", "int4/group32")
    coded = CodedCache(model)
    steps(model, coded, IDS)
    tokens = 2 * 9 * 2 * 2  # batch, tokens, heads, layers
    assert coded.nbytes == tokens * ((32 + 4) + (16 + 4))
    assert coded.nbytes < 0.22 * tokens * 2 * 32 * 4  # of a float32 cache's


def test_tokens_can_be_taken_back() -> None:
    model = quantized("int8/token", "int4/group32")
    cache, short = CodedCache(model), CodedCache(model)
    steps(model, cache, IDS)
    cache.crop(-3)
    assert cache.get_seq_length() == 6
    steps(model, short, IDS[:, :6])
    with torch.no_grad():
        a, b = (model(IDS[:, 6:7], past_key_values=c).logits for c in (cache, short))
    assert torch.equal(a, b)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.nbytes == 0


def test_a_quantizer_that_is_off_leaves_floats() -> None:
    model = quantized("int8/token", "int8/token")
    for quantizer in qt.quantizers(model).values():
        quantizer.enabled = False
    assert torch.equal(steps(model, CodedCache(model), IDS), steps(model, DynamicCache(), IDS))


def test_what_has_no_cache_of_codes() -> None:
    with pytest.raises(qt.ModelError, match="no attention that reads quantized keys and values"):
        CodedCache(float_model())
    batch = {"input_ids": IDS, "use_cache": False}
    engine = qt.prepare(float_model(), qt.plan(float_model(), qt.recipe("ort:int8"), batch, mode="modules"))
    engine = attach(qt.calibrate(engine, [batch]))
    assert torch.equal(steps(engine, CodedCache(engine), IDS), steps(engine, DynamicCache(), IDS))
    with pytest.raises(qt.ModelError, match="generate with the QAT model"):
        CodedCache(integer_model(engine))
    model = quantized("nvfp4", "int8/token")
    with pytest.raises(qt.ModelError, match="follow from all tokens together"):
        CodedCache(model)
