"""Operators between layers, with slots: residual add, average pooling, activation functions and norms behind a
quantizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qatana.numerics import coded_add
from qatana.numerics import engine as engine_named
from qatana.quantizer import Quantizer


class Add(nn.Module):
    """y = a + b (then ReLU if `relu`) on codes.   Shapes broadcast. Slots: input_quantizer (a), other_quantizer (b),
    output_quantizer."""

    def __init__(self, relu: bool, engine: str) -> None:
        super().__init__()
        self.relu, self.engine = relu, engine_named(engine)
        self.input_quantizer: Quantizer | None = None
        self.other_quantizer: Quantizer | None = None
        self.output_quantizer: Quantizer | None = None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        qa, qb, qy = self.input_quantizer, self.other_quantizer, self.output_quantizer
        if not (qa and qb and qy and qa.enabled and qb.enabled and qy.enabled):
            a = a if qa is None else qa(a)
            b = b if qb is None else qb(b)
            y = a + b
            y = y.relu() if self.relu else y
            return y if qy is None else qy(y)
        if qy.observing:
            y = a.detach() + b.detach()
            qy.observe(y.relu() if self.relu else y)
        if a.shape == b.shape and not (qa.learned or qb.learned or qy.learned):
            ca, cb = qa.encode(a), qb.encode(b)
            return qy.floats(*coded_add.add(ca, cb, qy.affine(), self.relu, self.engine.name), ca.scale, cb.scale)
        la, _, _ = qa.activation_levels(a)
        lb, _, _ = qb.activation_levels(b)
        parameters = qy.affine(torch.broadcast_shapes(a.shape, b.shape))
        y = self.engine.add_levels(la, qa.affine(a.shape), lb, qb.affine(b.shape), parameters)
        if self.relu:
            y = torch.clamp(y, min=0)
        qy.record(y, parameters.zero_point)
        return y * parameters.scale


class GlobalAveragePool(nn.Module):
    """Mean over all spatial positions of (B, C, *space), kept as (B, C, 1, ..., 1). Slots: input_quantizer,
    output_quantizer."""

    def __init__(self, engine: str) -> None:
        super().__init__()
        self.engine = engine_named(engine)
        self.input_quantizer: Quantizer | None = None
        self.output_quantizer: Quantizer | None = None

    def forward(self, x: Tensor) -> Tensor:
        qx, qy = self.input_quantizer, self.output_quantizer
        dims = tuple(range(2, x.ndim))
        if not (qx and qy and qx.enabled and qy.enabled):
            x = x if qx is None else qx(x)
            y = x.mean(dims, keepdim=True)
            return y if qy is None else qy(y)
        if qy.observing:
            qy.observe(x.detach().mean(dims, keepdim=True))
        levels, _, _ = qx.activation_levels(x)
        parameters = qy.affine(x.shape[:2])
        total = levels.double().sum(dims, keepdim=True).float()
        y = self.engine.average_pool_levels(total, x[0, 0].numel(), qx.affine(x.shape), parameters)
        qy.record(y, parameters.zero_point)
        return y * parameters.scale


class Activation(nn.Module):
    """A float function (GELU, SiLU, ReLU, LayerNorm, pooling ...) whose output is quantized: y_hat = quantize(f(x)).

    `function` is the user's own module or a torch function; its parameters keep their names under `function`."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.output_quantizer: Quantizer | None = None

    def forward(self, *args, **kwargs) -> Tensor:
        y = self.function(*args, **kwargs)
        return y if self.output_quantizer is None else self.output_quantizer(y)
