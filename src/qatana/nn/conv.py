"""Convolutions with slots; BatchNorm, ReLU and, for engines that do so, a sum folded during training.

The weight that is quantized is the one that ships, folded with the running statistics:

    W' = W * f,   b' = (b - mean) * f + beta,   f = gamma / sqrt(var + eps)

While BatchNorm statistics still move (training, not frozen) the output keeps batch statistics, as in training without
quantization:  y = BatchNorm(conv(x_hat, W'_hat) / f)  (Krishnamoorthi 2018, section 3.2.2; torchao's form). Frozen, or in
eval, the layer computes exactly what the integer file computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatana.errors import ModelError
from qatana.nn import recompute
from qatana.numerics import Scheme, accumulate, coded_conv, quantize_gradient
from qatana.numerics import engine as engine_named
from qatana.numerics.integer_sums import Geometry
from qatana.quantizer import Quantizer

SMALLEST_FACTOR = 1e-8


class Conv(nn.Module):
    """1-D or 2-D convolution by the rank of the float layer, optionally followed by BatchNorm, a sum and ReLU.

    x (B, C, *space), W (N, C / groups, *kernel), y and, if given, the summand `other` (B, N, *space'). Slots: weight_quantizer,
    input_quantizer, other_quantizer (of the summand), output_quantizer. The float layers keep their places and state_dict keys:
    `batch_norm` is referred to, not owned.

    gradient  scheme of the gradient of y, rounded stochastically, from which all others are computed; None: as it comes
    channels_last  training lays x and y in memory channels last, which kernels on codes are faster in"""

    def __init__(self, conv: nn.Module, batch_norm: nn.Module | None, relu: bool, engine: str) -> None:
        super().__init__()
        source: Any = conv
        if source.padding_mode != "zeros":
            raise ModelError(f"a convolution with padding_mode '{source.padding_mode}' has no integer form; skip it")
        self.weight, self.bias = source.weight, source.bias
        self.kernel_size: Sequence[int] = source.kernel_size
        self.stride: Sequence[int] = source.stride
        self.dilation: Sequence[int] = source.dilation
        self.groups: int = source.groups
        self.padding: Sequence[int] = _explicit_padding(source)
        self.relu = relu
        self.freeze_batch_norm = False
        self.channels_last = False
        self.engine = engine_named(engine)
        self._batch_norm = (batch_norm,)
        self.weight_quantizer: Quantizer | None = None
        self.input_quantizer: Quantizer | None = None
        self.other_quantizer: Quantizer | None = None
        self.output_quantizer: Quantizer | None = None
        self.gradient: Scheme | None = None

    @property
    def batch_norm(self) -> Any:
        return self._batch_norm[0]

    def extra_repr(self) -> str:
        tail = (", BatchNorm folded" if self.batch_norm is not None else "") + (", ReLU" if self.relu else "")
        return f"{tuple(self.weight.shape)}, stride={tuple(self.stride)}, padding={tuple(self.padding)}, groups={self.groups}{tail}"

    @property
    def tail(self) -> tuple[int, ...]:
        """Shape that broadcasts a value per output channel over an output."""
        return (-1,) + (1,) * (self.weight.ndim - 2)

    def folded(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """W', b' and f (None without BatchNorm), with running statistics, differentiable in W, b, gamma and beta."""
        norm = self.batch_norm
        if norm is None:
            return self.weight, self.bias, None
        factor = torch.rsqrt(norm.running_var + norm.eps)
        factor = factor if norm.weight is None else factor * norm.weight
        shift = -norm.running_mean if self.bias is None else self.bias - norm.running_mean
        bias = shift * factor
        bias = bias if norm.bias is None else bias + norm.bias
        return self.weight * factor.view(-1, *(1,) * (self.weight.ndim - 1)), bias, factor

    @property
    def integer(self) -> bool:
        """Whether the forward pass runs on integers now: one scale per tensor and per output channel, integer codes."""
        w, i, o, r = self.weight_quantizer, self.input_quantizer, self.output_quantizer, self.other_quantizer
        if w is None or i is None or o is None:
            return False
        used = [q for q in (w, i, o, r) if q is not None]
        per_channel = w.scheme.granularity.kind == "tensor" or str(w.scheme.granularity) == "channel"
        per_channel = per_channel and w.scheme.symmetric
        known = all(q.scheme.scale != "dynamic" for q in used if q is not w)
        return per_channel and known and all(q.enabled and q.has_levels for q in used)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if self.channels_last and self.training and x.ndim == 4 and self.integer:
            x = x.contiguous(memory_format=torch.channels_last)
        y = self._forward(x, other)
        return y if self.gradient is None else quantize_gradient(y, self.gradient)

    def _forward(self, x: Tensor, other: Tensor | None) -> Tensor:
        norm = self.batch_norm
        if norm is not None and self.training and not self.freeze_batch_norm:
            return self._with_batch_statistics(x, other)
        weight, bias, _ = self.folded()
        if not self.integer:
            return self._finish(self._convolve(self._input(x), self._weight(weight), bias), other)
        w, i, o, r = self.weight_quantizer, self.input_quantizer, self.output_quantizer, self.other_quantizer
        assert w is not None
        assert i is not None
        assert o is not None
        if other is None and not o.learned and not o.observing:
            operands = i.encode(x), w.encode_weight(weight), bias
            arithmetic = self.engine.name, o.affine(), self.relu
            found = coded_conv.convolution_requantized(*operands, self.geometry, *arithmetic)
            return o.floats(*found, operands[0].scale, operands[1].scale)
        if i.observing:
            i.observe(x.detach())
        levels, x_scale, _ = i.activation_levels(x)
        w_levels, w_scale = w.weight_levels(weight)
        bound = i.scheme.integer.hi - i.scheme.integer.lo
        acc = accumulate.conv(levels, w_levels, bound, self.stride, self.padding, self.dilation, self.groups)
        s32 = x_scale * w_scale.reshape(-1)
        term = None if bias is None else self.engine.bias_term(bias, s32).view(self.tail)
        s32 = s32.view(self.tail)
        if o.observing:
            y = self._sum(self.engine.linear(acc, s32, term).detach(), other)
            o.observe(y.relu() if self.relu else y)
        parameters = o.affine(acc.shape)
        if other is None:
            y = self.engine.conv_levels(acc, s32, term, parameters)
        else:
            assert r is not None
            y = self.engine.conv_add_levels(
                acc, s32, term, r.activation_levels(other)[0], r.affine(other.shape), parameters
            )
        if self.relu:
            y = torch.clamp(y, min=0)
        o.record(y, parameters.zero_point)
        return y * parameters.scale

    def _with_batch_statistics(self, x: Tensor, other: Tensor | None) -> Tensor:
        norm = self.batch_norm
        weight, _, factor = self.folded()
        assert factor is not None
        smallest = torch.where(factor < 0, -SMALLEST_FACTOR, SMALLEST_FACTOR)
        factor = torch.where(factor.abs() < SMALLEST_FACTOR, smallest, factor)
        if self.integer:
            y = self._codes(x, weight, torch.ones_like(factor) / factor)
        else:
            y = self._convolve(self._input(x), self._weight(weight), None) / factor.view(self.tail)
            y = y if self.bias is None else y + self.bias.view(self.tail)
        return self._finish(norm(y), other)

    def _codes(self, x: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        """conv(x_hat, W'_hat) * factor + b on integers, float output."""
        assert self.input_quantizer is not None
        assert self.weight_quantizer is not None
        operands = self.input_quantizer.encode(x), self.weight_quantizer.encode_weight(weight), self.bias, factor
        y = coded_conv.convolution(*operands, self.geometry)
        if recompute.pays(y, self.weight[0].numel()):
            recompute.note(y, coded_conv.convolution_again(*operands, self.geometry))
        return y

    @property
    def geometry(self) -> Geometry:
        return Geometry(list(self.stride), list(self.padding), list(self.dilation), self.groups)

    def _input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def _weight(self, weight: Tensor) -> Tensor:
        return weight if self.weight_quantizer is None else self.weight_quantizer(weight)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = F.conv1d if weight.ndim == 3 else F.conv2d
        return convolve(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[call-overload]

    def _sum(self, y: Tensor, other: Tensor | None) -> Tensor:
        """y + other, the summand quantized."""
        if other is None:
            return y
        return y + (other if self.other_quantizer is None else self.other_quantizer(other))

    def _finish(self, y: Tensor, other: Tensor | None) -> Tensor:
        y, out = self._sum(y, other), self.output_quantizer
        if out is None:
            return y.relu() if self.relu else y
        return out.after_relu(y) if self.relu else out(y)


def _explicit_padding(conv: Any) -> list[int]:
    """Padding as numbers; "same" is possible where it is symmetric."""
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ModelError("a convolution with asymmetric 'same' padding (even kernel) is not supported; skip it")
        return [t // 2 for t in total]
    return list(conv.padding)
