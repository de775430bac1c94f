"""Embedding whose table is stored as codes, one scale per row or per group of a row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qatana.numerics import levels
from qatana.quantizer import Quantizer


class Embedding(nn.Module):
    """Rows of a quantized table.   ids (*shape) int64 -> (code - zero_point) * scale of row ids, float32 (*shape, D).

    Only the rows that a batch uses are quantized in training: equal to quantizing the whole table, since scales belong to rows.
    Formats whose scales depend on the whole table (two levels, searches) quantize it whole."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight_quantizer: Quantizer | None = None

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: Tensor) -> Tensor:
        rows = F.embedding(ids, self.weight, self.padding_idx)
        quantizer = self.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            return rows
        flat = rows.reshape(-1, self.embedding_dim)
        if not quantizer.scheme.is_integer:
            scheme = quantizer.scheme
            by_rows = scheme.granularity.kind in ("channel", "group") and scheme.grid.local and not scheme.grid.whole
            if scheme.scale == "dynamic" and by_rows:
                return quantizer(flat).reshape(rows.shape)
            return F.embedding(ids, quantizer(self.weight), self.padding_idx)
        view = quantizer.scheme.granularity.view(flat)
        if quantizer.scheme.scale == "dynamic":
            scale, zero = quantizer.weight_parameters(flat)
        else:
            scale, zero = (p[ids.reshape(-1)] for p in quantizer.weight_parameters(self.weight))
        format = quantizer.scheme.integer
        return (levels(view, scale, zero, format.lo, format.hi) * scale).reshape(rows.shape).to(rows.dtype)
