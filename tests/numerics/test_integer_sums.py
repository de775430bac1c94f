"""Every kernel gives the one sum that integers have: the reference is int64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics.integer_sums import KERNELS, Geometry, choose, convolution_sum, integer_sum, prefer, row_sums
from qatana.numerics.masks import apply_mask, length, pack_mask, unpack_mask

CPU = torch.device("cpu")
SHAPES = [
    (1, 7, 768),
    (3, 5, 7),
    (0, 5, 8),
    (5, 0, 8),
    (4, 3, 0),
    (1, 1, 1),
    (17, 33, 1023),
    (5, 9, 4609),
    (2, 2, 140_000),
]


def codes(*shape: int, extreme: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if extreme:
        return torch.randint(0, 2, shape, generator=generator).mul(255).sub(128).to(torch.int8)
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "bfloat16"])
@pytest.mark.parametrize("sign", ["mixed", "extreme", "lowest"])
def test_a_kernel_is_exact_wherever_it_is_taken(shape: tuple[int, int, int], kernel: str, sign: str) -> None:
    m, n, k = shape
    a, b = codes(m, k, extreme=sign == "extreme"), codes(n, k, extreme=sign == "extreme", seed=1)
    if sign == "lowest":  # the largest sum there is: k * 128^2
        a, b = torch.full_like(a, -128), torch.full_like(b, -128)
    with prefer(kernel):
        found = integer_sum(a, b)
    assert torch.equal(found.to(torch.int64), a.long() @ b.long().t())


def layouts(rows: int, columns: int) -> dict[str, Tensor]:
    """The same shape in memory of every kind."""
    return {
        "plain": codes(rows, columns),
        "transposed": codes(columns, rows).t(),
        "columns of more": codes(rows, columns + 3)[:, 1 : columns + 1],
        "every other row": codes(2 * rows, columns)[::2],
        "every other column": codes(rows, 2 * columns)[:, ::2],
        "part of a transposed one": codes(columns + 3, rows + 2).t()[1 : rows + 1, 1 : columns + 1],
    }


@pytest.mark.parametrize("m", [1, 2, 5])
@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("k", [1, 2, 7, 64])
def test_one_row_or_column_of_any_strides(m: int, n: int, k: int) -> None:
    """torch 2.13's _int_mm is wrong for some of these pairs, silently: those with a dimension of 1 and the strides of the other kind."""
    for a, b in itertools.product(layouts(m, k).values(), layouts(n, k).values()):
        assert torch.equal(integer_sum(a, b).long(), a.long() @ b.long().t())


def test_strides_do_not_matter() -> None:
    a, b = codes(64, 48).t()[::2], codes(64, 80, seed=1)[:, ::2].t()
    assert torch.equal(integer_sum(a, b).long(), a.long() @ b.long().t())


def test_what_is_chosen() -> None:
    if not KERNELS["int_mm"].takes(
        64, 64, 64, CPU
    ):  # a processor whose int8 products saturate: floats, exact all the same
        assert choose(64, 64, 1023, CPU) == "float32"
        assert choose(64, 64, 1024, CPU) == "float64"
        return
    assert choose(64, 64, 64, CPU) == "int_mm"
    assert choose(64, 64, 2**31 // 128**2, CPU) == "float64", "the sum may leave int32"
    with prefer("float32"):
        assert choose(64, 64, 1023, CPU) == "float32"
        assert choose(64, 64, 1024, CPU) == "int_mm", "1024 * 128^2 = 2^24 is not below 2^24"
    with pytest.raises(SchemeError, match="unknown kernel 'int_m'; did you mean 'int_mm'"), prefer("int_m"):
        pass


def test_row_sums_of_long_rows() -> None:
    assert row_sums(torch.full((2, 300_000), 127, dtype=torch.int8)).tolist() == [38_100_000] * 2


CONVOLUTIONS = [
    # batch, channels, space, filters, kernel, stride, padding, groups, dilation
    (2, 5, (9, 7), 7, (3, 3), (1, 1), (1, 1), 1, (1, 1)),
    (2, 8, (9, 9), 8, (3, 3), (2, 2), (0, 0), 2, (1, 1)),
    (1, 16, (7, 7), 16, (3, 3), (1, 1), (1, 1), 16, (1, 1)),
    (2, 3, (8, 8), 4, (3, 1), (1, 2), (2, 0), 1, (2, 1)),
    (0, 3, (4, 4), 4, (3, 3), (1, 1), (1, 1), 1, (1, 1)),
    (2, 3, (9,), 4, (3,), (2,), (1,), 1, (1,)),
    (1, 1200, (4, 4), 3, (3, 3), (1, 1), (1, 1), 1, (1, 1)),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("zero_point", [-128, -11, 0, 127])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_are_exact(case: tuple, zero_point: int, layout: torch.memory_format) -> None:
    batch, channels, space, filters, kernel, stride, padding, groups, dilation = case
    x = codes(batch, channels, *space)
    w = codes(filters, channels // groups, *kernel, seed=1)
    if channels == 1200:  # sums above 2^24, which float32 does not hold
        x, w = torch.full_like(x, 127 if zero_point < 0 else -128), torch.full_like(w, 127)
    x = x.contiguous(memory_format=layout) if x.ndim == 4 else x
    found = convolution_sum(
        x, torch.tensor(float(zero_point)), w, Geometry(list(stride), list(padding), list(dilation), groups)
    )
    convolve = F.conv2d if x.ndim == 4 else F.conv1d
    assert torch.equal(
        found.double(), convolve(x.double() - zero_point, w.double(), None, stride, padding, dilation, groups)
    )


@pytest.mark.parametrize("elements", [0, 1, 7, 8, 9, 1000, 70_001, 5_000_001])
def test_masks_keep_every_bit(elements: int) -> None:
    inside = torch.rand(elements, generator=torch.Generator().manual_seed(0)) > 0.3
    mask = pack_mask(inside)
    assert mask.numel() == length(elements)
    assert torch.equal(unpack_mask(mask, elements).bool(), inside)
    x = torch.randn(elements)
    assert torch.equal(apply_mask(x, mask), x * inside)
