"""Attention on codes as one operator: what lies between the projections' codes and the context's is never kept.

    S = engine(q_codes k_codes^T) + mask          exact integer products, the engine's formulas (numerics.engine)
    P = dropout(softmax(S)),  P_hat = its codes
    y = engine(P_codes v_codes), requantized or float

Kept for the backward pass: the codes of q, k, v, a bit per element where dropout or the context's range cut. Scores and probabilities are
computed once more from the codes, bit for bit; then the float formulas' gradients:
    d P_hat = dy v_hat^T,  d v_hat = P_hat^T dy,  d S = P (d P - sum(d P P)),  d q_hat = d S k_hat scaling,  d k_hat = d S^T q_hat scaling

A few batch elements at a time, all heads of them: their scores stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from qatana.numerics.coded import Coded, decoded, masked
from qatana.numerics.engine import Affine, Engine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.fused import sweep
from qatana.numerics.integer_sums import EXACT_FLOAT, LEVEL, exact_float, integer_sum
from qatana.numerics.masks import length, pack_mask, unpack_mask
from qatana.numerics.product_gradients import reduced_gradients
from qatana.numerics.products import is_inside
from qatana.numerics.workspace import buffer

DRAWS = 2**16
SCORES = 2**21
"""Scores computed at a time, 8 MB of float32."""
FLOAT_PRODUCTS = 2**17
"""Entries of a head's scores from which one integer product per head pays for its call; below, all heads go into one float product."""


def chunks(batch: int, entries: int) -> Iterator[slice]:
    """Batch elements that are worked on at a time, `entries` scores each."""
    size = max(1, min(batch, SCORES // max(1, entries)))
    return (slice(start, min(batch, start + size)) for start in range(0, batch, size))


class _Products:
    """The arithmetic of one call: exact scores, probabilities and their codes of one batch element at a time."""

    def __init__(
        self, q: Tensor, q_scale: Tensor, q_zero: Tensor, k: Tensor, k_scale: Tensor, k_zero: Tensor, v: Tensor,
        v_scale: Tensor, v_zero: Tensor, mask: Tensor | None, scaling: float, dropout: float, probability: Affine,
        engine: str,
    ) -> None:  # fmt: skip
        self.q, self.k, self.v = (q, q_scale, q_zero), (k, k_scale, k_zero), (v, v_scale, v_zero)
        self.mask, self.scaling, self.probability, self.engine = mask, scaling, probability, engine_named(engine)
        self.threshold = round(dropout * DRAWS)
        self.kept_share = 1 - self.threshold / DRAWS
        self.share = torch.full((), 1 - self.threshold / DRAWS, device=q.device)

    def softmax(self, b: slice) -> Tensor:
        """softmax(scores) (n, H, Q, T) of batch elements, float32, in memory that is good until the next call."""
        (q, q_scale, q_zero), (k, k_scale, k_zero) = self.q, self.k
        acc = _exact_products(q[b], q_zero, k[b], k_zero)
        scores = buffer("scores", acc.shape, torch.float32, acc.device)
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[b]
        sweep(_scores, [scores], [acc, (q_scale * self.scaling) * k_scale, mask], self.engine)
        p = buffer("probabilities", acc.shape, torch.float32, acc.device)
        return torch.ops.aten._softmax.out(scores, -1, False, out=p)

    def draw(self, elements: int, device: torch.device) -> Tensor | None:
        """uint8 (n,), 1 where dropout keeps: 16 random bits each, so its probability is a multiple of 2^-16."""
        if not self.threshold:
            return None
        words = torch.empty(-(-elements // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
        return words.view(torch.int16)[:elements].ge(self.threshold - DRAWS // 2).view(torch.uint8)

    def levels(self, p: Tensor, keep: Tensor | None) -> Tensor:
        """Levels of the probabilities behind dropout."""
        y = self.probability
        out = buffer("levels", p.shape, torch.float32, p.device)
        keep, constants = None if keep is None else keep.view(p.shape), (self.engine, y.lo, y.hi)
        sweep(_levels, [out], [p, keep, self.share, y.scale, y.zero_point], *constants, compile=self.engine.fuses)
        return out

    def context(self, b: slice, levels: Tensor) -> Tensor:
        """acc (n, H, Q, D), exact."""
        v, _, v_zero = self.v
        columns = v[b].transpose(2, 3)
        largest = levels.shape[-1] * LEVEL**2
        if largest < EXACT_FLOAT or float(levels.abs().sum(-1).amax()) * LEVEL < EXACT_FLOAT:
            return _float_products(levels, _levels_of(columns, v_zero, "columns", torch.float32))
        zero = self.probability.zero_point - (0 if self.probability.lo < 0 else 128)
        return _integer_products((levels + zero).to(torch.int8), zero, columns, v_zero)

    @property
    def s32(self) -> Tensor:
        """Of the context; NaN where an operand holds one, which codes of probabilities would hide."""
        return self.probability.scale * self.v[1] + 0 * (self.q[1] * self.k[1])


def _scores(acc: Tensor, s32: Tensor, mask: Tensor | None, engine: Engine) -> tuple[Tensor]:
    scores = engine.product(acc, s32)
    return (scores if mask is None else scores + mask,)


def _dropped(p: Tensor, keep: Tensor | None, share: Tensor) -> Tensor:
    """p where kept, divided by the share that is kept."""
    return p if keep is None else p * keep / share


def _levels(
    p: Tensor, keep: Tensor | None, share: Tensor, scale: Tensor, zero_point: Tensor, engine: Engine, lo: int, hi: int
) -> tuple[Tensor]:
    return (engine.levels(_dropped(p, keep, share), Affine(scale, zero_point, lo, hi)),)


def _levels_of(codes: Tensor, zero_point: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    """code - zero_point, exact in float32 and in bfloat16, contiguous, in the buffer of that name."""
    out = buffer(name, codes.shape, dtype, codes.device)
    sweep(decoded, [out], [codes, None, zero_point])
    return out


def _exact_products(a: Tensor, a_zero: Tensor, b: Tensor, b_zero: Tensor) -> Tensor:
    """sum (a - a_zero) (b - b_zero) over the last dimension, exact floats:   a (n, H, M, K), b (n, H, N, K) int8 -> (n, H, M, N)."""
    if a.shape[-1] * LEVEL**2 < EXACT_FLOAT and a.shape[2] * b.shape[2] < FLOAT_PRODUCTS:
        rows, columns = _levels_of(a, a_zero, "rows", torch.float32), _levels_of(b, b_zero, "columns", torch.float32)
        return _float_products(rows, columns)
    return _integer_products(a, a_zero, b, b_zero)


def _float_products(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of levels whose sums of products are below 2^24: exact in float32, in whatever order."""
    return _batched(a, b.transpose(2, 3), "products")


def _batched(a: Tensor, b: Tensor, name: str) -> Tensor:
    """a b (n, H, M, N) for a (n, H, M, K), b (n, H, K, N), in the buffer of that name."""
    out = buffer(name, (*a.shape[:3], b.shape[3]), a.dtype, a.device)
    torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
    return out


def _integer_products(a: Tensor, a_zero: Tensor, b: Tensor, b_zero: Tensor) -> Tensor:
    """As `_exact_products`:   sum a b - b_zero sum a - a_zero sum b + K a_zero b_zero."""
    (n, heads, rows, inner), columns = a.shape, b.shape[2]
    total = buffer("products", (n, heads, rows, columns), torch.int32, a.device)
    for i in range(n):
        for h in range(heads):
            integer_sum(a[i, h], b[i, h], total[i, h])
    if bool(b_zero != 0):
        total -= (a.float().sum(3) * b_zero).to(torch.int32)[..., :, None]
    if bool(a_zero != 0):
        total -= (a_zero * (b.float().sum(3) - inner * b_zero)).to(torch.int32)[..., None, :]
    return exact_float(total)


def _outputs(
    acc: Tensor, s32: Tensor, y_scale: Tensor, y_zero: Tensor, engine: Engine, lo: int, hi: int
) -> tuple[Tensor, ...]:
    """y_hat and where it is inside its range, or y where hi = lo."""
    if lo == hi:
        return (engine.product(acc, s32),)
    y = Affine(y_scale, y_zero, lo, hi)
    return engine.product_levels(acc, s32, y) * y_scale, is_inside(engine.product(acc, s32), y).to(torch.int32)


def _heads_inside(shape: torch.Size, device: torch.device) -> Tensor:
    """Float memory for (B, H, Q, D) that lies as (B, Q, H, D), as projections read and write it."""
    batch, heads, rows, size = shape
    return torch.empty((batch, rows, heads, size), dtype=torch.float32, device=device).transpose(1, 2)


def _kept_bytes(batch: int, entries: int, dropout: float) -> int:
    """Bytes of the masks of dropout, one for each chunk."""
    return sum(length((c.stop - c.start) * entries) for c in chunks(batch, entries)) if round(dropout * DRAWS) else 0


@torch.library.custom_op("qatana::coded_attention", mutates_args=())
def _attention(
    q_hat: Tensor, q: Tensor, q_scale: Tensor, q_zero: Tensor, k_hat: Tensor, k: Tensor, k_scale: Tensor, k_zero: Tensor,
    v_hat: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, mask: Tensor | None, scaling: float, dropout: float,
    p_scale: Tensor, p_zero: Tensor, p_lo: int, p_hi: int, y_scale: Tensor, y_zero: Tensor, y_lo: int, y_hi: int,
    engine: str, keep_codes: bool, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, H, Q, D) as a view of (B, Q, H, D), where y was inside its range, where dropout kept, codes of P if asked for."""
    with torch.no_grad():
        probability = Affine(p_scale, p_zero, p_lo, p_hi)
        work = _Products(
            q, q_scale, q_zero, k, k_scale, k_zero, v, v_scale, v_zero, mask, scaling, dropout, probability, engine
        )
        batch, heads, rows, _ = q.shape
        entries, requantized = heads * rows * k.shape[2], y_hi > y_lo
        out = _heads_inside(torch.Size((batch, heads, rows, v.shape[3])), q.device)
        inside = torch.empty(out.shape if requantized else 0, dtype=torch.uint8, device=q.device)
        kept = torch.empty(_kept_bytes(batch, entries, dropout), dtype=torch.uint8, device=q.device)
        codes = torch.empty((batch, heads, rows, k.shape[2]) if keep_codes else 0, dtype=torch.uint8, device=q.device)
        start = 0
        for b in chunks(batch, entries):
            keep = work.draw((b.stop - b.start) * entries, q.device)
            if keep is not None:
                bits = pack_mask(keep)
                kept[start : start + bits.numel()] = bits
                start += bits.numel()
            levels = work.levels(work.softmax(b), keep)
            if keep_codes:
                codes[b] = levels + p_zero
            operands = [work.context(b, levels), work.s32, y_scale, y_zero]
            outs = [out[b], *([inside[b]] if requantized else [])]
            sweep(_outputs, outs, operands, work.engine, y_lo, y_hi, compile=work.engine.fuses)
    return out, pack_mask(inside), kept, codes


@_attention.register_fake
def _(q_hat, q, q_scale, q_zero, k_hat, k, k_scale, k_zero, v_hat, v, v_scale, v_zero, mask, scaling, dropout,
      p_scale, p_zero, p_lo, p_hi, y_scale, y_zero, y_lo, y_hi, engine, keep_codes, reduced):  # fmt: skip
    (batch, heads, rows, _), columns = q.shape, k.shape[2]
    of = {"device": q.device}
    out = _heads_inside(torch.Size((batch, heads, rows, v.shape[3])), q.device)
    codes = (batch, heads, rows, columns) if keep_codes else 0
    inside = length(out.numel()) if y_hi > y_lo else 0
    return (
        out,
        torch.empty(inside, dtype=torch.uint8, **of),
        torch.empty(_kept_bytes(batch, heads * rows * columns, dropout), dtype=torch.uint8, **of),
        torch.empty(codes, dtype=torch.uint8, **of),
    )


def _save_attention(ctx, inputs, output) -> None:
    (_, q, q_scale, q_zero, _, k, k_scale, k_zero, _, v, v_scale, v_zero, mask, ctx.scaling, ctx.dropout,
     p_scale, p_zero, ctx.p_lo, ctx.p_hi, _, _, _, _, ctx.engine, _, ctx.reduced) = inputs  # fmt: skip
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    operands = (q, q_scale, q_zero, k, k_scale, k_zero, v, v_scale, v_zero, mask, p_scale, p_zero)
    ctx.save_for_backward(*operands, *output[1:3])


def _attention_backward(ctx, grad: Tensor | None, *_: Tensor | None):
    if grad is None:
        return (None,) * 26
    *operands, mask, p_scale, p_zero, inside, kept = ctx.saved_tensors
    grad = masked(grad, inside, [0, 1, 2, 3]) if inside.shape[0] else grad
    d_q, d_k, d_v = torch.ops.qatana.coded_attention_gradients(
        grad,
        *operands,
        mask,
        p_scale,
        p_zero,
        kept,
        ctx.scaling,
        ctx.dropout,
        ctx.p_lo,
        ctx.p_hi,
        ctx.engine,
        ctx.reduced,
    )
    none = (None,) * 3
    return d_q, *none, d_k, *none, d_v, *none, *(None,) * 14


_attention.register_autograd(_attention_backward, setup_context=_save_attention)


@torch.library.custom_op("qatana::coded_attention_gradients", mutates_args=())
def _gradients(
    grad: Tensor, q: Tensor, q_scale: Tensor, q_zero: Tensor, k: Tensor, k_scale: Tensor, k_zero: Tensor, v: Tensor,
    v_scale: Tensor, v_zero: Tensor, mask: Tensor | None, p_scale: Tensor, p_zero: Tensor, kept: Tensor, scaling: float,
    dropout: float, p_lo: int, p_hi: int, engine: str, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """d q_hat, d k_hat, d v_hat in the shapes of q, k, v, float32."""
    probability = Affine(p_scale, p_zero, p_lo, p_hi)
    work = _Products(
        q, q_scale, q_zero, k, k_scale, k_zero, v, v_scale, v_zero, mask, scaling, dropout, probability, engine
    )
    dtype, start = torch.bfloat16 if reduced else torch.float32, 0
    d_q, d_k, d_v = (_heads_inside(x.shape, x.device) for x in (q, k, v))
    entries = q.shape[1] * q.shape[2] * k.shape[2]
    for b in chunks(q.shape[0], entries):
        keep, count = None, (b.stop - b.start) * entries
        if work.threshold:
            keep = unpack_mask(kept[start : start + length(count)], count)
            start += length(count)
        _chunk_gradients(work, b, grad[b], keep, dtype, (d_q[b], d_k[b], d_v[b]))
    return d_q, d_k, d_v


def _chunk_gradients(
    work: _Products, b: slice, grad: Tensor, keep: Tensor | None, dtype: torch.dtype, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Write the gradients of some batch elements. Scales stay outside of the products: levels are exact in bfloat16."""
    (q, q_scale, q_zero), (k, k_scale, k_zero), (v, v_scale, v_zero) = work.q, work.k, work.v
    d_q, d_k, d_v = out
    p, y = work.softmax(b), work.probability
    keep = None if keep is None else keep.view(p.shape)
    levels, dy = _as(work.levels(p, keep), dtype, "low levels"), _as(grad, dtype, "upstream")
    _write(d_v, _batched(levels.transpose(2, 3), dy, "product"), y.scale)
    raw = _batched(dy, _levels_of(v[b], v_zero, "columns", dtype).transpose(2, 3), "products")
    d_p = buffer("scores", p.shape, torch.float32, p.device)
    sweep(_behind_levels, [d_p], [raw, p, keep, work.share, y.scale, y.zero_point, v_scale], y.lo, y.hi)
    d_s = buffer("levels", p.shape, torch.float32, p.device)
    torch.ops.aten._softmax_backward_data.out(d_p, p, -1, torch.float32, grad_input=d_s)
    d_s = _as(d_s, dtype, "low levels")
    _write(d_q, _batched(d_s, _levels_of(k[b], k_zero, "columns", dtype), "product"), k_scale * work.scaling)
    _write(
        d_k, _batched(d_s.transpose(2, 3), _levels_of(q[b], q_zero, "rows", dtype), "product"), q_scale * work.scaling
    )


def _as(x: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """x of this dtype, contiguous: itself, or in the buffer of that name."""
    if x.dtype == dtype and x.is_contiguous():
        return x
    out = buffer(name, x.shape, dtype, x.device)
    sweep(_same, [out], [x])
    return out


def _same(x: Tensor) -> tuple[Tensor]:
    return (x,)


def _write(out: Tensor, product: Tensor, scale: Tensor) -> None:
    sweep(_times, [out], [product, scale])


def _times(product: Tensor, scale: Tensor) -> tuple[Tensor]:
    return (product.float() * scale,)


def _behind_levels(
    raw: Tensor,
    p: Tensor,
    keep: Tensor | None,
    share: Tensor,
    p_scale: Tensor,
    p_zero: Tensor,
    v_scale: Tensor,
    lo: int,
    hi: int,
) -> tuple[Tensor]:
    """d P from d P_hat: 0 where the codes of P were clipped (dropout's division can lift them out of their range)."""
    inside = is_inside(_dropped(p, keep, share), Affine(p_scale, p_zero, lo, hi))
    return (_dropped(raw.float() * v_scale * inside, keep, share),)


@_gradients.register_fake
def _(grad, q, q_scale, q_zero, k, k_scale, k_zero, v, v_scale, v_zero, mask, p_scale, p_zero, kept, scaling,
      dropout, p_lo, p_hi, engine, reduced):  # fmt: skip
    return tuple(_heads_inside(x.shape, x.device) for x in (q, k, v))


def attention(
    q: Coded, k: Coded, v: Coded, mask: Tensor | None, scaling: float, dropout: float,
    probability: Affine, context: Affine | None, engine: str, keep: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y_hat (B, H, Q, D), or y where `context` is None.   q (B, H, Q, D), k and v (B, H, T, D); mask broadcasts to (B, H, Q, T) and gets no
    gradient.

    dropout    probability with which entries of P become 0, the rest divided by 1 - dropout
    keep       return the codes of P (B, H, Q, T) uint8 as well, for verification; else an empty tensor"""
    y = context or Affine(probability.scale, probability.zero_point, 0, 0)
    operands = (x for c in (q, k, v) for x in (c.hat, c.codes, c.scale, c.zero_point))
    found = _attention(
        *operands, mask, scaling, dropout, *probability, *y, engine, keep, reduced_gradients(q.codes.device)
    )
    return found[0], found[3]
