"""Laws 1 and 2 for the formats whose search is held, eager and compiled: rows of 256, the one granularity that they have."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schemes import DTYPES
from support.tensors import bits
from torch import Tensor

from qatana.numerics import dequantize_by, fake_quantize_held, hold, quantize_by, scheme


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gguf:q4_k", "gguf:q5_k", "gguf:q6_k"])
def test_laws(name: str) -> None:
    s = scheme(name)

    def all_ways(x: Tensor, held: list[Tensor]) -> list[Tensor]:
        codes, p = quantize_by(x, s, held)
        return [fake_quantize_held(x, s, held), codes, dequantize_by(codes, p, s, x.shape, x.dtype)]

    compiled = torch.compile(all_ways, backend="aot_eager", fullgraph=True, dynamic=True)

    @settings(max_examples=12, deadline=None)
    @given(
        st.integers(0, 2**31),
        st.integers(1, 4),
        st.sampled_from(DTYPES),
        st.sampled_from([1e-3, 1.0, 300.0]),
        st.booleans(),
    )
    def check(seed: int, rows: int, dtype: torch.dtype, size: float, strided: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = (torch.randn(rows, 512, generator=generator) * size).to(dtype)
        x = x.repeat(1, 2)[:, ::2] if strided else x
        held = hold(x, s)
        moved = x * torch.tensor(0.9, dtype=dtype)  # as a weight in training: not what was solved for
        for value in (x, moved):
            eager = all_ways(value, held)
            assert torch.equal(bits(eager[0] + 0), bits(eager[2] + 0)), "fake quantization is dequantize(quantize)"
            # dtype, strides and one row or more are graphs of their own; beyond the limit is an error, not eager mode
            with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):  # type: ignore[attr-defined]
                found = compiled(value, held)
            for ours, theirs in zip(found, eager, strict=True):
                same = (bits(ours), bits(theirs)) if ours.is_floating_point() else (ours, theirs)
                assert torch.equal(*same), "compiled"

    check()
