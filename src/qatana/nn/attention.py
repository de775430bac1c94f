"""The two products of attention on integers: scores = q k^T and context = softmax(scores) v."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn

from qatana.nn.cache import CodedStates
from qatana.numerics import accumulate, coded_attention
from qatana.numerics import engine as engine_named
from qatana.quantizer import Quantizer


class AttentionProducts(nn.Module):
    """context = softmax(scaling * q k^T + mask) v.   q (B, H, Q, D), k and v (B, H, T, D), mask broadcast to (B, H,
    Q, T).

    Slots: query_quantizer, key_quantizer, probability_quantizer, value_quantizer, context_quantizer. The scaling is
    part of the query's scale, f32(s_q * scaling), so the scores leave the integer product ready for the softmax,
    which stays float (an integer softmax is 19-26 times slower in ONNX Runtime)."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine_named(engine)
        self.query_quantizer: Quantizer | None = None
        self.key_quantizer: Quantizer | None = None
        self.probability_quantizer: Quantizer | None = None
        self.value_quantizer: Quantizer | None = None
        self.context_quantizer: Quantizer | None = None

    def cache(self) -> tuple[CodedStates, CodedStates]:
        """Places for keys and values as codes. Raises: ModelError for schemes whose scale follows from all tokens together."""
        return CodedStates(self.key_quantizer), CodedStates(self.value_quantizer)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0,
        held: bool = False,
    ) -> Tensor:  # fmt: skip
        """`held`: keys and values were read from a cache of codes, so they are quantized already. (A static scale gives the same codes
        again.)"""
        if self._on_codes(mask):
            return self._codes(query, key, value, mask, scaling, dropout if self.training else 0.0)
        scores = self._scores(query, key, scaling, held)
        if mask is not None:
            scores = scores + mask
        probabilities = torch.softmax(scores, dim=-1)
        probabilities = nn.functional.dropout(probabilities, dropout, self.training)
        return self._context(probabilities, value, held)

    def _on_codes(self, mask: Tensor | None) -> bool:
        """Whether both products run on codes as one operator: all quantizers integer and static, no gradient for the mask, none for the
        scales of probabilities and context."""
        p, y = self.probability_quantizer, self.context_quantizer
        operands = (self.query_quantizer, self.key_quantizer, self.value_quantizer, p)
        fixed = not (p is not None and p.learned) and (
            y is None or (_integers(y) and not y.learned and not y.observing)
        )
        return all(_integers(x) for x in operands) and fixed and (mask is None or not mask.requires_grad)

    def _codes(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, dropout: float
    ) -> Tensor:
        qq, qk, qv, qp, qy = (
            self.query_quantizer, self.key_quantizer, self.value_quantizer, self.probability_quantizer, self.context_quantizer,
        )  # fmt: skip
        assert qq is not None
        assert qk is not None
        assert qv is not None
        assert qp is not None
        operands = qq.encode(query), qk.encode(key), qv.encode(value)
        y = None if qy is None else qy.affine()
        out, codes = coded_attention.attention(
            *operands, mask, scaling, dropout, qp.affine(), y, self.engine.name, keep=qp.tap is not None
        )
        qp.record(codes, torch.zeros(()))
        if qy is not None:
            qy.record_values(out)
        return out

    def _scores(self, query: Tensor, key: Tensor, scaling: float, held: bool) -> Tensor:
        qq, qk = self.query_quantizer, self.key_quantizer
        if not (_integers(qq) and _integers(qk)):
            query = query if qq is None else qq(query)
            key = key if qk is None or held else qk(key)
            return torch.matmul(query, key.transpose(-1, -2)) * scaling
        for quantizer, x in ((qq, query), (qk, key)):
            if quantizer.observing:
                quantizer.observe(x.detach())
        q, q_scale, _ = qq.activation_levels(query)
        k, k_scale, _ = qk.activation_levels(key)
        acc = accumulate.matmul(q, k.transpose(-1, -2), 255, 255)
        return self.engine.product(acc, (q_scale * scaling) * k_scale)

    def _context(self, probabilities: Tensor, value: Tensor, held: bool) -> Tensor:
        qp, qv, qc = self.probability_quantizer, self.value_quantizer, self.context_quantizer
        if not (_integers(qp) and _integers(qv)):
            probabilities = probabilities if qp is None else qp(probabilities)
            value = value if qv is None or held else qv(value)
            context = torch.matmul(probabilities, value)
            return context if qc is None else qc(context)
        if qv.observing:
            qv.observe(value.detach())
        p, p_scale, _ = qp.activation_levels(probabilities)
        v, v_scale, _ = qv.activation_levels(value)
        acc = accumulate.matmul(p, v, 255, 255)
        s32 = p_scale * v_scale
        if qc is None or not qc.enabled:
            context = self.engine.product(acc, s32)
            return context if qc is None else qc(context)
        if qc.observing:
            qc.observe(self.engine.product(acc, s32).detach())
        parameters = qc.affine(acc.shape)
        context = self.engine.product_levels(acc, s32, parameters)
        qc.record(context, parameters.zero_point)
        return context * parameters.scale


def _integers(quantizer: Quantizer | None) -> TypeGuard[Quantizer]:
    """Whether a quantizer is on and hands out the levels that an integer product multiplies."""
    return quantizer is not None and quantizer.enabled and quantizer.has_levels and quantizer.scheme.scale != "dynamic"
