"""A captured graph computes what the model computes, in both modes, and keeps everything that the model holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from qatana.prepare.capture import capture


class Dropouts(nn.Module):
    """One dropout that is always off and one that follows the mode; `branch`: control flow that only torch.export follows."""

    def __init__(self, branch: bool = False) -> None:
        super().__init__()
        self.conv, self.module, self.branch = nn.Conv2d(3, 4, 1), nn.Dropout(0.5), branch

    def forward(self, x: Tensor) -> Tensor:
        if self.branch and x.shape[0] > 100:
            return x
        x = F.dropout(self.conv(x), 0.9, training=False)
        x = F.dropout(x, 0.5, self.training)
        return self.module(x)


@pytest.mark.parametrize("branch", [False, True], ids=["torch.fx", "torch.export"])
@pytest.mark.parametrize("training", [False, True], ids=["captured in eval", "captured in training"])
def test_a_dropout_follows_the_mode_only_where_the_model_lets_it(branch: bool, training: bool) -> None:
    model, x = Dropouts(branch).train(training), torch.rand(2, 3, 16, 16)
    graph = capture(model, (x,), {})
    assert model.training is training
    assert torch.equal(graph.eval()(x), model.eval()(x))
    kinds = [type(m) for m in graph.modules() if isinstance(m, nn.Dropout)]
    assert len(kinds) == 2
    dropped = float((graph.train()(x) == 0).float().mean())
    # two dropouts of 0.5 leave a quarter: 0.75 of 2048 values, 6 standard deviations of 0.0096 either way; 0.975 with the third
    assert abs(dropped - 0.75) < 0.058


def test_a_graph_that_is_given_keeps_its_own_constants() -> None:
    model, x = Dropouts(), torch.rand(2, 3, 4, 4)
    graph = capture(fx.symbolic_trace(model.eval()), (x,), {})
    assert float((graph.train()(x) == 0).float().mean()) < 0.75  # nn.Dropout alone: its mode is not in the graph
    assert sum(isinstance(m, nn.Dropout) for m in graph.modules()) == 1


class Wide(nn.Module):
    """As many layers that the forward does not call as one wants."""

    def __init__(self, unused: int) -> None:
        super().__init__()
        self.conv, self.heads = nn.Conv2d(3, 4, 1), nn.ModuleList(nn.Linear(2, 2) for _ in range(unused))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_keeping_unused_layers_costs_no_look_at_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters of the whole graph are listed as often for 40 unused layers as for 2."""
    before, looks = fx.GraphModule.named_parameters, []
    monkeypatch.setattr(
        fx.GraphModule, "named_parameters", lambda self, *a, **k: (looks.append(1), before(self, *a, **k))[1]
    )
    counts = []
    for unused in (2, 40):
        looks.clear()
        model = Wide(unused)
        graph = capture(model, (torch.rand(1, 3, 2, 2),), {})
        assert set(graph.state_dict()) == set(model.state_dict())
        counts.append(len(looks))
    assert counts[0] == counts[1] > 0
