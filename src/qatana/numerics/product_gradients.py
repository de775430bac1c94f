"""Gradients of products of codes, read from the codes: in float32, or in bfloat16 where autocast asks for it.

d x_hat = dy w_hat,  d w_hat = dy^T x_hat        from the codes themselves (`split_products`), or x_hat and w_hat in buffers used again"""

from __future__ import annotations

import torch
from torch import Tensor

from qatana.hardware import onednn_leads
from qatana.numerics import split_products
from qatana.numerics.coded import decoded
from qatana.numerics.fused import sweep
from qatana.numerics.workspace import buffer


def reduced_gradients(device: torch.device) -> bool:
    """Whether autocast asks for gradients in bfloat16."""
    kind = device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16


@torch.library.custom_op("qatana::coded_linear_gradients", mutates_args=())
def linear_gradients(
    grad: Tensor, x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w: Tensor, w_scale: Tensor,
    need_x: bool, need_w: bool, reduced: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d x_hat (*batch, K) and d w_hat (N, K), float32; empty where not needed."""
    rows, codes = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    none = torch.empty(0, device=grad.device)
    compute = _in_bfloat16 if reduced else _in_float32
    d_x, d_w = compute(rows, codes, x_scale, x_zero_point, w, w_scale, need_x, need_w)
    return none if d_x is None else d_x.view(x.shape), none if d_w is None else d_w


@linear_gradients.register_fake
def _(grad, x, x_scale, x_zero_point, w, w_scale, need_x, need_w, reduced):
    empty = {"dtype": torch.float32, "device": grad.device}
    return torch.empty(x.shape if need_x else 0, **empty), torch.empty(w.shape if need_w else 0, **empty)


def _in_float32(grad, x, x_scale, x_zero_point, w, w_scale, need_x: bool, need_w: bool):
    d_x = d_w = None
    (rows, inner), outputs, device = x.shape, w.shape[0], x.device
    if need_x and w_scale.numel() in (1, outputs) and split_products.pays(rows, inner, outputs, device):
        d_x = split_products.times_codes(grad, w_scale.reshape(1, -1), w)
    elif need_x:
        w_hat = buffer("operand", w.shape, torch.float32, device)
        _decode_weight(w, w_scale, w_hat)
        d_x = float_product(grad, w_hat)
    if need_w and split_products.pays(outputs, inner, rows, device):
        by_row = (x_scale.reshape(-1, 1), None, None) if x_scale.ndim else (None, x_zero_point, x_scale)
        d_w = split_products.transposed_times_levels(grad, by_row[0], x, *by_row[1:])
    elif need_w:
        x_hat = buffer("operand", x.shape, torch.float32, device)
        sweep(decoded, [x_hat], [x, *_of_rows(x_scale, x_zero_point)])
        d_w = float_product(grad.t(), x_hat)
    return d_x, d_w


def _decode_weight(w: Tensor, scale: Tensor, out: Tensor) -> None:
    """w_hat (N, K), a scale for each row or block of a row, or one for all."""
    shape = (scale.numel(), -1) if scale.numel() >= w.shape[0] else w.shape
    sweep(decoded, [out.view(shape)], [w.view(shape), scale.reshape(-1, 1), None])


def _of_rows(scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor | None]:
    """An input's scale and zero point as they go with its rows; inputs with a scale for each have zero point 0."""
    return (scale.reshape(-1, 1), None) if scale.ndim else (scale, zero_point)


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, by the faster library of this processor.   a (M, K) and b (K, N) of any strides."""
    if (
        a.device.type == "cpu"
        and onednn_leads()
        and torch.backends.mkldnn.is_available()
        and min(*a.shape, *b.shape) > 0
    ):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return torch.mm(a, b)


def _in_bfloat16(grad, x, x_scale, x_zero_point, w, w_scale, need_x: bool, need_w: bool):
    """Codes are exact in bfloat16: scales stay outside of the products, all but those of blocks."""
    d_x = d_w = None
    blocks, (rows, zero_point) = w_scale.numel() > w.shape[0], _of_rows(x_scale, x_zero_point)
    scaled, plain = (buffer(name, grad.shape, torch.bfloat16, grad.device) for name in ("scaled", "gradient"))
    sweep(rounded, [scaled, plain], [grad, None if blocks else w_scale.reshape(1, -1), rows if x_scale.ndim else None])
    if need_x:
        levels = buffer("operand", w.shape, torch.bfloat16, w.device)
        _decode_weight(w, w_scale, levels) if blocks else sweep(decoded, [levels], [w, None, None])
        d_x = _to_float32(torch.mm(scaled, levels, out=buffer("product", x.shape, torch.bfloat16, x.device)), None)
    if need_w:
        levels = buffer("operand", x.shape, torch.bfloat16, x.device)
        sweep(decoded, [levels], [x, None, zero_point])
        out = buffer("product", w.shape, torch.bfloat16, w.device)
        d_w = _to_float32(torch.mm(plain.t(), levels, out=out), None if x_scale.ndim else x_scale)
    return d_x, d_w


def rounded(grad: Tensor, columns: Tensor | None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dy times scales of columns, and times scales of rows. Both are written in bfloat16."""
    return grad if columns is None else grad * columns, grad if rows is None else grad * rows


def _to_float32(x: Tensor, scale: Tensor | None) -> Tensor:
    """x * scale, new; None: 1."""
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    sweep(decoded, [out], [x, scale, None])
    return out
