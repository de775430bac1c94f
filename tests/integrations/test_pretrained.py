"""QatanaConfig in from_pretrained and save_pretrained: QAT models and integer models, by tiny Llamas and BERTs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.pretrained import W4A8, assert_same_state, ids, load, logits, step, write_bert, write_llama
from transformers import AutoConfig, AutoModelForTokenClassification

import qatana as qt
from qatana.integrations.huggingface import QatanaConfig, attach, integer_model

TABLE = {"type": "Embedding", "schemes": {"weight": "int4/group32 sym dynamic"}}


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert(tmp_path_factory.mktemp("bert"))


# -- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["ort:int8", W4A8, json.dumps(W4A8), qt.recipe("torch", weight="nf4+double")])
def test_a_config_survives_json(recipe: Any) -> None:
    config = QatanaConfig(recipe, trainable=False, modules_to_not_convert=["lm_head"])
    data = json.loads(config.to_json_string())
    again = QatanaConfig.from_dict(data)
    assert again.to_dict() == config.to_dict() == data
    assert again.recipe == config.recipe
    assert data["quant_method"] == "qatana"
    assert [r.match for r in again.full_recipe.rules][-1] == "*.lm_head"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipe": "ort:int9"}, "unknown target 'ort:int9'; did you mean"),
        ({"recipe": "{"}, "no valid JSON"),
        ({"recipe": "ort:int8", "trainible": True}, "no 'trainible'; did you mean 'trainable'"),
        ({"recipe": "ort:int8", "trainable": "no"}, "trainable='no' must be True"),
        ({"recipe": "ort:int8", "modules_to_not_convert": "lm_head"}, "must be a list of module names"),
        ({"trainable": True}, "needs a 'recipe'"),
        ({"recipe": "ort:int8", "quant_method": "awq"}, "no 'quant_method'"),
    ],
)
def test_a_wrong_config_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(qt.RecipeError, match=message):
        QatanaConfig.from_dict(given)


# -- QAT models ------------------------------------------------------------------------------------------------------


def test_a_float_checkpoint_becomes_a_qat_model_and_comes_back(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_serializable()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight_quantizer is model.model.embed_tokens.weight_quantizer
    assert not torch.equal(logits(model), logits(load(llama_dir)))
    step(model)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_state(again, model)
    assert again.lm_head.weight_quantizer is again.model.embed_tokens.weight_quantizer
    assert torch.equal(logits(again), logits(model))
    step(model)
    step(again)
    assert_same_state(again, model)


def test_it_equals_the_model_prepared_by_hand(llama_dir: Path) -> None:
    by_hand = load(llama_dir)
    by_hand = qt.ptq(by_hand, W4A8, [{"input_ids": ids()}])
    assert torch.equal(logits(load(llama_dir, W4A8)), logits(by_hand))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("trainable", [True, False])
def test_shards_device_maps_and_dtypes(llama_dir: Path, tmp_path: Path, dtype: torch.dtype, trainable: bool) -> None:
    """Scales are float32 whatever the dtype of the model."""
    model = load(llama_dir, W4A8, dtype=dtype, config={"trainable": trainable})
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for device_map in ("cpu", "auto"):
        again = load(tmp_path, device_map=device_map, dtype="auto")
        assert again.dtype == dtype
        assert_same_state(again, model)
        assert torch.equal(logits(again), logits(model))
    scales = {t.dtype for n, t in model.state_dict().items() if n.endswith("quantizer.scale") or n.endswith("x.scale")}
    assert scales == {torch.float32}


def test_static_activations_wait_for_data(bert_dir: Path, tmp_path: Path) -> None:
    kind = AutoModelForTokenClassification
    model = kind.from_pretrained(bert_dir, quantization_config=QatanaConfig("ort:int8"))
    assert not any(q.enabled for q in qt.quantizers(model).values())
    model.save_pretrained(tmp_path / "before")
    again = kind.from_pretrained(tmp_path / "before")
    assert not any(q.enabled for q in qt.quantizers(again).values())
    batches = [{"input_ids": ids(60, seed=seed)} for seed in range(3)]
    for each in (model, again):
        qt.calibrate(each, batches)
    assert_same_state(again, model)
    model.save_pretrained(tmp_path / "after")
    again = kind.from_pretrained(tmp_path / "after")
    assert_same_state(again, model)
    assert all(q.enabled for q in qt.quantizers(again).values())
    assert torch.equal(logits(again, ids(60)), logits(model, ids(60)))
    assert qt.convert(again).config["plan"]


# -- integer models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", [W4A8["rules"], [*W4A8["rules"], TABLE]], ids=["learned", "dynamic table"])
def test_an_integer_model_computes_what_training_computed(rules: list[Any], llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, {"target": "torch", "rules": rules})
    step(model)
    integer = integer_model(model)
    assert torch.equal(logits(integer), logits(model))
    assert not any(p.requires_grad for p in integer.parameters())
    integer.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert_same_state(again, integer)
    assert torch.equal(logits(again), logits(model))
    assert again.config.quantization_config.trainable is False
    assert model.config.quantization_config.trainable is True


def test_tied_codes_are_stored_once(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8, config={"trainable": False})
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight.codes" in stored
    assert "lm_head.weight.codes" not in stored
    assert stored["model.embed_tokens.weight.codes"].numel() == 96 * 256 // 2
    again = load(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    again.tie_weights()
    assert torch.equal(logits(again), logits(model))


def test_one_call_gives_the_integers_of_two(llama_dir: Path) -> None:
    assert_same_state(load(llama_dir, W4A8, config={"trainable": False}), integer_model(load(llama_dir, W4A8)))


@pytest.mark.parametrize("target", ["ort:int8", "ort:int8-dynamic", "ort:int4", "openvino:int8"])
def test_integer_models_of_engines(target: str, bert_dir: Path, tmp_path: Path) -> None:
    """Equal to the QAT model where all is integers, and to the integer model that was saved everywhere."""
    kind = AutoModelForTokenClassification
    model = kind.from_pretrained(bert_dir, quantization_config=QatanaConfig(target))
    qt.calibrate(model, [{"input_ids": ids(60, seed=seed)} for seed in range(3)])
    integer = integer_model(model)
    integer.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert_same_state(again, integer)
    assert torch.equal(logits(again, ids(60)), logits(integer, ids(60)))
    assert torch.equal(logits(integer, ids(60)), logits(qt.integer_model(model), ids(60)))


@pytest.mark.parametrize(
    "weight", ["int8/channel", "nf4+double", "mxfp4", "gguf:q4_0", "fp8:e4m3/channel", "int3/group32"]
)
def test_other_formats_come_back(weight: str, llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, qt.recipe("torch", weight=weight))
    integer = integer_model(model)
    model.save_pretrained(tmp_path / "qat")
    integer.save_pretrained(tmp_path / "integer")
    assert_same_state(load(tmp_path / "qat"), model)
    again = load(tmp_path / "integer")
    assert_same_state(again, integer)
    assert torch.equal(logits(again), logits(model))


def test_generate_gives_the_same_tokens(llama_dir: Path, tmp_path: Path) -> None:
    model = load(llama_dir, W4A8)
    integer_model(model).save_pretrained(tmp_path)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    again = load(tmp_path)
    for seed in range(3):
        given = ids(seed=seed)
        mask = torch.ones_like(given)
        ours = model.generate(given, attention_mask=mask, **options)
        assert torch.equal(again.generate(given, attention_mask=mask, **options), ours)


# -- back to float, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
def test_dequantize_keeps_the_weights_and_the_tie(trainable: bool, llama_dir: Path) -> None:
    """Weights alone are quantized here, so the float model computes the same."""
    model = load(llama_dir, qt.recipe("torch", weight="int4/group32"), config={"trainable": trainable})
    expected = logits(model)
    model.dequantize()
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)
    assert not hasattr(model.config, "quantization_config")
    assert all(p.requires_grad for p in model.parameters())


def test_modules_to_not_convert(llama_dir: Path) -> None:
    model = load(llama_dir, W4A8, config={"modules_to_not_convert": ["lm_head", "model.layers.0", "*.down_proj"]})
    names = set(qt.quantizers(model))
    assert names == {
        f"model.layers.1.{module}.{role}"
        for module in (*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.up_proj")
        for role in ("weight", "input")
    } | {"model.embed_tokens.weight"}


def test_wrong_use_is_refused(llama_dir: Path, bert_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(qt.ModelError, match=r"no module of LlamaForCausalLM is 'lm_haed'; did you mean 'lm_head'"):
        load(llama_dir, W4A8, config={"modules_to_not_convert": ["lm_haed"]})
    with pytest.raises(qt.ModelError, match="static range, which data decide: load with trainable=True"):
        load(llama_dir, "ort:int8", config={"trainable": False})
    model = load(llama_dir, W4A8)
    with pytest.raises(qt.ModelError, match="is quantized already, for torch"):
        qt.plan(model, "torch")
    integer = integer_model(model)
    with pytest.raises(qt.ModelError, match="an integer model already"):
        integer_model(integer)
    with pytest.raises(qt.ModelError, match="no parameter of the model needs a gradient"):
        qt.parameter_groups(integer, 1e-3, 0.0)
    with pytest.raises(qt.ModelError, match="not calibrated"):
        integer_model(
            AutoModelForTokenClassification.from_pretrained(bert_dir, quantization_config=QatanaConfig("ort:int8"))
        )
    model.save_pretrained(tmp_path)
    with pytest.raises(qt.ModelError, match="attach takes"):
        attach(load(llama_dir))


def test_a_checkpoint_keeps_its_own_recipe(llama_dir: Path, tmp_path: Path) -> None:
    """transformers would warn and load by the checkpoint's; only an equal configuration is no mistake."""
    config = {"modules_to_not_convert": ["lm_head"]}
    model = load(llama_dir, W4A8, config=config)
    model.save_pretrained(tmp_path / "qat")
    integer_model(model).save_pretrained(tmp_path / "integer")
    with pytest.raises(qt.RecipeError, match=r'target: "torch" there, "ort:int4" here.*without quantization_config'):
        load(tmp_path / "qat", "ort:int4")
    with pytest.raises(qt.RecipeError, match=r'rule 2: \{"match": "lm_head", .*\} there, none here'):
        load(tmp_path / "qat", W4A8)
    with pytest.raises(qt.RecipeError, match=r'another recipe .target: "torch" there.*dequantize'):
        load(tmp_path / "integer", "ort:int8")
    with pytest.raises(qt.RecipeError, match=r"is a QAT model: load it without .*integer_model"):
        load(tmp_path / "qat", W4A8, config=config | {"trainable": False})
    with pytest.raises(qt.RecipeError, match="is an integer model, which does not train"):
        load(tmp_path / "integer", W4A8, config=config)
    for name, trainable in (("qat", True), ("integer", False)):
        with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
            again = load(tmp_path / name, W4A8, config=config | {"trainable": trainable})
        assert_same_state(again, load(tmp_path / name))


def test_values_of_a_checkpoint_start_another_recipe(llama_dir: Path, tmp_path: Path) -> None:
    """What the error says: the quantized values are the float weights that the other recipe rounds."""
    load(llama_dir, W4A8).save_pretrained(tmp_path / "qat")
    floats = load(tmp_path / "qat").dequantize()
    floats.save_pretrained(tmp_path / "values")
    other = load(tmp_path / "values", qt.recipe("torch", weight="int8/channel"))
    assert set(qt.quantizers(other))
    for name, parameter in floats.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


def test_a_damaged_plan_is_named(llama_dir: Path, tmp_path: Path) -> None:
    load(llama_dir, W4A8).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"]["plan"]["schemes"] = []
    path.write_text(json.dumps(data))
    with pytest.raises(qt.RecipeError, match="plan in the model's configuration is damaged"):
        load(tmp_path)
    del data["quantization_config"]["plan"]
    path.write_text(json.dumps(data))
    with pytest.raises(qt.RecipeError, match="has no plan"):
        load(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["quant_method"] == "qatana"


def test_a_model_prepared_by_hand_is_saved(llama_dir: Path, tmp_path: Path) -> None:
    model = attach(qt.ptq(load(llama_dir), W4A8, [{"input_ids": ids()}]))
    model.save_pretrained(tmp_path)
    assert_same_state(load(tmp_path), model)
