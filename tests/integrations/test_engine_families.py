"""from_pretrained for engines: GPT-2's Conv1D, experts, convolutions. What stays float says why; all else is on integers, to the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import qatana as qt
from qatana.integrations.huggingface import QatanaCallback, QatanaConfig, add_lora, example_inputs, integer_model

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TARGETS = ["ort:int8", "openvino:int8"]


def gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config)


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(vocab_size=60, num_key_value_heads=1, num_local_experts=4, **SIZE))


def vit() -> Any:
    return hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **SIZE))


def resnet() -> Any:
    sizes = {"embedding_size": 16, "hidden_sizes": [16], "depths": [1], "layer_type": "basic", "image_size": 32}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))


def logits(model: Any, batch: dict[str, Any] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(batch or example_inputs(model))).logits


def trained(make: Any, target: str, folder: Path) -> Any:
    """Loaded with a configuration, calibrated, after one step of the Trainer."""
    torch.manual_seed(0)
    model = make()
    kind = type(model)
    model.save_pretrained(folder)
    model = kind.from_pretrained(folder, quantization_config=QatanaConfig(target))
    batch = example_inputs(model)
    labels = batch.get("input_ids", torch.arange(2))
    qt.calibrate(model, [batch])
    data = [
        {name: x[i] for name, x in batch.items() if isinstance(x, Tensor)} | {"labels": labels[i]} for i in range(2)
    ]
    options = TrainingArguments(
        str(folder / "trainer"), max_steps=1, per_device_train_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, options, train_dataset=data, callbacks=[QatanaCallback()]).train()  # type: ignore[arg-type]
    return model.eval()


def floats(model: Any) -> dict[str, str]:
    return {row.name: row.reason for row in model.qatana_plan.rows if row.scheme is None and row.role == "weight"}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("make", [gpt2, mixtral, vit, resnet])
def test_integers_come_back(make: Any, target: str, tmp_path: Path) -> None:
    model = trained(make, target, tmp_path)
    expected = {
        mixtral: {
            "model.layers.0.mlp.experts.gate_up_proj.weight": f"{target} has no integer kernel for MixtralExperts",
            "model.layers.0.mlp.experts.down_proj.weight": f"{target} has no integer kernel for MixtralExperts",
            "model.layers.0.mlp.gate.weight": "a bare parameter of MixtralTopKRouter, float unless qatana.register_layer names it",
        },
        resnet: {
            f"{name}.weight": f"BatchNorm follows, which {target} folds into it by graph: plan(..., mode='graph')"
            for name, module in resnet().named_modules()
            if isinstance(module, nn.Conv2d)
        },
    }  # fmt: skip
    assert floats(model) == expected.get(make, {})
    integer = integer_model(model)
    assert torch.equal(logits(integer), logits(model))
    for name, each in (("qat", model), ("integer", integer)):
        each.save_pretrained(tmp_path / name)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / name)), logits(model)), name


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("make", [gpt2, vit])
def test_onnxruntime_computes_the_trained_integers(make: Any, tmp_path: Path) -> None:
    model = trained(make, "ort:int8", tmp_path)
    batch = example_inputs(model)
    artifact = qt.convert(model, batch)
    qt.export(artifact, tmp_path / "model.onnx")
    qt.verify(model, artifact, tmp_path / "model.onnx", [batch]).raise_on_difference()


def test_experts_of_an_engine_have_no_graph(tmp_path: Path) -> None:
    model = mixtral()
    batch = example_inputs(model)
    model = qt.calibrate(qt.prepare(model, qt.plan(model, "ort:int8", batch)), [batch])
    with pytest.raises(
        qt.ModelError, match=r"mlp.experts calls 'transformers\..*that no artifact holds.*target 'torch'"
    ):
        qt.convert(model)


def test_an_integer_layer_answers_for_its_float_weight(tmp_path: Path) -> None:
    """ViT casts pixels to the type of its projection's weight: codes there would cut them to integers."""
    torch.manual_seed(0)
    model = vit()
    batch = example_inputs(model)
    model = qt.calibrate(qt.prepare(model, qt.plan(model, "ort:int8", batch)), [batch])
    name = "vit.embeddings.patch_embeddings.projection"
    layer: Any = model.get_submodule(name)
    integer: Any = qt.integer_model(model).get_submodule(name)
    assert integer.weight.dtype == torch.float32
    assert torch.equal(integer.weight, layer.weight_quantizer(layer.weight))
    assert integer.state_dict()["weight"].dtype == torch.int8


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"
)  # PEFT asks transformers for it
def test_adapters_lie_inside_conv1d() -> None:
    """W (K, N) + (B A)^T, whatever the configuration says of the layer: PEFT knows Conv1D, not what stands for it."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = gpt2()
    batch = example_inputs(model)
    model = qt.calibrate(qt.prepare(model, qt.plan(model, "ort:int8", batch)), [batch]).eval()
    before = logits(model)
    adapted = add_lora(model, peft.LoraConfig(target_modules=["c_attn", "c_proj"], r=4))
    assert torch.equal(logits(adapted, batch), before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    moved = logits(adapted, batch)
    assert not torch.equal(moved, before)
    assert torch.equal(logits(adapted.merge_and_unload()), moved)
