"""Every format trains: losses fall, gradients are the closed form, modules copy, save, compile, export and live on the meta device."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatana.numerics import Scheme, fake_quantize_by, quantize_by, scheme
from qatana.quantizer import Quantizer

DYNAMIC = [
    scheme("int8/channel", scale="dynamic"), scheme("uint4/group32", symmetric=False, scale="dynamic"),
    scheme("int2/group32", scale="dynamic"), scheme("fp8:e4m3/channel", scale="dynamic"), scheme("fp8:e5m2", scale="dynamic"),
    *map(scheme, ["mxfp8", "mxfp6", "mxfp4", "nvfp4", "nf4", "nf4+double", "fp4", "bitnet", "binary", "hqq4", "gguf:q8_0", "gguf:q4_0"]),
]  # fmt: skip
LEARNED = [
    scheme("int4/channel", scale="learned"), scheme("fp8:e4m3/channel", scale="learned"), scheme("fp6:e3m2/group32", scale="learned"),
    scheme("float(2,2)/group32", scale="learned"), scheme("nf4/group32", scale="learned"),
    scheme("int4/group32", scale="learned", scale_type="float16"), scheme("int4/group32", scale="learned", scale_type="e8m0:ceil"),
]  # fmt: skip


class Net(nn.Module):
    """Two linear layers with fake-quantized weights."""

    def __init__(self, s: Scheme) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.qa, self.qb = (Quantizer(s, tuple(layer.weight.shape), "w") for layer in (self.a, self.b))
        for q, layer in ((self.qa, self.a), (self.qb, self.b)):
            if not layer.weight.is_meta:
                q.settle(layer.weight)
            q.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.qa(self.a.weight), self.a.bias).relu()
        return F.linear(x, self.qb(self.b.weight), self.b.bias)


@pytest.mark.parametrize("s", DYNAMIC + LEARNED, ids=str)
def test_the_loss_falls(s: Scheme) -> None:
    net, x = Net(s), torch.randn(128, 64)
    target = torch.randn(128, 64) * 0.3 + x.roll(1, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]
    for q in (net.qa, net.qb):
        assert not q.learned or (q.scale.grad is not None and bool(q.scale.grad.isfinite().all()))


@pytest.mark.parametrize("s", [s for s in LEARNED if not s.rounds_scale], ids=str)
def test_gradients_are_the_closed_form(s: Scheme) -> None:
    """Float64: dx = g inside, 0 outside; d scale = sum g * (level - t) inside, g * level outside (Esser et al. 2020, eq. 3)."""
    x, upstream = torch.randn(8, 64, requires_grad=True), torch.randn(8, 64)
    shape = s.granularity.scale_shape(x.shape)
    whole = s.grid.parameters(*s.grid.statistics(s.granularity.stack(x.detach()))).scale
    scale = (whole * 0.5).reshape(shape).requires_grad_()
    (fake_quantize_by(x, s, scale) * upstream).sum().backward()

    stack, flat = s.granularity.stack(x.detach()), s.granularity.stack_scale(scale.detach())
    t = (
        (stack * flat.reciprocal() if s.grid.inverse else stack / flat).double().numpy()
    )  # the float32 quotient is what is rounded
    codes = s.grid.codes(stack, s.grid.of(flat, torch.zeros_like(flat)))
    level = s.grid.decode(codes, s.grid.of(flat, torch.zeros_like(flat))).double().numpy()
    top = float(np.abs(level).max())
    ends = {
        "int4/channel": (-8.5, 7.5),
        "e4m3/channel": (-464, 464),
        "e3m2/group32": (-30, 30),
        "float(2,2)/group32": (-7.5, 7.5),
    }
    low, high = ends.get(
        str(s).split(" ")[0], (-top, top)
    )  # half a step behind the last value; codebooks: the last value
    inside = (t >= low) & (t <= high)
    g = s.granularity.stack(upstream).double().numpy()
    assert x.grad is not None
    assert scale.grad is not None
    assert np.array_equal(s.granularity.stack(x.grad).double().numpy(), g * inside)
    assert 0 < inside.sum() < inside.size
    terms = g * (level - t * inside)
    # float32 sums of at most 64 terms: 64 roundings of 2^-24 of the sum of magnitudes (of level and t, which nearly cancel)
    bound = 64 * 2.0**-24 * (np.abs(g) * (np.abs(level) + np.abs(t))).sum(1)
    assert (np.abs(scale.grad.double().numpy().ravel() - terms.sum(1)) <= bound).all()


@pytest.mark.parametrize("s", DYNAMIC, ids=str)
def test_own_ranges_pass_the_gradient(s: Scheme) -> None:
    """1 everywhere, but where e8m0 floor scales (OCP MX) and Q4_0's lopsided codes clip by design."""
    x = torch.randn(8, 256, requires_grad=True)
    fake_quantize_by(x, s).sum().backward()
    assert x.grad is not None
    share = float((x.grad == 1).float().mean())
    assert share == 1.0 if not s.grid.clips or s.grid.straight else 0.9 < share <= 1.0
    if str(s).startswith("e2m1/group32"):
        _, p = quantize_by(x.detach(), s)
        t = x.detach().reshape(-1, 32) / p.scale
        assert torch.equal(x.grad.reshape(-1, 32), (t.abs() <= 7).float())


@pytest.mark.parametrize("s", DYNAMIC + LEARNED, ids=str)
def test_modules_copy_save_compile_export(s: Scheme) -> None:
    net, x = Net(s), torch.randn(4, 64)
    expected = net(x)
    assert torch.equal(copy.deepcopy(net)(x), expected)
    other = Net(s)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), expected)
    torch.compiler.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    compiled(x).sum().backward()
    exported = torch.export.export(net, (x,))
    assert torch.equal(exported.module()(x), expected)


@pytest.mark.parametrize("s", DYNAMIC + LEARNED, ids=str)
def test_meta_device(s: Scheme) -> None:
    with torch.device("meta"):
        weight = torch.empty(64, 64, requires_grad=True)
        given = (torch.empty(s.granularity.scale_shape((64, 64)), requires_grad=True),) if s.scale == "learned" else ()
        y = fake_quantize_by(weight, s, *given)
        y.sum().backward()
    assert y.is_meta
    assert y.shape == (64, 64)
    assert weight.grad is not None


def test_what_is_saved_for_the_backward_pass() -> None:
    """Nothing with ranges of one's own; a byte per element where values clip; x itself where the scale is learned."""
    x = torch.randn(64, 256, requires_grad=True)
    for s, expected in (
        (scheme("int8/channel", scale="dynamic"), 0),
        (scheme("nf4"), 0),
        (scheme("bitnet"), 0),
        (scheme("mxfp4"), x.numel()),
        (scheme("gguf:q4_0"), x.numel()),
    ):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            fake_quantize_by(x, s)
        assert sum(t.numel() * t.element_size() for t in saved) == expected, s
    scale = torch.full((64, 1), 0.02, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize_by(x, scheme("int8/channel", scale="learned"), scale)
    assert [t.data_ptr() for t in saved if t.numel() == x.numel()] == [x.data_ptr()]
