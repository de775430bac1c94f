"""A layer of your own, with bare parameters: low-rank projections. Both products are quantized, inputs too.

    python examples/own_layer.py
"""

import torch
from torch import Tensor, nn

import qatana as qt
from qatana.nn import Foreign


class LowRank(nn.Module):
    """y = up(down(x)), as you wrote it: qatana sees no nn.Linear in it."""

    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.randn(outputs, rank) / rank**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.t() @ self.up.t()


@qt.register_layer(LowRank, weights={"down": "out in", "up": "out in"})
class QuantizedLowRank(Foreign):
    """Without this class, `qt.register_layer(weights=...)(LowRank)` quantizes the weights and leaves what they multiply."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = nn.functional.linear(self.input_of("down", x), self.weight_of("down"))
        return nn.functional.linear(self.input_of("up", hidden), self.weight_of("up"))


torch.manual_seed(0)
model, x = nn.Sequential(LowRank(64, 16, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(32, 64)
model = qt.ptq(model, qt.recipe("torch", weight="int8/channel", input="int8/token"), [x])
print(model.qatana_plan)
print("converted model equal:", torch.equal(qt.convert(model)(x), model.eval()(x)))
