"""What TrainingStep says of memory is what a layer by hand keeps; its times are parts of one whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qatana.jobs.training_step import PARTS, TrainingStep, logits

ROWS, WIDTH = 64, 256


class Product(nn.Module):
    """sigmoid(x W): autograd keeps x for W's gradient, and the sigmoid for its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.weight)


def step(model: nn.Module, **options: Any) -> TrainingStep:
    torch.manual_seed(0)
    x = torch.randn(ROWS, WIDTH)
    return TrainingStep(model, lambda network: network(x), **options)


def test_bytes_saved_are_those_of_the_tensors_that_gradients_need() -> None:
    """x, the sigmoid (which the square keeps too: one storage, counted once), and not the weight."""
    assert step(Product()).saved_bytes() == 2 * ROWS * WIDTH * 4


def test_bytes_kept_are_those_that_the_forward_pass_allocates() -> None:
    """x was there before, the product before the sigmoid is freed; the sigmoid stays, and the loss: one float in 64 bytes at most."""
    kept = step(Product()).kept_bytes()
    assert ROWS * WIDTH * 4 <= kept <= ROWS * WIDTH * 4 + 64


class Hidden(torch.autograd.Function):
    """Keeps a tensor without telling autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.codes = x.to(torch.int8)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * (ctx.codes == ctx.codes)


def test_bytes_kept_behind_autograds_back_are_counted() -> None:
    class Model(Product):
        def forward(self, x: Tensor) -> Tensor:
            return Hidden.apply(super().forward(x))  # type: ignore[return-value]

    plain, hidden = step(Product()), step(Model())
    # The clone, which the square keeps, and the codes.
    assert hidden.kept_bytes() - plain.kept_bytes() == ROWS * WIDTH * (4 + 1)


def test_a_step_consists_of_its_parts() -> None:
    ms = step(Product()).turn(enough=0.0)
    assert set(ms) == set(PARTS)
    # Sums of differences of one clock: equal but for the rounding of float64.
    assert ms["step"] == pytest.approx(ms["forward"] + ms["backward"] + ms["optimizer"], rel=1e-9)


def test_the_peak_holds_what_is_saved() -> None:
    big = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
    x = torch.randn(4096, 1024)
    measured = TrainingStep(big, lambda network: network(x))
    measured()  # the optimizer's state is there from now on
    peak = measured.peak_bytes()
    if peak is None:
        pytest.skip("this system does not tell the peak of a process")
    # The four outputs are alive together at the end of the forward pass: 64 MiB. The kernel counts pages in batches of 64 per thread.
    assert peak >= 4 * 4096 * 1024 * 4 - 2**20


def test_autocast_is_that_of_the_forward_pass() -> None:
    seen: list[torch.dtype] = []

    class Model(Product):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    step(Model(), autocast=torch.bfloat16)()
    step(Model(), optimizer="sgd")()
    assert seen == [torch.bfloat16, torch.float32]


def test_operators_name_the_product() -> None:
    assert step(Product()).operators()["aten::mm"] > 0


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"logits": x}, lambda x: (x, None)])
def test_logits_of_any_output(wrap: Any) -> None:
    x = torch.ones(2)
    assert logits(wrap(x)) is x
