"""Embedding whose table is stored as codes, one scale per row or per group of a row."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qatana.numerics import Scheme, levels
from qatana.numerics.table import table_rows
from qatana.quantizer import Quantizer


class Embedding(nn.Module):
    """Rows of a quantized table.   ids (*shape) int64 -> (code - zero_point) * scale of row ids, float32 (*shape, D).

    Only the rows that a batch uses are quantized in training: equal to quantizing the whole table, since scales belong to rows.
    Schemes whose scales depend on more than a row (one per tensor, two levels, searches) quantize it whole."""

    def __init__(self, weight: nn.Parameter, padding_idx: int | None = None) -> None:
        super().__init__()
        self.weight, self.padding_idx = weight, padding_idx
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight_quantizer: Quantizer | None = None

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"

    def forward(self, ids: Tensor) -> Tensor:
        rows = table_rows(self.weight, ids, self.padding_idx)
        quantizer = self.weight_quantizer
        if quantizer is None or not quantizer.enabled:
            return rows
        scheme, flat = quantizer.scheme, rows.reshape(-1, self.embedding_dim)
        if not _by_rows(scheme) or not (scheme.is_integer or scheme.scale == "dynamic"):
            return F.embedding(ids, quantizer(self.weight), self.padding_idx)
        if not scheme.is_integer:
            return quantizer(flat).reshape(rows.shape)
        view = quantizer.scheme.granularity.view(flat)
        if quantizer.scheme.scale == "dynamic":
            scale, zero = quantizer.weight_parameters(flat)
        else:
            scale, zero = (p[ids.reshape(-1)] for p in quantizer.weight_parameters(self.weight))
        format = quantizer.scheme.integer
        return (levels(view, scale, zero, format.lo, format.hi) * scale).reshape(rows.shape).to(rows.dtype)


def _by_rows(scheme: Scheme) -> bool:
    """Whether the scales of a row follow from that row alone."""
    granularity = scheme.granularity
    own = granularity.kind == "group" or (granularity.kind == "channel" and granularity.axis == 0)
    return own and scheme.grid.local and not scheme.grid.whole
