"""Law 3 inside PyTorch: QAT model in eval mode == integer model == artifact == reloaded artifact, bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from support.flows import Flow, bert, bert_batch, cnn
from support.networks import CASES, images
from torch import nn

import qatana as qt
from qatana.nn.conv import Conv
from qatana.nn.linear import Linear

FLOWS = [*CASES, "functional, 4 bits", "ort:int8", "ort:int8-dynamic", "ort:int4", "ort:int2", "openvino:int8"]


@pytest.fixture(params=FLOWS)
def flow(request: pytest.FixtureRequest) -> Flow:
    name: str = request.param
    if ":" in name:
        return bert(name)
    return cnn(name.partition(",")[0], 4 if "4 bits" in name else 8)


def test_all_forms_agree(flow: Flow, tmp_path: Path) -> None:
    expected = flow.outputs(flow.model)
    assert torch.equal(flow.outputs(qt.integer_model(flow.model)), expected)
    assert torch.equal(flow.outputs(flow.artifact), expected)
    reloaded = qt.Artifact.load(flow.artifact.save(tmp_path / "artifact"))
    assert torch.equal(flow.outputs(reloaded), expected)
    assert reloaded.config == flow.artifact.config
    assert {k: v.dtype for k, v in reloaded.tensors.items()} == {k: v.dtype for k, v in flow.artifact.tensors.items()}
    assert reloaded.code_nodes() == flow.artifact.code_nodes()


def test_quantization_does_something_and_not_much(flow: Flow) -> None:
    """The integer model answers like a quantized form of the trained weights, not like something else."""
    expected, found = flow.outputs(disabled(flow.model)), flow.outputs(flow.artifact)
    error = float((found - expected).norm() / expected.norm())
    # 2 bits cost a normal weight 0.34 of its norm at best (9.3 dB) and 4 bits 0.1, in each of a dozen layers of random weights
    four_bits = 0.6 if any(rule.schemes for rule in flow.plan.recipe.rules) else 0.12
    assert 0 < error < {"ort:int2": 1.5, "ort:int4": 0.25}.get(flow.plan.recipe.target, four_bits)


def disabled(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for quantizer in qt.quantizers(twin).values():
        quantizer.enabled = False
    return twin


def test_convert_leaves_the_model_alone(flow: Flow) -> None:
    before = {k: v.clone() for k, v in flow.model.state_dict().items()}
    expected = flow.outputs(flow.model)
    qt.integer_model(flow.model)
    assert all(torch.equal(v, before[k]) for k, v in flow.model.state_dict().items())
    assert torch.equal(flow.outputs(flow.model), expected)


def test_stored_codes_fit_their_formats(flow: Flow) -> None:
    """Weight codes span what the plan says, from end to end: a scale that wastes half of the codes is wrong."""
    for row in flow.plan.rows:
        if (
            row.role != "weight"
            or row.scheme is None
            or row.scheme.format.stored_bits < 8
            or row.scheme.granularity.kind != "channel"
        ):
            continue
        codes = flow.artifact.tensors[row.name].flatten(1).to(torch.int64)
        format = row.scheme.format
        assert codes.min() >= format.lo
        assert codes.max() <= format.hi


def test_folding_is_what_the_file_holds() -> None:
    """Weights of the file are round(W gamma / sqrt(var + eps) / scale) in float64, up to ties of the float32 product."""
    flow = cnn("functional")
    for name, layer in flow.model.named_modules():
        if not isinstance(layer, Conv):
            continue
        norm = layer.batch_norm
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        folded = (layer.weight.double() * factor.view(-1, 1, 1, 1)).detach().numpy()
        scale = flow.artifact.tensors[f"{name}.weight_scale"].double().numpy()[:, None, None, None]
        assert np.abs(scale.ravel() - np.abs(folded).max((1, 2, 3)) / 63).max() <= 1e-6 * scale.max()
        distance = np.abs(flow.artifact.tensors[f"{name}.weight"].numpy() - folded / scale)
        assert distance.max() <= 0.5 + 1e-4  # 63 * 2^-22: float32 roundings of the product and of the quotient


@pytest.mark.parametrize("count", [1, 2, 7])
def test_any_batch_size(count: int) -> None:
    for case in ("functional", "control-flow"):
        flow, x = cnn(case), images(case, count, seed=31)
        assert torch.equal(flow.artifact(x), flow.model(x))


@pytest.mark.parametrize(("count", "length"), [(1, 5), (3, 30)])
def test_any_batch_and_sequence(count: int, length: int) -> None:
    flow, batch = bert("ort:int8"), bert_batch(8, count, length)
    assert torch.equal(flow.artifact(**batch), flow.model(**batch)["logits"])


def test_four_bit_codes_stay_in_four_bits() -> None:
    flow = cnn("functional", 4)
    found = flow.codes()
    activations = {
        row.name for row in flow.plan.rows if row.role != "weight" and row.scheme is not None and not row.shares
    }
    for name in activations:
        assert int(found[name].max()) <= 15, name
    for row in flow.plan.rows:
        if row.role == "weight":
            assert int(found[row.name].min()) >= -8
            assert int(found[row.name].max()) <= 7
    assert max(int(found[name].max()) for name in activations) == 15


def test_errors() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(4, 8)
    with pytest.raises(qt.QatanaError, match=r"no quantizers; call qatana.prepare"):
        qt.integer_model(model)
    with pytest.raises(qt.QatanaError, match="carries no plan"):
        qt.convert(model)
    ready = qt.prepare(model, qt.plan(model, "ort:int8", x))
    with pytest.raises(qt.QatanaError, match=r"not calibrated; run qatana.calibrate"):
        qt.convert(ready)


def test_a_linear_layer_without_bias_and_one_of_one_output() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(32, 8)
    ready = qt.calibrate(qt.prepare(model, qt.plan(model, "ort:int8", x)), [x]).eval()
    assert isinstance(ready.get_submodule("0"), Linear)
    assert torch.equal(qt.convert(ready)(x), ready(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_of_the_input_does_not_matter(memory_format: torch.memory_format) -> None:
    flow = cnn("functional")
    x = images("functional", 4, seed=12).contiguous(memory_format=memory_format)
    assert torch.equal(flow.artifact(x), flow.model(images("functional", 4, seed=12)))
