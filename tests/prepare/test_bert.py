"""plan and prepare by module names, on a Hugging Face BERT and on models that no graph can be taken of."""

from __future__ import annotations

import copy

import pytest
import torch
from support.flows import bert, bert_batch, bert_model
from torch import Tensor, nn

import qatana as qt

TARGETS = ["ort:int8", "ort:int8-dynamic", "ort:int4", "ort:int2"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_plan_lists_every_linear_and_embedding(target: str) -> None:
    model = bert_model()
    before = copy.deepcopy(model.state_dict())
    implementation = model.config._attn_implementation
    plan = qt.plan(model, target, bert_batch())
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            row = plan.row(f"{name}.weight")
            assert row is not None
            assert row.scheme is not None
            assert row.elements == module.weight.numel()
    products = {row.role for row in plan.rows if row.kind == "attention" and row.scheme is not None}
    assert products == ({"query", "key", "value", "probability", "context"} if target == "ort:int8" else set())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation


def test_one_tensor_has_one_quantizer() -> None:
    """query, key and value read one tensor; what they produce is what the products read; the output layer reads the context."""
    plan = qt.plan(bert_model(), "ort:int8", bert_batch())
    block = "bert.encoder.layer.0.attention"

    def serves(name: str) -> str:
        row = plan.row(name)
        assert row is not None
        return row.shares or row.name

    assert len({serves(f"{block}.self.{role}.input") for role in ("query", "key", "value")}) == 1
    for role in ("query", "key", "value"):
        assert serves(f"{block}.self.{role}.output") == f"{block}.self.attention_products.{role}"
    assert serves(f"{block}.output.dense.input") == f"{block}.self.attention_products.context"


@pytest.mark.parametrize("target", TARGETS)
def test_prepared_and_off_is_the_float_model(target: str) -> None:
    model, batch = bert_model(), bert_batch(5)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(**batch)["logits"]
        ready = qt.prepare(model, qt.plan(model, target, batch))
        # attention as q k^T * scaling instead of one fused kernel: float32 roundings
        torch.testing.assert_close(ready(**batch)["logits"], expected, rtol=1e-5, atol=1e-5)
    assert {name: id(p) for name, p in ready.named_parameters() if not name.endswith("_quantizer.scale")} == parameters
    assert {key for key in ready.state_dict() if "_quantizer" not in key} == set(bert_model().state_dict())


@pytest.mark.parametrize("target", TARGETS)
def test_training_reached_every_parameter(target: str) -> None:
    """The flow took two steps: no parameter that the loss depends on stood still."""
    flow = bert(target)
    before = dict(flow.float_model.named_parameters())
    for name, parameter in flow.model.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
        if name in before and "key.bias" not in name:  # softmax is blind to a constant added to all scores of a query
            assert not torch.equal(parameter, before[name]), name
    scales = [name for name, _ in flow.model.named_parameters() if name.endswith("scale")]
    assert bool(scales) == (target in ("ort:int4", "ort:int2"))


class Tied(nn.Module):
    """A language model's head on its own embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))


def test_tied_weights_stay_tied() -> None:
    model, ids = Tied(), torch.randint(0, 20, (3, 5))
    plan = qt.plan(model, "ort:int8", ids)
    ready = qt.calibrate(qt.prepare(model, plan), [ids])
    assert ready.get_parameter("embed.weight") is ready.get_parameter("head.weight")
    assert len(list(ready.parameters())) == 1
    assert 0 < plan.predicted_bytes < plan.float_bytes
    assert torch.equal(qt.convert(ready)(ids), ready(ids))


def test_a_model_with_nan_names_the_parameter() -> None:
    model = bert_model()
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.1.output.dense.weight")[3, 4] = torch.nan
    with pytest.raises(qt.QatanaError, match=r"bert.encoder.layer.1.output.dense.weight' holds NaN or infinite"):
        qt.plan(model, "ort:int8", bert_batch())


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (nn.Sequential(nn.Tanh(), nn.LayerNorm(8)), "it has no Linear, Conv or Embedding"),
        (nn.Sequential(nn.GRU(8, 8)), "a bare parameter of GRU, float unless"),
    ],
)
def test_nothing_to_quantize(model: nn.Module, why: str) -> None:
    with pytest.raises(qt.QatanaError, match=f"no layer of Sequential can be quantized for ort:int8: {why}"):
        qt.plan(model, "ort:int8", torch.randn(2, 8))


def test_everything_skipped() -> None:
    with pytest.raises(qt.QatanaError, match="skipped by the recipe"):
        qt.plan(nn.Sequential(nn.Linear(8, 8)), qt.recipe("ort:int8").skip("*"), torch.randn(2, 8))


@pytest.mark.parametrize(("target", "size"), [("ort:int4", 32), ("ort:int2", 64)])
def test_a_group_that_does_not_divide_names_the_layer(target: str, size: int) -> None:
    model = nn.Sequential(nn.Linear(128, 40), nn.ReLU(), nn.Linear(40, 3))
    with pytest.raises(qt.QatanaError, match=rf"2.weight: group size {size} does not divide the last dimension 40"):
        qt.plan(model, target, torch.randn(2, 128))


def test_a_single_layer_asks_to_be_wrapped() -> None:
    model = nn.Linear(8, 3)
    with pytest.raises(qt.QatanaError, match=r"wrap it in torch.nn.Sequential"):
        qt.prepare(model, qt.plan(model, "ort:int8", torch.randn(2, 8)))


@pytest.mark.parametrize(
    ("target", "role", "changes"),
    [
        ("ort:int8", "input", {"granularity": "channel"}),
        ("ort:int8", "input", {"granularity": "group8"}),
        ("ort:int8-dynamic", "input", {"granularity": "token"}),
        ("ort:int8-dynamic", "input", {"format": "uint4"}),
        ("ort:int4", "input", {"format": "int4n"}),
        ("ort:int8", "weight", {"symmetric": False, "format": "int8"}),
    ],
)
def test_what_the_target_cannot_do_is_refused_by_plan(
    target: str, role: str, changes: dict[str, object] | None
) -> None:
    """Not silently done otherwise, and not first by convert, after training."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128))
    with pytest.raises(qt.QatanaError, match=r"0\.|rule '0"):
        qt.plan(model, qt.recipe(target).rule("0", **{role: changes}), torch.randn(2, 128))


def test_a_layer_whose_weight_stays_float_is_float_as_a_whole() -> None:
    """An integer product needs both operands: the plan says so, and the model converts."""
    model, x = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)), torch.randn(8, 128)
    plan = qt.plan(model, qt.recipe("ort:int8").rule("0", weight=None), x)
    assert {row.name for row in plan.rows if row.scheme is None} == {"0.weight", "0.input"}
    assert all(row.reason for row in plan.rows if row.scheme is None)
    ready = qt.calibrate(qt.prepare(model, plan), [x]).eval()
    assert torch.equal(qt.convert(ready)(x), ready(x))


def test_calibration_errors() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 8)
    with pytest.raises(qt.QatanaError, match=r"no quantizers; call qatana.prepare"):
        qt.calibrate(model, [x])
    ready = qt.prepare(model, qt.plan(model, "ort:int8", x))
    with pytest.raises(qt.QatanaError, match="the calibration loader yielded no batch"):
        qt.calibrate(ready, [])
    for bad, kind in ((torch.nan, "NaN"), (torch.inf, "infinite")):
        with pytest.raises(qt.QatanaError, match=f"batch 1: input 0 holds {kind} values"):
            qt.calibrate(ready, [x, x * bad])
    with pytest.raises(qt.QatanaError, match=r"batch 0: input 0 is empty"):
        qt.calibrate(ready, [x[:0]])
    with torch.no_grad():
        ready.get_parameter("0.weight").mul_(1e38)  # finite inputs, an infinite activation
    with pytest.raises(qt.QatanaError, match=r"2\.input: (infinite|NaN) values arrived during calibration"):
        qt.calibrate(ready, [x * 1e3])
