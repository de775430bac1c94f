"""Float32 gradients by integer products: their error against float64, beside that of a float32 product of the same operands."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qatana.hardware import isa
from qatana.numerics import fused, product_gradients, scheme, split_products
from qatana.numerics.coded import encode, encode_weight

SHAPES = [(5, 7, 3), (33, 130, 20), (1, 64, 64), (64, 1, 9), (200, 768, 40)]
BOUND = 2.0**-23
"""Of an element of g, in units of the largest of its row: half a unit of q, and the roundings of 1 / s and s (2^-24 each)."""


def close_to_float64(found: Tensor, g: Tensor, codes: Tensor, reduced: int, scale: float = 1.0) -> None:
    """|error| <= what the elements of g are off, times the codes, and some roundings of the result (three terms joined, two scales)."""
    exact = g.double() @ codes.double() * scale
    of_g = BOUND * g.abs().amax(reduced, keepdim=True).double()
    allowed = (of_g * codes.double().abs().sum(0) + 4 * BOUND * (g.double().abs() @ codes.double().abs())) * scale
    assert found.dtype == torch.float32
    assert ((found.double() - exact).abs() <= allowed).all()


def operands(m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """Rows of very different size, with outliers, and codes that include both ends."""
    torch.manual_seed(0)
    g = torch.randn(m, k) * 10.0 ** torch.randint(-6, 6, (m, 1))
    g[0, 0] *= 1000
    codes = torch.randint(-128, 128, (k, n), dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = -128, 127
    return g, codes


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_times_codes(shape: tuple[int, int, int], compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "WORTH", 1)
    g, codes = operands(*shape)
    columns = torch.rand(1, shape[1]) + 0.5
    with fused.compiled(compiled):
        close_to_float64(split_products.times_codes(g, None, codes), g, codes, 1)
        close_to_float64(split_products.times_codes(g, columns, codes), g * columns, codes, 1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zero", [0, -128, 100])
def test_transposed_times_levels(shape: tuple[int, int, int], zero: int) -> None:
    m, k, n = shape
    g, codes = operands(m, k, n)
    g = g.t().contiguous()
    levels = codes.double() - zero
    found = split_products.transposed_times_levels(g, None, codes, torch.tensor(float(zero)), torch.tensor(0.25))
    close_to_float64(found, g.t(), levels, 1, 0.25)
    rows = torch.rand(k, 1) + 0.5
    close_to_float64(split_products.transposed_times_levels(g, rows, codes, None, None), (g * rows).t(), codes, 1)


def test_it_is_no_worse_than_a_float32_product() -> None:
    """Root mean square errors against float64: integers of 24 bits and exact sums leave less than float32 sums do."""
    torch.manual_seed(0)
    g, codes = torch.randn(256, 1024), torch.randint(-128, 128, (1024, 256), dtype=torch.int8)
    exact = g.double() @ codes.double()
    ours = (split_products.times_codes(g, None, codes) - exact).square().mean()
    assert ours <= (g @ codes.float() - exact).square().mean()


def test_digits_are_exact() -> None:
    """2^16 q_0 + 2^8 q_1 + q_2 = q for the ends, carries and ties."""
    most = 127.0 * 2**16
    q = torch.tensor([[0.0, 1, -1, 127, 128, -128, -129, 32767, 32768, -32768, -32769, 65535, most, -most, most - 1]])
    a, b, c = split_products._split(q, None, torch.tensor([[most]]))
    assert all(t.dtype == torch.int8 for t in (a, b, c))
    assert torch.equal(a.long() * 2**16 + b.long() * 2**8 + c.long(), q.long())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    g, codes = torch.ones(3, 4), torch.ones(4, 2, dtype=torch.int8)
    g[1, 2] = bad
    found = split_products.times_codes(g, None, codes)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], torch.full((2, 2), 4.0))
    assert not split_products.transposed_times_levels(g, None, g.to(torch.int8), None, None)[2].isfinite().any()


def test_zeros_and_the_smallest_numbers() -> None:
    codes = torch.full((4, 2), -128, dtype=torch.int8)
    for size in (0.0, 2.0**-149, 2.0**-126):
        found = split_products.times_codes(torch.full((2, 4), size), None, codes)
        assert torch.equal(found, torch.zeros(2, 2)), (
            "elements that small become 0: the largest, 2^-126, is below 2^-123"
        )


def test_sums_that_may_leave_int32_are_refused() -> None:
    """The largest sum of levels is k * 128 * (128 + 255); the last k below it is taken where the processor has VNNI."""
    cpu, most = torch.device("cpu"), (2**31 - 1) // (128 * 384)
    assert split_products.pays(2**10, 2**10, most, cpu) == (isa() == "avx512vnni")
    assert not split_products.pays(2**10, 2**10, most + 1, cpu)


@pytest.mark.parametrize("channel", ["channel", "tensor"])
def test_gradients_of_linear_layers(channel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layer with and without: both as near to float64 as float32 is."""
    torch.manual_seed(0)
    x, w, upstream = torch.randn(64, 96), torch.randn(48, 96), torch.randn(64, 48)
    a = encode(x, torch.tensor(0.02), torch.tensor(7.0), scheme("uint8", symmetric=False), "onnxruntime")
    b = encode_weight(w, scheme("int8n", channel, scale="dynamic"))
    expected_x = upstream.double() @ (b.codes.double() * b.scale.double())
    expected_w = upstream.double().t() @ ((a.codes.double() - a.zero_point.double()) * a.scale.double())
    for wanted in (False, True):
        monkeypatch.setattr(split_products, "pays", lambda *_, wanted=wanted: wanted)
        head = (upstream, a.codes, a.scale, a.zero_point, b.codes, b.scale)
        d_x, d_w = product_gradients.linear_gradients(*head, True, True, False)
        for found, expected in ((d_x, expected_x), (d_w, expected_w)):
            # sums of up to 96 products: some roundings of 2^-24 of the largest
            assert (found.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
