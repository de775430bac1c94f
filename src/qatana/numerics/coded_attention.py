"""Attention on codes as one operator: what lies between the projections' codes and the context's is never kept.

    S = engine(q_codes k_codes^T) + mask          exact integer products, the engine's formulas (numerics.engine)
    P = dropout(softmax(S)),  P_hat = its codes
    y = engine(P_codes v_codes), requantized or float

Kept for the backward pass: the codes of q, k, v, a bit per element where dropout or the context's range cut. Scores and probabilities are
computed once more from the codes, bit for bit; then the float formulas' gradients:
    d P_hat = dy v_hat^T,  d v_hat = P_hat^T dy,  d S = P (d P - sum(d P P)),  d q_hat = d S k_hat scaling,  d k_hat = d S^T q_hat scaling

One batch element at a time, all heads of it: its scores stay in the processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.numerics.coded import Coded, masked
from qatana.numerics.engine import Affine
from qatana.numerics.engines import engine as engine_named
from qatana.numerics.integer_sums import exact_float, integer_sum
from qatana.numerics.masks import length, pack_mask, unpack_mask
from qatana.numerics.products import mark_inside, reduced_gradients, touches_ends
from qatana.numerics.workspace import buffer


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
        self.p_origin = 0 if probability.lo < 0 else 128

    def softmax(self, b: int) -> Tensor:
        """softmax(scores) (H, Q, T) of a batch element, float32."""
        (q, q_scale, q_zero), (k, k_scale, k_zero) = self.q, self.k
        acc = _exact_products(q[b], q_zero, k[b], k_zero)
        scores = self.engine.product(acc, (q_scale * self.scaling) * k_scale)
        if self.mask is not None:
            scores = scores + self.mask[b if self.mask.shape[0] > 1 else 0]
        return torch.softmax(scores, -1)

    def draw(self, elements: int, device: torch.device) -> Tensor | None:
        """uint8 (n,), 1 where dropout keeps: 16 random bits each, so its probability is a multiple of 2^-16."""
        if not self.threshold:
            return None
        words = torch.empty(-(-elements // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
        return words.view(torch.int16)[:elements].ge(self.threshold - DRAWS // 2).view(torch.uint8)

    def drop(self, p: Tensor, keep: Tensor | None) -> Tensor:
        """p where kept, divided by the share that is kept."""
        return p if keep is None else p * keep.view(p.shape) / torch.full((), self.kept_share, device=p.device)

    def levels(self, p: Tensor) -> Tensor:
        return self.engine.levels(p, self.probability)

    def context(self, b: int, levels: Tensor) -> Tensor:
        """acc (H, Q, D), exact."""
        v, _, v_zero = self.v
        zero = self.probability.zero_point - self.p_origin
        codes = (levels + zero).to(torch.int8)
        return _exact_products(codes, zero, v[b].transpose(1, 2), v_zero)

    @property
    def s32(self) -> Tensor:
        """Of the context; NaN where an operand holds one, which codes of probabilities would hide."""
        return self.probability.scale * self.v[1] + 0 * (self.q[1] * self.k[1])


DRAWS = 2**16


def _exact_products(a: Tensor, a_zero: Tensor, b: Tensor, b_zero: Tensor) -> Tensor:
    """sum (a - a_zero) (b - b_zero) over the last dimension, exact floats:   a (H, M, K), b (H, N, K) int8 -> (H, M, N).

    = sum a b - b_zero sum a - a_zero sum b + K a_zero b_zero"""
    heads, rows, inner = a.shape
    total = buffer("products", (heads, rows, b.shape[1]), torch.int32, a.device)
    for h in range(heads):
        integer_sum(a[h], b[h], total[h])
    if bool(b_zero != 0):
        total -= (a.float().sum(2) * b_zero).to(torch.int32)[:, :, None]
    if bool(a_zero != 0):
        total -= (a_zero * (b.float().sum(2) - inner * b_zero)).to(torch.int32)[:, None, :]
    return exact_float(total)


def _hat(operand: tuple[Tensor, Tensor, Tensor], b: int) -> Tensor:
    codes, scale, zero = operand
    return codes[b].float().sub_(zero).mul_(scale)


@torch.library.custom_op("qatana::coded_attention", mutates_args=())
def _attention(
    q_hat: Tensor, q: Tensor, q_scale: Tensor, q_zero: Tensor, k_hat: Tensor, k: Tensor, k_scale: Tensor, k_zero: Tensor,
    v_hat: Tensor, v: Tensor, v_scale: Tensor, v_zero: Tensor, mask: Tensor | None, scaling: float, dropout: float,
    p_scale: Tensor, p_zero: Tensor, p_lo: int, p_hi: int, y_scale: Tensor, y_zero: Tensor, y_lo: int, y_hi: int,
    engine: str, keep_codes: bool, reduced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y (B, H, Q, D) as a view of (B, Q, H, D), where y was inside its range, where dropout kept, codes of P if asked for."""
    with torch.no_grad():
        probability, y = Affine(p_scale, p_zero, p_lo, p_hi), Affine(y_scale, y_zero, y_lo, y_hi)
        work = _Products(
            q, q_scale, q_zero, k, k_scale, k_zero, v, v_scale, v_zero, mask, scaling, dropout, probability, engine
        )
        batch, heads, rows, _ = q.shape
        entries, requantized = heads * rows * k.shape[2], y_hi > y_lo
        out = torch.empty((batch, rows, heads, v.shape[3]), dtype=torch.float32, device=q.device).transpose(1, 2)
        inside = torch.ones(out.shape if requantized else 0, dtype=torch.uint8, device=q.device)
        kept = torch.empty((batch, length(entries) if work.threshold else 0), dtype=torch.uint8, device=q.device)
        codes = torch.empty((batch, heads, rows, k.shape[2]) if keep_codes else 0, dtype=torch.uint8, device=q.device)
        for b in range(batch):
            keep = work.draw(entries, q.device)
            if keep is not None:
                kept[b] = pack_mask(keep)
            levels = work.levels(work.drop(work.softmax(b), keep))
            if keep_codes:
                codes[b] = levels + p_zero
            acc = work.context(b, levels)
            if not requantized:
                out[b] = work.engine.product(acc, work.s32)
                continue
            found = work.engine.product_levels(acc, work.s32, y)
            if touches_ends(found, y):
                mark_inside(inside[b], work.engine.product(acc, work.s32), y)
            torch.mul(found, y_scale, out=out[b])
    return out, pack_mask(inside), kept, codes


@_attention.register_fake
def _(q_hat, q, q_scale, q_zero, k_hat, k, k_scale, k_zero, v_hat, v, v_scale, v_zero, mask, scaling, dropout,
      p_scale, p_zero, p_lo, p_hi, y_scale, y_zero, y_lo, y_hi, engine, keep_codes, reduced):  # fmt: skip
    (batch, heads, rows, _), columns = q.shape, k.shape[2]
    of = {"device": q.device}
    out = torch.empty((batch, rows, heads, v.shape[3]), dtype=torch.float32, **of).transpose(1, 2)
    kept = length(heads * rows * columns) if round(dropout * DRAWS) else 0
    codes = (batch, heads, rows, columns) if keep_codes else 0
    inside = length(out.numel()) if y_hi > y_lo else 0
    return (
        out,
        torch.empty(inside, dtype=torch.uint8, **of),
        torch.empty((batch, kept), dtype=torch.uint8, **of),
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
    dtype = torch.bfloat16 if reduced else torch.float32
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for b in range(q.shape[0]):
        p = work.softmax(b)
        keep = unpack_mask(kept[b], p.numel()) if work.threshold else None
        dropped = work.drop(p, keep)
        levels = work.levels(dropped)
        dy = grad[b].to(dtype)
        d_v[b] = torch.bmm((levels * p_scale).to(dtype).transpose(1, 2), dy)
        d_p = torch.bmm(dy, _hat(work.v, b).to(dtype).transpose(1, 2)).float()
        if bool(
            levels.amax() >= p_hi - p_zero
        ):  # probabilities are not negative: only dropout's division can lift them out
            rounded = torch.round(dropped / p_scale).add_(p_zero)
            d_p.mul_(rounded.eq(rounded.clamp(p_lo, p_hi)))
        d_s = torch.ops.aten._softmax_backward_data(work.drop(d_p, keep), p, -1, torch.float32).mul_(scaling).to(dtype)
        d_q[b] = torch.bmm(d_s, _hat(work.k, b).to(dtype))
        d_k[b] = torch.bmm(d_s.transpose(1, 2), _hat(work.q, b).to(dtype))
    return d_q, d_k, d_v


@_gradients.register_fake
def _(grad, q, q_scale, q_zero, k, k_scale, k_zero, v, v_scale, v_zero, mask, p_scale, p_zero, kept, scaling,
      dropout, p_lo, p_hi, engine, reduced):  # fmt: skip
    return tuple(torch.empty(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))


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
