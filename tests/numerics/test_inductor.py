"""Law 1 in compiled code: torch.compile's own backend gives the bits of eager mode, for every format, forward and backward.

Inductor keeps low precision intermediates in float32 (a cast to float16 and back disappears) and fuses what it sees; so arithmetic
that it sees must not depend on either. One graph for all schemes: compiling each alone takes ten times as long."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from typing import NamedTuple

import pytest
import torch
from support.tensors import bits
from torch import Tensor

from qatana.numerics import (
    ScaleType,
    Scheme,
    dequantize_by,
    fake_quantize_by,
    fake_quantize_held,
    hold,
    quantize_by,
    scheme,
)
from qatana.quantizer import Quantizer
from qatana.report.formats import entries

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = ["tensor", "channel", "channel1", "token", "group32", "block4x64", "flat48"]
SCALE_TYPES = ["float32", "float16", "bfloat16", "e8m0:floor", "e8m0:ceil"]
SHAPE = (8, 512)


def _every() -> Iterator[Scheme]:
    yield from (entry.scheme for entry in entries())
    kept = cycle(
        SCALE_TYPES
    )  # five types over seven granularities and four formats: every pair of type and format comes up
    for format in ("int8", "uint4", "e4m3", "nf4"):
        for granularity in GRANULARITIES:
            yield scheme(f"{format}/{granularity}", scale="dynamic", scale_type=next(kept), symmetric=format != "uint4")


def _given() -> Iterator[Scheme]:
    for s in _every():
        if s.takes_scale and s.granularity.kind != "token" and s.scale_type.rule in ("", "floor", "ceil"):
            yield s.with_(scale="learned")


class Case(NamedTuple):
    """A tensor for a scheme, what goes with it, and the gradient that comes back."""

    scheme: Scheme
    x: Tensor
    parameters: tuple[Tensor, ...]
    upstream: Tensor


def _case(s: Scheme, dtype: torch.dtype) -> Case:
    """Sizes near 1, two large elements; scales (learned) at 0.7 of what the tensor asks for, so that some elements clip."""
    x = torch.randn(SHAPE)
    x[3, 5], x[6, 300] = 7.0, -5.0
    x = x.to(dtype)
    parameters: tuple[Tensor, ...] = ()
    if s.scale == "learned":
        _, p = quantize_by(x, s.with_(scale="dynamic"))
        shape = s.granularity.scale_shape(SHAPE)
        parameters = ((p.scale.reshape(shape) * 0.7).requires_grad_(), p.offset.reshape(shape))
    elif s.holds:
        parameters = hold(x, s)
    return Case(s, x.requires_grad_(), parameters, torch.randn(SHAPE).to(dtype))


def _quantized(case: Case) -> Tensor:
    if case.scheme.holds:
        return fake_quantize_held(case.x * 2, case.scheme, case.parameters)
    return fake_quantize_by(case.x * 2, case.scheme, *case.parameters)


def _leaves(case: Case) -> list[Tensor]:
    return [case.x, *(p for p in case.parameters if p.requires_grad)]


def _all(cases: list[Case]) -> list[Tensor]:
    return [_quantized(case) for case in cases]


def _by_codes(case: Case) -> Tensor:
    """values(codes(2 x)) by the parameters that belong to the case."""
    s, x = case.scheme, (case.x * 2).detach()
    if not case.parameters or s.holds:
        codes, p = quantize_by(x, s, case.parameters or None)
        return dequantize_by(codes, p, s, x.shape, x.dtype)
    scale, offset = (s.granularity.stack_scale(v.detach()) for v in case.parameters)
    p = s.grid.of(s.scale_type.store(scale) if s.rounds_scale else scale, offset)
    stack = s.granularity.stack(x).float()
    return s.granularity.unview(s.grid.values(s.grid.codes(stack, p), p), x.shape).to(x.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own or held", "given"])
def test_law1_and_gradients(kind: str) -> None:
    own = kind != "given"
    schemes = list(_every() if own else _given())
    cases = [_case(s, dtype) for s in schemes for dtype in (DTYPES if own else [torch.float32])]
    cases += [] if own else [_case(s, torch.bfloat16) for s in schemes[::3]]
    torch.compiler.reset()
    compiled = torch.compile(_all, fullgraph=True)(cases)
    gradients = []
    for results in (compiled, _all(cases)):
        leaves = [leaf for case in cases for leaf in _leaves(case)]
        gradients.append(torch.autograd.grad(results, leaves, [case.upstream for case in cases]))
    for case, ours in zip(cases, compiled, strict=True):
        # adding 0.0: integer codes have no -0
        assert torch.equal(bits(ours.detach() + 0.0), bits(_by_codes(case) + 0.0)), (case.scheme, case.x.dtype)
    for ours, eager in zip(*gradients, strict=True):
        assert torch.equal(bits(ours), bits(eager))


def test_scales_as_their_types_store_them() -> None:
    """Casts, compiled and not: all float32 numbers of 20 bits in the types' ranges, so every tie of float16 and bfloat16 among them."""
    raw = torch.arange(2**31 - 2**23 >> 12, dtype=torch.int32) << 12
    x = torch.cat([raw.view(torch.float32), (raw | 1).view(torch.float32), (raw | 0xFFF).view(torch.float32)])
    halves, bfloats = x[(x > 2.0**-24) & (x < 65504)], x[(x > 2.0**-100) & (x < 2.0**126)]
    torch.compiler.reset()

    def stored(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return ScaleType("float16").store(a * 1.0), ScaleType("bfloat16").store(b * 1.0)

    for function in (stored, torch.compile(stored, fullgraph=True)):
        half, bfloat = function(halves, bfloats)
        assert torch.equal(half, halves.half().float())
        assert torch.equal(bfloat, bfloats.bfloat16().float())


@pytest.mark.slow
def test_quantizers() -> None:
    """What integer layers trace piece by piece: ranges, scales, levels. x_hat and its gradient in x are eager mode's; a learned scale's
    gradient is a float sum, whose order a compiler chooses."""
    made = []
    for name, mode, dtype in (
        ("int8n/channel", "dynamic", torch.bfloat16),
        ("int8/tensor", "static", torch.float16),
        ("uint8/tensor", "learned", torch.float32),
        ("uint4/group32", "dynamic", torch.float16),
        ("int4/channel1", "learned", torch.bfloat16),
        ("int2/group64", "static", torch.float32),
    ):
        x = torch.randn(SHAPE)
        x[3, 5] = 7.0
        quantizer = Quantizer(scheme(name, scale=mode, symmetric=name[0] == "i"), SHAPE, "weight")
        quantizer.settle(x)
        quantizer.enabled = True
        made.append((quantizer, x.to(dtype).requires_grad_()))
    leaves = [x for _, x in made]
    upstream = [torch.randn_like(x) for x in leaves]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        return [quantizer(x * 2) for (quantizer, _), x in zip(made, tensors, strict=True)]

    torch.compiler.reset()
    compiled, eager = torch.compile(run, fullgraph=True)(leaves), run(leaves)
    gradients = [torch.autograd.grad(results, leaves, upstream) for results in (compiled, eager)]
    for ours, theirs in zip(compiled + list(gradients[0]), eager + list(gradients[1]), strict=True):
        assert torch.equal(ours, theirs)
