"""The free target: any format, for weights alone or with inputs, a KV cache and gradients; the artifact computes what training did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qatana as qt
from qatana.errors import ExportError, ParityError, QatanaError, SchemeError
from qatana.report.formats import entries

WEIGHTS = [entry.name for entry in entries() if not entry.name.endswith("/token")]
INPUTS = ["int8/token", "fp8:e4m3/token", "fp8:e5m2", "uint8", "int8/tensor", "int4/group32", "mxfp8", "nvfp4"]


class Small(nn.Module):
    """Table, two layers: rows of 256, which every block type divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.first, self.last = nn.Embedding(40, 256), nn.Linear(256, 256), nn.Linear(256, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(self.table(ids)))).mean(1)


class Convolutions(nn.Module):
    """A norm that folds, a ReLU, a convolution without bias, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.last = nn.Conv2d(16, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.norm(self.first(x))))).mean((2, 3)))


def ids(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 40, (4, 7), generator=generator) for _ in range(count)]


def images(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(count)]


def quantized(model: nn.Module, batches: list[Any], **schemes: Any) -> nn.Module:
    return qt.ptq(model, qt.recipe("torch", **schemes), batches)


def trains(model: nn.Module, batch: Any) -> None:
    """Every parameter gets a gradient that is finite and not zero."""
    model.train()
    model(batch).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool(parameter.grad.any()), name
    model.eval()


@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_format_trains_converts_and_comes_back(weight: str, tmp_path) -> None:
    model, batches = quantized(Small(), ids(), weight=weight), ids()
    trains(model, batches[0])
    artifact = qt.convert(model)
    artifact.save(tmp_path / "artifact")
    # Only a linear layer's own arithmetic stands between weights and outputs, and both sides run it: no difference is allowed.
    certificate = qt.verify(model, artifact, tmp_path / "artifact", batches)
    assert certificate.raise_on_difference().comparison("training").compared > 40 * 256 + 256 * 256
    size = sum(t.numel() * t.element_size() for t in artifact.tensors.values())
    # Scales that are all equal, or fit two bytes by chance, take less than planned; one number per tensor may come on top.
    assert 0.8 * size - 64 <= model.qatana_plan.predicted_bytes * 1.0
    assert size <= model.qatana_plan.predicted_bytes + 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", ["int8/channel", "nf4+double", "mxfp4", "gguf:q4_k"])
def test_half_precision_models(weight: str, dtype: torch.dtype, tmp_path) -> None:
    """Weights are quantized in float32 and multiplied in the model's dtype, in training and in the artifact."""
    model, batches = quantized(Small().to(dtype), ids(), weight=weight, input="int8/token"), ids()
    trains(model, batches[0])
    assert model(batches[0]).dtype == dtype
    artifact = qt.convert(model)
    artifact.save(tmp_path / "artifact")
    qt.verify(model, artifact, tmp_path / "artifact", batches).raise_on_difference()


@pytest.mark.parametrize("given", INPUTS)
def test_inputs_in_any_format(given: str, tmp_path) -> None:
    model, batches = quantized(Small(), ids(), weight="int4/group32", input=given), ids()
    inputs = [q for name, q in qt.quantizers(model).items() if name.endswith("input")]
    assert [str(q.scheme.format) for q in inputs] == [str(qt.scheme(given).format)] * 2
    trains(model, batches[0])
    artifact = qt.convert(model)
    artifact.save(tmp_path / "artifact")
    qt.verify(model, artifact, tmp_path / "artifact", batches).raise_on_difference()


@pytest.mark.parametrize(
    "schemes",
    [
        {"weight": "fp8:e4m3/channel"}, {"weight": "nf4", "input": "int8/tensor"}, {"weight": "bitnet"},
        {"weight": "int8/channel", "input": "uint8"}, {"weight": "int8/channel", "input": None, "gradient": "int8"},
    ],
    ids=str,
)  # fmt: skip
def test_convolutions(schemes: dict[str, Any], tmp_path) -> None:
    model, batches = quantized(Convolutions(), images(), **schemes), images()
    trains(model, batches[0])
    artifact = qt.convert(model)
    artifact.save(tmp_path / "artifact")
    certificate = qt.verify(model, artifact, tmp_path / "artifact", batches)
    certificate.raise_on_difference()
    assert "torch" in str(certificate)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).eval()


def test_keys_and_values_as_a_cache_holds_them() -> None:
    """Per token and head, behind the rotary embedding: what attention reads is fake_quantize_by of what it read before."""
    from qatana.numerics import fake_quantize_by

    batch = {"input_ids": torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(2))}
    model = quantized(llama(), [batch], weight=None, key="int8/token", value="int4/group32")
    assert [q.scheme.scale for q in qt.quantizers(model).values()] == ["dynamic"] * 4
    products = model.model.layers[0].self_attn.attention_products
    seen: list[Any] = []
    products.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    products.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(**batch)
    (query, key, value, mask, scaling, _), found = seen
    key, value = (
        fake_quantize_by(key, qt.scheme("int8/token")),
        fake_quantize_by(value, qt.scheme("int4/group32", scale="dynamic")),
    )
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling + (0 if mask is None else mask)
    assert torch.equal(found, torch.matmul(torch.softmax(scores, -1), value))
    assert torch.equal(qt.convert(model)(**batch), model(**batch).logits)


def test_gradients_are_an_option_of_any_recipe() -> None:
    """The gradient that reaches a layer's inputs lies on the levels of its scheme, for which int8 has 255."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    for target in ("torch", "ort:int8"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        recipe = (
            qt.recipe(target).rule("0", gradient="int8").rule("2", gradient={"format": "e5m2", "granularity": "token"})
        )
        model = qt.ptq(model, recipe, [x]).train()
        assert [str(m.gradient) for m in model if hasattr(m, "gradient")] == [
            "int8/tensor sym dynamic",
            "e5m2/token sym dynamic",
        ]
        model(x).square().mean().backward()
        # The bias of the first layer collects the rounded gradient itself, one column each: a sum of multiples of one step.
        plain = copy.deepcopy(model)
        qt.quantize_gradients(plain, None)
        plain.zero_grad()
        plain(x).square().mean().backward()
        ours, theirs = model[0].bias.grad, plain[0].bias.grad
        assert not torch.equal(ours, theirs)
        # Rounding adds at most one step of 1/127 of the largest gradient to each of 32 terms.
        assert float((ours - theirs).abs().max()) < 0.5 * float(theirs.abs().max())
        assert torch.equal(qt.convert(model)(x), model.eval()(x))


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # torch's own, while it traces a Function
def test_compiled_steps_have_the_same_bits() -> None:
    batch = ids()[0]
    model = quantized(Small(), ids(), weight="mxfp4", input="fp8:e4m3/token", gradient="fp8:e5m2").train()
    grads = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(7)
        run(batch).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_state_goes_through_deepcopy_and_state_dict() -> None:
    batch = ids()[0]
    model = quantized(Small(), ids(), weight="fp8:e4m3/channel", input="uint8")
    other = qt.prepare(Small(), qt.plan(Small(), model.qatana_plan.recipe, batch))
    other.load_state_dict(model.state_dict())
    for quantizer in qt.quantizers(other).values():
        quantizer.enabled = True
    expected = model.eval()(batch)
    assert torch.equal(copy.deepcopy(model)(batch), expected)
    assert torch.equal(other.eval()(batch), expected)


@pytest.mark.parametrize(
    ("schemes", "says"),
    [
        ({"weight": "int8/token"}, "a weight has no tokens"),
        ({"weight": "int4/group96"}, "group size 96 does not divide"),
        ({"weight": "nf5"}, "unknown number format 'nf5'"),
        ({"weights": "nf4"}, "unknown role 'weights'"),
        ({"gradient": "nf4"}, "gradients are rounded to integers or floats"),
        ({"gradient": "uint8"}, "signed symmetric"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_by_plan(schemes: dict[str, Any], says: str) -> None:
    with pytest.raises(QatanaError, match=says):
        qt.plan(Small(), qt.recipe("torch", **schemes), ids()[0])


def test_other_targets_keep_their_kernels() -> None:
    with pytest.raises(SchemeError, match="the target 'torch' takes any"):
        qt.plan(Small(), qt.recipe("ort:int8-dynamic", input="int8/token"), ids()[0])


def test_there_is_no_file_and_changed_weights_are_found(tmp_path) -> None:
    model = quantized(Small(), ids(), weight="nf4+double")
    artifact = qt.convert(model)
    with pytest.raises(ExportError, match=r"target 'torch' runs in PyTorch.*ort:int8"):
        qt.export(artifact, tmp_path / "model.onnx")
    artifact.save(tmp_path / "artifact")
    with torch.no_grad():
        model.first.weight[0] *= 2
    with pytest.raises(ParityError, match=r"'first\.weight'"):
        qt.verify(model, artifact, tmp_path / "artifact", ids()).raise_on_difference()


def test_a_recipe_with_names_of_schemes_goes_to_yaml_and_back(tmp_path) -> None:
    recipe = qt.recipe("torch", weight="gguf:q4_0", key="int8/token").rule("head", weight=None)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert qt.Recipe.load(path) == recipe
    assert qt.Recipe.from_dict(recipe.to_dict()) == recipe
