"""Linear layer with slots. What it computes follows from the scheme of its input:

static, per tensor     integers: acc = levels @ weight levels^T exactly, then the engine's formula (int32 bias,
requantization)
dynamic, per tensor    integers: the same accumulator with the batch's own scale, float bias added after scaling
per token              integers by `products.ROWS`, where the weight has a scale per row or in blocks of 64 or more
per group, or float    float: F.linear on fake-quantized operands (an engine adds group sums in float, so floats
differ by ulps)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qatana.nn import recompute
from qatana.numerics import Scheme, products, quantize_gradient
from qatana.numerics import engine as engine_named
from qatana.quantizer import Quantizer


def is_static_tensor(quantizer: Quantizer | None) -> bool:
    """Whether a quantizer gives per-tensor codes with parameters known before the batch."""
    return (
        quantizer is not None and quantizer.scheme.granularity.kind == "tensor" and quantizer.scheme.scale != "dynamic"
    )


class Linear(nn.Module):
    """y = x W^T + b with quantized x, W and, optionally, y.   x (*batch, K), W (N, K), y (*batch, N).

    Slots: weight_quantizer, input_quantizer, output_quantizer (any may be None: that tensor stays float). Parameters
    are those of the float layer, under the same names.

    gradient  scheme of the gradient of y, rounded stochastically, from which those of x, W and b are computed; None: as it comes
    swapped   whether the parameter is W^T (K, N)"""

    swapped = False

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, engine: str = "onnxruntime") -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape
        self.engine = engine_named(engine)
        self.weight_quantizer: Quantizer | None = None
        self.input_quantizer: Quantizer | None = None
        self.output_quantizer: Quantizer | None = None
        self.gradient: Scheme | None = None

    @property
    def matrix(self) -> Tensor:
        """W (N, K), which is quantized."""
        return self.weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    @property
    def integer(self) -> bool:
        """Whether the forward pass runs on integers now."""
        w, x = self.weight_quantizer, self.input_quantizer
        return (
            w is not None and x is not None and w.enabled and x.enabled
            and x.has_levels and w.has_levels and w.scheme.symmetric
            and x.scheme.granularity.kind == "tensor" and w.scheme.granularity.kind in ("channel", "tensor")
        )  # fmt: skip

    @property
    def by_rows(self) -> bool:
        """Whether inputs with a scale per token and weights, in blocks or not, are multiplied as integers."""
        w, x = self.weight_quantizer, self.input_quantizer
        if w is None or x is None or not (w.enabled and x.enabled):
            return False
        return x.by_rows and w.by_rows and self.weight.dtype == torch.float32

    def forward(self, x: Tensor) -> Tensor:
        y = self._integers(x) if self.integer else self._rows(x) if self.by_rows else self._float(x)
        return y if self.gradient is None else quantize_gradient(y, self.gradient)

    def _integers(self, x: Tensor) -> Tensor:
        assert self.input_quantizer is not None
        assert self.weight_quantizer is not None
        operands = self.input_quantizer.encode(x), self.weight_quantizer.encode_weight(self.matrix), self.bias
        out = self.output_quantizer
        if self.input_quantizer.scheme.scale == "dynamic":
            y = products.linear(*operands, products.DYNAMIC)
            if recompute.pays(y, self.in_features):
                recompute.note(y, products.linear_again(*operands, products.DYNAMIC))
            return y
        if out is None or not out.enabled:
            y = products.linear(*operands, self.engine.name)
            if out is None and recompute.pays(y, self.in_features):
                recompute.note(y, products.linear_again(*operands, self.engine.name))
            return y if out is None else out(y)
        if out.observing:
            out.observe(products.linear(*operands, self.engine.name).detach())
        parameters = out.affine(torch.Size([*x.shape[:-1], self.out_features]))
        y = products.linear_requantized(*operands, self.engine.name, parameters, out.learned)
        out.record_values(y)
        return y

    def _rows(self, x: Tensor) -> Tensor:
        assert self.input_quantizer is not None
        assert self.weight_quantizer is not None
        operands = self.input_quantizer.encode(x), self.weight_quantizer.encode_weight(self.matrix), self.bias
        y = products.linear(*operands, products.ROWS)
        if self.output_quantizer is None and recompute.pays(y, self.in_features):
            recompute.note(y, products.linear_again(*operands, products.ROWS))
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def _float(self, x: Tensor) -> Tensor:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        weight = self.matrix if self.weight_quantizer is None else self.weight_quantizer(self.matrix)
        y = F.linear(x, weight, self.bias)
        return y if self.output_quantizer is None else self.output_quantizer(y)


class SwappedLinear(Linear):
    """y = x W + b: a linear layer whose parameter is W (K, N), as that of GPT-2's Conv1D. W^T is quantized, one row per output."""

    swapped = True

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, engine: str = "onnxruntime") -> None:
        super().__init__(weight, bias, engine)
        self.in_features, self.out_features = weight.shape

    @property
    def matrix(self) -> Tensor:
        """Contiguous, as codes are: products of matrices in another order of memory differ in their last bits."""
        return self.weight.t().contiguous()

    def folded(self) -> tuple[Tensor, Tensor | None, None]:
        """W^T (N, K), b and no factor, in the form of `Conv.folded`: the weight that ships."""
        return self.matrix, self.bias, None
