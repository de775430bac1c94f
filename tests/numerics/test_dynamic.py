"""Run-time quantization of activations against ONNX Runtime and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import helper
from support.kernels import proto, session

from qatana.numerics.dynamic import dynamic_blocks, dynamic_tensor


def spread(rng: np.random.Generator, kind: str) -> np.ndarray:
    x = rng.normal(0, 1, (7, 33)).astype(np.float32)
    return {
        "both signs": x,
        "positive": np.abs(x) + np.float32(0.5),
        "negative": -np.abs(x) - np.float32(0.5),
        "zeros": np.zeros_like(x),
        "constant": np.full_like(x, 3.7),
        "small": x * np.float32(1e-20),
        "outlier": np.where(np.arange(x.size).reshape(x.shape) == 5, np.float32(1e4), x),
    }[kind]


@pytest.mark.engine
@pytest.mark.parametrize("kind", ["both signs", "positive", "negative", "zeros", "constant", "small", "outlier"])
def test_equals_dynamic_quantize_linear(kind: str) -> None:
    example = np.zeros((7, 33), np.float32)
    graph = [helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"])]
    running = session(
        proto(graph, {"x": example}, {"codes": "uint8", "scale": "float32", "zero": "uint8"}, {}).SerializeToString()
    )
    for seed in range(30):
        x = spread(np.random.default_rng(seed), kind)
        codes, scale, zero = running.run(None, {"x": x})
        ours, s, z = dynamic_tensor(torch.from_numpy(x))
        assert (float(s), int(z)) == (float(scale), int(zero))
        assert np.array_equal((ours + z).numpy(), codes.astype(np.float32))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_blocks_multiply_by_the_rounded_reciprocal(size: int) -> None:
    """numpy float32, near ties: q = rint(x * f32(127 / m)), scale = f32(m / 127)."""
    rng = np.random.default_rng(size)
    largest = rng.uniform(1, 9, (400, 2, 1))
    x = ((rng.integers(-120, 120, (400, 2, size)) + 0.5) * largest / 127).astype(np.float32)
    x[..., :1] = largest
    x = x.reshape(400, 2 * size)
    x[3, :size] = 0
    blocks = x.reshape(400, 2, size)
    largest = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    codes, scale = np.rint(blocks * inverse), largest / np.float32(127)
    ours, s = dynamic_blocks(torch.from_numpy(x), size)
    assert np.array_equal(s.numpy(), scale)
    assert np.array_equal(ours.numpy(), codes)
    assert float(ours.abs().max()) == 127
    safe = np.where(largest > 0, largest, np.float32(1))
    for wrong in (blocks * (np.float32(127) * (np.float32(1) / safe)), blocks / (safe / np.float32(127))):
        assert (np.rint(wrong) != codes).any()  # 127 * f32(1 / m), and a division by the scale: the data can tell


def test_gradients_are_straight_through() -> None:
    """Nothing is clipped by a range that covers the tensor, so the gradient of level * scale is the identity."""
    x = torch.randn(6, 64, requires_grad=True)
    levels, scale, _ = dynamic_tensor(x)
    (levels * scale).sum().backward()
    blocks, block_scale = dynamic_blocks(y := torch.randn(6, 64, requires_grad=True), 32)
    (blocks * block_scale).sum().backward()
    # (1 / s) * s: two roundings of 2^-24 each
    for grad in (x.grad, y.grad):
        assert grad is not None
        torch.testing.assert_close(grad, torch.ones(6, 64), rtol=3e-7, atol=0)
