"""Weight scales are set by one function, for any layer with a `weight_quantizer`, whichever stage asks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qatana as qt
from qatana.nn.conv import Conv


class Gate(nn.Module):
    """A layer of a user's own, with a slot."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -2.0, 1.0]))
        self.weight_quantizer = qt.Quantizer(qt.scheme("int4", scale="learned"), (3,), "gate")

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight_quantizer(self.weight)


def by_calibration(model: nn.Module) -> None:
    qt.calibrate(model, [torch.randn(2, 3, 4, 4)])


def by_the_end_of_a_float_phase(model: nn.Module) -> None:
    controller = qt.Controller(model, 2, float_steps=1)
    model(torch.randn(2, 3, 4, 4))
    controller.step()


@pytest.mark.parametrize("settled", [by_calibration, by_the_end_of_a_float_phase])
def test_every_weight_scale_is_settled_as_its_layer_sees_it(settled: Callable[[nn.Module], None]) -> None:
    conv = Conv(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), False, "onnxruntime")
    conv.weight_quantizer = qt.Quantizer(qt.scheme("int4", "channel", scale="learned"), (3, 3, 1, 1), "conv")
    conv.batch_norm.running_var.copy_(torch.tensor([0.25, 1.0, 4.0]))
    norm_weight = conv.batch_norm.weight.detach() / (conv.batch_norm.running_var + conv.batch_norm.eps).sqrt()
    model = nn.Sequential(conv, nn.Flatten(2), nn.AdaptiveAvgPool1d(3), Gate()).eval()
    settled(model)
    gate: qt.Quantizer = model[3].weight_quantizer  # type: ignore[assignment]
    # symmetric int4: the largest magnitude lies at code 7
    torch.testing.assert_close(gate.scale.detach(), torch.tensor(2.0 / 7).reshape(gate.scale.shape), rtol=1e-6, atol=0)
    folded = conv.weight.detach() * norm_weight.view(3, 1, 1, 1)
    expected = folded.abs().amax((1, 2, 3), keepdim=True) / 7
    # a product and a quotient in float32, in one order or another
    torch.testing.assert_close(conv.weight_quantizer.scale.detach(), expected, rtol=1e-6, atol=0)
