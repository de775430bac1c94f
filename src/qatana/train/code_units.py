"""Code units: an optimizer steps weights by codes, learned scales and the weights of norms by shares of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qatana.nn import Embedding, Linear, SwappedLinear
from qatana.nn.foreign import Slot, to_matrix
from qatana.numerics.pieces import pieces
from qatana.quantizer import Quantizer


class CodedWeight(NamedTuple):
    """A weight, its layout (`nn.foreign`), and the quantizer that learns its scale."""

    weight: nn.Parameter
    layout: str
    quantizer: Quantizer

    def blocks(self, *tensors: Tensor) -> list[Tensor]:
        """Block views of tensors of the weight's shape, against which its scale broadcasts. They share the tensors' memory."""
        return [self.quantizer.scheme.granularity.view(to_matrix(t, self.layout)) for t in tensors]

    def fits(self) -> bool:
        """Whether both are trained, and the block view needs no copy."""
        if not (self.quantizer.learned and self.weight.requires_grad and self.quantizer.scale.requires_grad):
            return False
        return self.blocks(self.weight)[0].data_ptr() == self.weight.data_ptr()


def coded_weights(model: nn.Module) -> list[CodedWeight]:
    """The trainable weights whose quantizers learn their scales; a tied weight once.

    Not among them: weights that are not themselves what is quantized (convolutions fold a norm into theirs, parametrizations compute
    one), and those whose blocks are no view of their memory (experts that are stacks of W^T; blocks that run over the end)."""
    found: dict[int, CodedWeight] = {}
    for module in model.modules():
        one = _coded(module)
        if one is not None and one.fits():
            found.setdefault(id(one.weight), one)
    return list(found.values())


def _coded(module: nn.Module) -> CodedWeight | None:
    quantizer: Any = getattr(module, "weight_quantizer", None)
    if isinstance(module, Slot):
        weight, layout = module.parameter_itself(), module.layout
    elif isinstance(module, (Linear, Embedding)):
        weight, layout = module.weight, "in out" if isinstance(module, SwappedLinear) else "out in"
    else:
        return None
    return (
        CodedWeight(weight, layout, quantizer) if quantizer is not None and isinstance(weight, nn.Parameter) else None
    )


NormWeight = tuple[nn.Parameter, Tensor]
"""The weight of a norm, and what it was before the step."""


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """The trainable weights of layer norms and RMS norms that multiply the channels, each once.

    Of modules whose class is called so, told by what they compute: with all weights 0 the output no longer depends on the input. Gemma's
    norms, which multiply by 1 + weight, are not among them."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not (type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and isinstance(weight, nn.Parameter)):
            continue
        if weight.ndim == 1 and weight.requires_grad and _multiplies(module, weight):
            found[id(weight)] = weight
    return list(found.values())


@torch.no_grad()
def _multiplies(norm: nn.Module, weight: Tensor) -> bool:
    rows = torch.linspace(-1, 1, 2 * weight.numel(), dtype=weight.dtype, device=weight.device).reshape(2, -1)
    rows[1] = rows[1].square()  # else it may be the first one's normalized twin
    try:
        first, second = torch.func.functional_call(norm, {"weight": torch.zeros_like(weight)}, (rows,))
    except (RuntimeError, IndexError, TypeError, ValueError):  # one over images, or with a second input
        return False
    return torch.equal(first, second)


class CodeUnits:
    """A change of variables around an optimizer's step:   with CodeUnits(model).step(): optimizer.step()

    A weight w and the scale s that its quantizer learns are stepped as u and r, where  w = |s| u  and  s = s_0 e^r:
        u = w / |s_0|,    dL/du = |s_0| dL/dw
        r = 0,            dL/dr = s_0 dL/ds + sum over the block of w dL/dw
    Learned scales of other tensors have the first term of dL/dr alone, and a norm's weight g (`norm_weights`) is stepped as a scale is:
        g = g_0 e^r,      dL/dr = g_0 dL/dg

    A step of Adam then moves a weight by about lr codes and a scale by about lr_s of itself, in every block: with one rate for all, blocks
    of small scales flip their codes by noise where those of large ones hardly move. And LSQ's gradient of s alone is the rounding error, 0
    for weights that lie on their grid; both terms together are  sum of x_hat dL/dx_hat,  what a larger scale does to the layer while the
    codes stay. Norms' weights differ by orders of magnitude too, from layer to layer and, once channels are equalized, within one."""

    def __init__(self, model: nn.Module) -> None:
        self.weights, self.norms = coded_weights(model), norm_weights(model)
        modules = (m for m in model.modules() if isinstance(m, Quantizer) and m.learned and m.scale.requires_grad)
        self.quantizers = list({id(m.scale): m for m in modules}.values())

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, parameters and gradients are those of u and r. What has no gradient is left as it is."""
        stepped = {id(q.scale): q.used_scale().detach().clone() for q in self.quantizers if q.scale.grad is not None}
        coded = [c for c in self.weights if id(c.quantizer.scale) in stepped and c.weight.grad is not None]
        norms = [(g, g.detach().clone()) for g in self.norms if g.grad is not None]
        self._enter(stepped, coded, norms)
        try:
            yield
        finally:
            self._leave(stepped, coded, norms)

    @torch.no_grad()
    def _enter(self, stepped: dict[int, Tensor], coded: list[CodedWeight], norms: list[NormWeight]) -> None:
        for g, g_0 in norms:
            assert g.grad is not None
            g.grad.mul_(g_0)
            g.zero_()
        for quantizer in self.quantizers:
            if id(quantizer.scale) in stepped:
                assert quantizer.scale.grad is not None
                quantizer.scale.grad.mul_(stepped[id(quantizer.scale)])
                quantizer.scale.zero_()
        for one in coded:
            weight, (gradient, scale_gradient) = one.weight, (one.weight.grad, one.quantizer.scale.grad)
            assert gradient is not None
            assert scale_gradient is not None
            if gradient.stride() != weight.stride():  # what a caller has set: its block view would be a copy
                gradient = weight.grad = torch.empty_like(weight).copy_(gradient)
            scale_gradient.div_(one.quantizer.weight_gradient_factor(weight))
            size = stepped[id(one.quantizer.scale)].abs()
            for w, g, s, r in _pieces(one.blocks(weight, gradient), [size, scale_gradient]):
                r.add_((w * g).sum(_reduced(one, w), keepdim=True).reshape(r.shape))
                g.mul_(s)
                w.div_(s)

    @torch.no_grad()
    def _leave(self, stepped: dict[int, Tensor], coded: list[CodedWeight], norms: list[NormWeight]) -> None:
        for g, g_0 in norms:
            g.exp_().mul_(g_0)
        for quantizer in self.quantizers:
            if id(quantizer.scale) in stepped:
                quantizer.scale.exp_().mul_(stepped[id(quantizer.scale)])
        for one in coded:
            for w, s in _pieces(one.blocks(one.weight), [one.quantizer.scale.abs()]):
                w.mul_(s)


def _reduced(one: CodedWeight, view: Tensor) -> tuple[int, ...]:
    return one.quantizer.scheme.granularity.reduced_dims(view.ndim)


def _pieces(blocks: list[Tensor], scales: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parts of block views with their scales, which stay in the processor's cache; the whole where one scale extends over all rows."""
    cut = scales[0].ndim and scales[0].shape[0] == blocks[0].shape[0]
    for piece in pieces(blocks[0]) if cut else [...]:
        yield [t[piece] for t in (*blocks, *scales)]
