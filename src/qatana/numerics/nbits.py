"""MatMulNBits with int8 activations (accuracy level 4) as ONNX Runtime evaluates it, bit for bit.

y[m, n] = sum_k x[m, k] * (codes[n, k] - zero_point[n, b]) * scale[n, b] + bias[n],  b = k // block_size,
with x in int8 per row and block. The integers are exact in any order; the float32 sums are not, so this
module keeps the order of the engine's kernels. Every named value is float32, every operation rounds once, and
fma rounds once for both of its operations:

 1. m = max|x| of the block;  s_x = m / 127;  q = round(x * (127 / m)), 0 if m = 0;  S = s_x * sum(q).
 2. Weights enter unsigned. A step takes, per lane, an exact integer d = sum of q * code over a few columns of
    one block, and its factor c = s_x * scale:  lane = fma(d, c, lane). `_avx2` and `_avx512` say which
    columns belong to which lane. "Grouped" steps (2 bits) go by four blocks:
    low = fma(d2, c2, d0 * c0);  high = fma(d3, c3, d1 * c1);  lane = lane + (low + high).
 3. y = the lanes added: "tree" halves them repeatedly; "fold" first adds ((l0 + l1) + l2) + l3 in each four
    lanes. The last N % 4 outputs always use the tree.
 4. y = y + bias (0 if None);  t = 0, for each block t = fma(S, -(scale * zero_point), t);  y = t + y.
AVX2, 4 bits, a single row: d = sum of q * (code - zero_point) instead, and step 4 is the bias alone.

Measured with ONNX Runtime 1.31.1 on AVX2 (Zen 3) and AVX512-VNNI (Zen 5). A row's bits may depend on how many
rows there are: AVX2, 4 bits (one row, or more) and 2 bits block 64 (last row of an odd number); AVX512-VNNI,
4 bits block >= 64 and 8 bits block 128 (last row of an odd number).
Reference: contrib operator MatMulNBits; onnxruntime/core/mlas/lib, sqnbitgemm_kernel_avx2*, _avx512*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qatana import hardware
from qatana.errors import SchemeError
from qatana.numerics.dynamic import dynamic_blocks

ISAS = ("avx2", "avx512vnni")
BITS = (2, 4, 8)
# 2 bits in blocks of 256: the engine dequantizes to float instead, and ignores the accuracy level.
BLOCKS = {2: (32, 64, 128), 4: (32, 64, 128, 256), 8: (32, 64, 128, 256)}
_UNMEASURED = {("avx512vnni", 8, 256)}
# With more than one thread the engine hands out rows in stripes of this many.
_STRIPE = 128
# Outputs at a time: temporaries of 8 or 16 float64 lanes then stay in the cache.
_TILE = 1 << 15


@dataclass(frozen=True)
class _Stage:
    """Steps over equally many lanes: columns (steps, lanes, values), blocks of the lanes (steps, lanes)."""

    columns: Tensor
    blocks: Tensor


@dataclass(frozen=True)
class _Plan:
    """How one kernel evaluates some rows. halve: 16 lanes become 8 (low + high) at the end of their stage."""

    stages: tuple[_Stage, ...]
    fold: bool
    halve: bool = False
    grouped: bool = False
    signed: bool = False


def detect_isa() -> str:
    """The instruction set whose evaluation order this machine's ONNX Runtime follows: one of `ISAS`.

    Raises SchemeError on a machine whose order was not measured."""
    found = hardware.isa()
    if found not in ISAS:
        raise SchemeError(
            f"the evaluation order of MatMulNBits on '{found}' is not known; compare within a tolerance, "
            f"or run on one of {', '.join(ISAS)}"
        )
    return found


@torch.no_grad()
def matmul_nbits(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    block_size: int,
    isa: str,
    threads: int = 1,
) -> Tensor:
    """Outputs (M, N), float32, of ONNX Runtime's MatMulNBits, accuracy level 4; equations: module docstring.

    x (M, K) float32, finite; leading dimensions count as rows, as in the engine. codes (N, B, block_size)
    uint8, unpacked, 0 .. 2^bits - 1, B = ceil(K / block_size) (codes beyond K are ignored). scales (N, B)
    float32. zero_points (N, B) uint8, None means 2^(bits - 1). bias (N) float32. isa: one of `ISAS`. threads:
    of the engine; only whether it is 1 matters, for 4 bits on AVX2 when M % 128 == 1 (the last row is then
    computed alone). No gradient.
    Raises SchemeError for shapes, bits, blocks or instruction sets that were not measured."""
    _check(x, codes, scales, zero_points, bias, bits, block_size, isa)
    blocks = codes.shape[1]
    rows = x.float().reshape(-1, x.shape[-1])
    rows = torch.nn.functional.pad(rows, (0, blocks * block_size - rows.shape[1]))
    levels, row_scales = dynamic_blocks(rows, block_size)
    levels, row_scales, scales = levels.flatten(1), row_scales[..., 0], scales.float()
    out = torch.empty(len(rows), len(codes))
    middle = torch.full_like(scales, 2 ** (bits - 1)) if zero_points is None else zero_points.float()
    offset = torch.zeros(len(codes)) if bias is None else bias.float()
    for kind, tail, row, column in _tiles(len(rows), len(codes), threads):
        plan = _plan(isa, bits, block_size, blocks, kind, tail, zero_points is not None)
        part = codes[column], scales[column], middle[column], offset[column]
        out[row, column] = _tile(plan, levels[row], row_scales[row], *part)
    return out.reshape(*x.shape[:-1], len(codes))


def _check(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    bits: int,
    block_size: int,
    isa: str,
) -> None:
    if isa not in ISAS:
        raise SchemeError(f"isa '{isa}' was not measured; use one of {', '.join(ISAS)}")
    if bits not in BITS or block_size not in BLOCKS[bits] or (isa, bits, block_size) in _UNMEASURED:
        raise SchemeError(
            f"MatMulNBits with {bits} bits in blocks of {block_size} on {isa} has no known integer kernel; "
            "use 2, 4 or 8 bits in blocks of 32, 64 or 128"
        )
    blocks = -(-x.shape[-1] // block_size)
    if codes.ndim != 3 or tuple(codes.shape[1:]) != (blocks, block_size):
        raise SchemeError(
            f"codes of shape {tuple(codes.shape)} do not fit x of {x.shape[-1]} columns; "
            f"give (N, {blocks}, {block_size})"
        )
    for name, value, shape in (
        ("scales", scales, (len(codes), blocks)),
        ("zero_points", zero_points, (len(codes), blocks)),
        ("bias", bias, (len(codes),)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise SchemeError(f"{name} has shape {tuple(value.shape)}; codes need {shape}")


def _tiles(rows: int, outputs: int, threads: int) -> Iterator[tuple[str, bool, slice, slice]]:
    """(kind, tail, rows, outputs) of what one kernel computes, cut small.

    kind: "pair" rows, the "last" row of an odd number, or the "only" row; tail: the last N % 4 outputs."""
    even, main = rows - rows % 2, outputs - outputs % 4
    alone = rows == 1 or (threads > 1 and rows % _STRIPE == 1)
    spans = [("pair", 0, even), ("only" if alone else "last", even, rows)]
    for kind, first, stop in spans:
        for tail, left, right in ((False, 0, main), (True, main, outputs)):
            step = max(2, _TILE // max(1, right - left))
            for low in range(first, stop if right > left else first, step):
                yield kind, tail, slice(low, min(low + step, stop)), slice(left, right)


def _tile(
    plan: _Plan,
    levels: Tensor,
    row_scales: Tensor,
    codes: Tensor,
    scales: Tensor,
    middle: Tensor,
    bias: Tensor,
) -> Tensor:
    """Steps 2 to 4: levels (M, B * block_size), row_scales (M, B), codes (N, B, block_size) -> (M, N)."""
    weights = codes.float()
    if plan.signed:
        weights = weights - middle[:, :, None]
    weights = weights.flatten(1)
    lanes: Tensor | None = None
    for stage in plan.stages:
        advance = _grouped if plan.grouped else _sequential
        lanes = advance(stage, lanes, levels, row_scales, weights, scales)
        if plan.halve and len(lanes) == 16:
            lanes = lanes[:8] + lanes[8:]
    assert lanes is not None
    y = (_fold(lanes) if plan.fold else _tree(lanes)) + bias
    return y if plan.signed else _add_zero_points(y, levels, row_scales, scales, middle)


def _add_zero_points(y: Tensor, levels: Tensor, row_scales: Tensor, scales: Tensor, middle: Tensor) -> Tensor:
    """y + sum over blocks of S * -(scale * zero_point), one fma per block from 0."""
    sums = levels.reshape(*row_scales.shape, -1).sum(-1) * row_scales
    offsets = -(scales * middle)
    total = torch.zeros_like(y)
    for block in range(scales.shape[1]):
        total = _fma(sums[:, block, None], offsets[None, :, block], total)
    return total + y


def _dots(stage: _Stage, step: int, levels: Tensor, weights: Tensor) -> Tensor:
    """Exact integers (lanes, M, N): at most 32 * 127 * 255 < 2^24, so float32 holds them in any order."""
    columns = stage.columns[step]
    left = levels[:, columns].permute(1, 0, 2)
    right = weights[:, columns].permute(1, 2, 0)
    return torch.bmm(left, right)


def _factors(stage: _Stage, step: int, row_scales: Tensor, scales: Tensor) -> Tensor:
    """s_x * scale of each lane's block: (lanes, M, N)."""
    blocks = stage.blocks[step]
    return row_scales.T[blocks][:, :, None] * scales.T[blocks][:, None, :]


def _sequential(
    stage: _Stage, lanes: Tensor | None, levels: Tensor, row_scales: Tensor, weights: Tensor, scales: Tensor
) -> Tensor:
    """lane = fma(d, c, lane), step by step."""
    for step in range(len(stage.columns)):
        dots = _dots(stage, step, levels, weights)
        if lanes is None:
            lanes = torch.zeros_like(dots)
        lanes = _fma(dots, _factors(stage, step, row_scales, scales), lanes)
    assert lanes is not None
    return lanes


def _grouped(
    stage: _Stage, lanes: Tensor | None, levels: Tensor, row_scales: Tensor, weights: Tensor, scales: Tensor
) -> Tensor:
    """Four blocks at a time in two short chains, added to the lanes; missing blocks count as 0."""
    steps = len(stage.columns)
    for start in range(0, steps, 4):
        chains: list[Tensor | None] = [None, None]
        for step in range(start, min(start + 4, steps)):
            dots, factor = _dots(stage, step, levels, weights), _factors(stage, step, row_scales, scales)
            chain = chains[(step - start) % 2]
            chains[(step - start) % 2] = dots * factor if chain is None else _fma(dots, factor, chain)
        low, high = chains
        assert low is not None
        group = low if high is None else low + high
        lanes = group if lanes is None else lanes + group
    assert lanes is not None
    return lanes


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once to float32.

    The product is exact in float64; the sum may not be, which matters only where its float64 rounding lands
    on the midpoint of two float32 numbers: there the rounding error of the sum decides."""
    product = a.double() * b.double()
    total = product + c
    midpoint = ((total.view(torch.int64) & 0x1FFFFFFF) == 0x10000000).nonzero(as_tuple=True)
    if len(midpoint[0]):
        near, left, right = total[midpoint], product[midpoint], c.expand_as(total)[midpoint].double()
        virtual = near - left
        error = (left - (near - virtual)) + (right - virtual)
        towards = torch.where(error > 0, torch.inf, -torch.inf).double()
        total[midpoint] = torch.where(error != 0, torch.nextafter(near, towards), near)
    return total.float()


def _tree(lanes: Tensor) -> Tensor:
    """Lanes (8 or 16, M, N) halved until one is left."""
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


def _fold(lanes: Tensor) -> Tensor:
    """((l0 + l1) + l2) + l3 in each four lanes, then (p0 + p2) + (p1 + p3), or p0 + p1 of 8 lanes."""
    fours = lanes.reshape(-1, 4, *lanes.shape[1:])
    sums = ((fours[:, 0] + fours[:, 1]) + fours[:, 2]) + fours[:, 3]
    return _tree(sums)


def _plan(isa: str, bits: int, block_size: int, blocks: int, kind: str, tail: bool, has_zero_points: bool) -> _Plan:
    plan = _avx512(bits, block_size, blocks, kind)
    if isa == "avx2":
        plan = _avx2(bits, block_size, blocks, kind, tail, has_zero_points)
    return replace(plan, fold=False) if tail else plan


def _avx2(bits: int, block_size: int, blocks: int, kind: str, tail: bool, has_zero_points: bool) -> _Plan:
    """8 lanes.

    2 bits: lane i holds values 4i..4i+3 of each 32 of the block; tree; grouped, except block 64 in row pairs
    (its last N % 4 outputs are grouped again). 4 bits: two halves of 32 values (two blocks of 32, or a 64 of
    one block), interleaved by horizontal adds; a single row with zero points and block 32 takes one block a
    step. 8 bits: block 32 as 4 bits, else lane i holds values 4i..4i+3 of both halves of each 64. Fold."""
    if bits == 2:
        stage = _strided(block_size, blocks, sub=block_size, lanes=8)
        return _Plan((stage,), fold=False, grouped=block_size != 64 or kind != "pair" or tail)
    signed = bits == 4 and kind == "only"
    if block_size > 32:
        make = _interleaved_halves if bits == 4 else _strided_64
        return _Plan((make(block_size, blocks),), fold=True, signed=signed)
    if signed and has_zero_points:
        return _Plan((_strided(32, blocks, sub=32, lanes=8),), fold=True, signed=True)
    stages = _with_leftover(_horizontal(blocks), blocks, taken=blocks - blocks % 2)
    return _Plan(stages, fold=True, signed=signed)


def _avx512(bits: int, block_size: int, blocks: int, kind: str) -> _Plan:
    """16 lanes.

    2 bits: lane i holds values 4i..4i+3 of each 64 of the block (8 lanes for block 32); grouped; tree.
    Block 32: four blocks a step, interleaved; the lanes halved; leftover blocks one by one in 8 lanes; fold.
    Block 64: two blocks a step, interleaved; leftover plain. Block 128, 256: lane i holds values 4i..4i+3 of
    both halves of each 128. Row pairs by tree (8 bits block 64: fold), the last row of an odd number by
    fold."""
    if bits == 2:
        lanes = 8 if block_size == 32 else 16
        return _Plan((_strided(block_size, blocks, sub=block_size, lanes=lanes),), fold=False, grouped=True)
    if block_size == 32:
        return _Plan(_with_leftover(_quads(blocks), blocks, taken=blocks - blocks % 4), fold=True, halve=True)
    fold = kind != "pair" or (bits == 8 and block_size == 64)
    if block_size > 64:
        return _Plan((_strided(block_size, blocks, sub=128, lanes=16),), fold=fold)
    stages = [_pairs(blocks)] if blocks > 1 else []
    if blocks % 2:
        stages.append(_shifted(_strided(64, 1, sub=64, lanes=16), 64, blocks - 1))
    return _Plan(tuple(stages), fold=fold)


def _strided(block_size: int, blocks: int, *, sub: int, lanes: int) -> _Stage:
    """One step per `sub` values: lane i holds values 4i..4i+3 of each 4 * lanes of them."""
    offsets = torch.arange(sub).reshape(-1, lanes, 4).transpose(0, 1).reshape(lanes, -1)
    starts = torch.arange(0, blocks * block_size, sub)
    owners = (starts // block_size)[:, None].expand(-1, lanes)
    return _Stage(starts[:, None, None] + offsets, owners)


def _strided_64(block_size: int, blocks: int) -> _Stage:
    return _strided(block_size, blocks, sub=64, lanes=8)


def _interleaved_halves(block_size: int, blocks: int) -> _Stage:
    """AVX2, one step per 64 values of a block: lane 4h + 2s + t holds 8 values of half s from 16h + 8t."""
    starts = torch.arange(0, blocks * block_size, 64)
    owners = (starts // block_size)[:, None].expand(-1, 8)
    return _Stage(starts[:, None, None] + _horizontal_offsets(), owners)


def _horizontal(blocks: int) -> _Stage:
    """AVX2, block 32, two blocks a step: the halves of `_interleaved_halves` are the two blocks."""
    first = 2 * torch.arange(blocks // 2)
    owner = torch.tensor([0, 0, 1, 1]).repeat(2)
    return _Stage(64 * (first // 2)[:, None, None] + _horizontal_offsets(), first[:, None] + owner)


def _horizontal_offsets() -> Tensor:
    """(8, 8) offsets, lane 4h + 2s + t: 32s + 16h + 8t + 0..7 (two horizontal adds of 16-bit pairs)."""
    h, s, t, value = torch.meshgrid(*(torch.arange(n) for n in (2, 2, 2, 8)), indexing="ij")
    return (32 * s + 16 * h + 8 * t + value).reshape(8, 8)


def _quads(blocks: int) -> _Stage:
    """AVX512, block 32, four blocks a step: lane 4g + 2p + t holds, of block 2p + g // 2, the values of its
    four-value groups 4(g % 2) + t and two further on."""
    first = 4 * torch.arange(blocks // 4)
    g, p, t, pair, value = torch.meshgrid(*(torch.arange(n) for n in (4, 2, 2, 2, 4)), indexing="ij")
    block = 2 * p + g // 2
    offsets = (32 * block + 4 * (4 * (g % 2) + t + 2 * pair) + value).reshape(16, 8)
    return _Stage(32 * first[:, None, None] + offsets, first[:, None] + block[..., 0, 0].reshape(16))


def _pairs(blocks: int) -> _Stage:
    """AVX512, block 64, two blocks a step: lane 4g + 2t + p holds, of block p, the values of its four-value
    groups 4g + t and two further on."""
    first = 2 * torch.arange(blocks // 2)
    g, t, p, pair, value = torch.meshgrid(*(torch.arange(n) for n in (4, 2, 2, 2, 4)), indexing="ij")
    offsets = (64 * p + 4 * (4 * g + t + 2 * pair) + value).reshape(16, 8)
    return _Stage(64 * first[:, None, None] + offsets, first[:, None] + p[..., 0, 0].reshape(16))


def _with_leftover(stage: _Stage, blocks: int, *, taken: int) -> tuple[_Stage, ...]:
    """Block 32: blocks that do not fill a step follow one by one, in 8 lanes of 4 values."""
    stages = [stage] if taken else []
    if taken < blocks:
        stages.append(_shifted(_strided(32, blocks - taken, sub=32, lanes=8), 32, taken))
    return tuple(stages)


def _shifted(stage: _Stage, block_size: int, blocks: int) -> _Stage:
    return _Stage(stage.columns + block_size * blocks, stage.blocks + blocks)
