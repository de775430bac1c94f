"""Held parameters: the bits of solving at each call while the weight stays, a static grid once it moves, and valid blocks in files."""

from __future__ import annotations

import copy

import gguf as reference
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.tensors import bits
from torch import Tensor, nn

from qatana.errors import DataError, SchemeError
from qatana.numerics import (
    Scheme,
    dequantize_by,
    fake_quantize_by,
    fake_quantize_held,
    gguf,
    held_shapes,
    hold,
    quantize_by,
    scheme,
)

NAMES = [
    "nvfp4", "nf4+double", "fp4+double", "bitnet", "bitnet/channel", "binary", "binary/tensor", "binary/channel1", "hqq8", "hqq4",
    "hqq3", "hqq2", "hqq4/channel", *(f"gguf:{name}" for name in gguf.GRIDS),
]  # fmt: skip
HELD = [scheme(name, scale="static") for name in NAMES]
AFFINE = {
    "q8_0": (-127, 127), "q4_0": (-8, 7), "q5_0": (-16, 15), "q4_1": (0, 15), "q5_1": (0, 31), "tq1_0": (-1, 1),
    "tq2_0": (-1, 1), "q2_0": (-1, 2), "q4_k": (0, 15), "q5_k": (0, 31), "q6_k": (-32, 31),
}  # fmt: skip
"""Least and greatest level of the GGUF types, as ggml-common.h lays them out."""


def moved(x: Tensor) -> Tensor:
    """Weights after some training: most elsewhere in the range, some far outside, one block of zeros."""
    x = x * 1.5 + 0.05
    x[:, ::7] *= 4
    x[1, :256] = 0
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("s", HELD, ids=str)
def test_law1(s: Scheme, dtype: torch.dtype) -> None:
    x = torch.randn(6, 512).to(dtype)
    held = hold(x, s)
    shapes = held_shapes(s, x.shape)
    assert [tuple(p.shape) for p in held] == list(shapes.values())
    assert all(p.dtype == torch.float32 and p.is_contiguous() and not p.requires_grad for p in held)
    assert torch.equal(bits(fake_quantize_held(x, s, held)), bits(fake_quantize_by(x, s)))
    y = moved(x)
    codes, p = quantize_by(y, s, held)
    values = dequantize_by(codes, p, s, y.shape, dtype)
    # adding 0.0: integer codes have no -0
    assert torch.equal(bits(fake_quantize_held(y, s, held) + 0.0), bits(values + 0.0))
    transposed = y.t().contiguous().t()
    assert torch.equal(fake_quantize_held(transposed, s, held), fake_quantize_held(y, s, held))


@pytest.mark.parametrize("name", AFFINE)
def test_blocks_of_moved_weights_are_valid(name: str) -> None:
    """Codes by held parameters lie in the type's range, and the bytes read back as the values that training saw."""
    x = torch.randn(4, 512)
    s = scheme(f"gguf:{name}", scale="static")
    held = hold(x, s)
    y = moved(x)
    codes, p = quantize_by(y, s, held)
    low, high = AFFINE[name]
    # code 0 is the lowest level, but in Q8_0, whose codes are signed
    least = low if name == "q8_0" else 0
    assert int(codes.min()) == least
    assert int(codes.max()) == least + high - low
    data = gguf.grid(name).to_bytes(codes.float(), p)
    ours = fake_quantize_held(y, s, held)
    if name == "q2_0":  # the gguf package does not know it
        theirs = gguf.dequantize(data, y.shape, name)
    else:
        theirs = torch.from_numpy(
            reference.dequantize(data.numpy().reshape(4, -1), reference.GGMLQuantizationType[name.upper()])
        )
    assert torch.equal(theirs.reshape(y.shape) + 0.0, ours + 0.0)


@pytest.mark.parametrize("name", [n for n in AFFINE if not n.endswith("_k")])
def test_the_gradient_is_1_inside_and_0_outside(name: str) -> None:
    """In float64: t = (x - minimum) / d, inside where low - 1/2 <= t < high + 1/2; left out: t so near an end that float32 decides."""
    x = torch.randn(4, 512)
    s = scheme(f"gguf:{name}", scale="static")
    held = hold(x, s)
    y = moved(x).requires_grad_()
    fake_quantize_held(y, s, held).sum().backward()
    assert y.grad is not None
    p = dict(zip(held_shapes(s, x.shape), held, strict=True))
    view = y.detach().double().reshape(-1, 1, s.granularity.size)
    t = ((view - p.get("encode_offset", torch.zeros(())).double()) * p["encode"].double()).numpy()
    low, high = AFFINE[name]
    inside = (t >= low - 0.5) & (t < high + 0.5)
    # float32 rounds t, at most `high` in size near an end, three times by 2^-24 of it; 1e-5 is 50 times that
    sure = (np.abs(t - (low - 0.5)) > 1e-5 * high) & (np.abs(t - (high + 0.5)) > 1e-5 * high)
    assert 0.5 < inside.mean() < 1
    assert np.array_equal(y.grad.reshape(t.shape).numpy()[sure], inside[sure])


def test_hqq_and_two_levels_clip() -> None:
    """HQQ in float64: inside where round(x s + z) lies in 0 .. 15.  NVFP4: where x encode rounds to 6 at most, ties to even: up to 7."""
    x = torch.randn(4, 512)
    for name, low, high in (("hqq4", -0.5, 15.5), ("nvfp4", -7, 7)):
        s = scheme(name, scale="static")
        held = hold(x, s)
        y = moved(x).requires_grad_()
        fake_quantize_held(y, s, held).sum().backward()
        p = dict(zip(held_shapes(s, x.shape), held, strict=True))
        t = y.detach().reshape(-1, s.granularity.size).double() * p["encode"].double()
        t = t + p.get("offset", torch.zeros(())).double()
        assert y.grad is not None
        grad = y.grad.reshape(t.shape)
        sure = ((t - low).abs() > 1e-5) & ((t - high).abs() > 1e-5)  # float32 rounds t, of size 16, by up to 1e-6
        assert torch.equal(grad[sure], ((t > low) & (t < high)).float()[sure])
        assert 0.5 < float(grad.mean()) < 1


class Net(nn.Module):
    """A linear layer whose weight is quantized by held parameters, which are buffers."""

    def __init__(self, s: Scheme) -> None:
        super().__init__()
        self.scheme, self.linear = s, nn.Linear(256, 256)
        for name, p in zip(held_shapes(s, (256, 256)), hold(self.linear.weight, s), strict=True):
            self.register_buffer(name, p)

    def forward(self, x: Tensor) -> Tensor:
        held = [self.get_buffer(name) for name in self.scheme.grid.fields]
        return F.linear(x, fake_quantize_held(self.linear.weight, self.scheme, held), self.linear.bias)


@pytest.mark.parametrize("s", HELD, ids=str)
def test_training_compiling_exporting(s: Scheme) -> None:
    net, x = Net(s), torch.randn(32, 256)
    target = x.roll(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    assert torch.equal(torch.export.export(net, (x,)).module()(x), expected)
    with torch.device("meta"):
        weight = torch.empty(256, 256, requires_grad=True)
        y = fake_quantize_held(weight, s, [torch.empty(p) for p in held_shapes(s, (256, 256)).values()])
        y.sum().backward()
    assert y.shape == weight.shape
    assert weight.grad is not None


def test_what_is_saved_for_the_backward_pass() -> None:
    """One byte per element where values can clip, nothing for signs and means, whose gradient passes everywhere."""
    x = torch.randn(8, 512, requires_grad=True)
    for s in HELD:
        held = hold(x, s)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            fake_quantize_held(x, s, held)
        straight = s.rule == "absmean" or str(s.format) in ("binary", "gguf:q1_0")
        assert sum(t.numel() * t.element_size() for t in saved) == (0 if straight else x.numel()), s


@pytest.mark.parametrize("shape", [(0, 256), (3, 0, 256)])
@pytest.mark.parametrize("s", HELD, ids=str)
def test_zero_elements(s: Scheme, shape: tuple[int, ...]) -> None:
    if s.granularity.kind == "channel" and s.granularity.axis:
        return
    x = torch.empty(shape, requires_grad=True)
    held = hold(x, s)
    assert [tuple(p.shape) for p in held] == list(held_shapes(s, shape).values())
    y = fake_quantize_held(x, s, held)
    y.sum().backward()
    assert y.shape == x.shape


def test_errors() -> None:
    x = torch.randn(4, 512)
    with pytest.raises(SchemeError, match="holds no parameters: it takes a scale"):
        hold(x, scheme("int8"))
    with pytest.raises(SchemeError, match="holds no parameters: make it with scale='static'"):
        hold(x, scheme("nvfp4"))
    s = scheme("gguf:q4_k")
    with pytest.raises(SchemeError, match=r"for a tensor of shape \(2, 512\), not .*; solve them again"):
        fake_quantize_held(x[:2], s, hold(x, s))
    with pytest.raises(SchemeError, match="rows of a multiple of 256"):
        held_shapes(s, (4, 128))
    with pytest.raises(SchemeError, match="hold its parameters"):
        fake_quantize_by(x, s, torch.ones(()))
    for bad in (float("nan"), float("inf")):
        x[2, 3] = bad
        with pytest.raises(DataError, match=r"holds (NaN|infinite)"):
            hold(x, s)
