"""LoRA inside the quantizer: merged and unmerged models have the same codes; the Trainer takes the wrapped model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretrained import W4A8, assert_same_state, codes, ids, load, logits, write_llama
from transformers import Trainer, TrainingArguments

import qatana as qt
from qatana.integrations.huggingface import QatanaCallback, add_lora, integer_model

peft = pytest.importorskip("peft", reason='pip install "peft"')
pytestmark = [
    # transformers 5.23 and PEFT 0.21: each still calls what the other has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def trained(llama_dir: Path, folder: Path, recipe: Any = W4A8) -> Any:
    """Three steps of the Trainer on adapters of rank 4."""
    model = add_lora(
        load(llama_dir, recipe), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian")
    )
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, learning_rate=3e-2, use_cpu=True, disable_tqdm=True,
        report_to=[], dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in ids(batch=16)]
    Trainer(model, arguments, train_dataset=rows, callbacks=[QatanaCallback()]).train()  # type: ignore[arg-type]
    return model.eval()


DYNAMIC = {"target": "torch", "rules": [{"schemes": {"weight": "int4/group32 sym dynamic", "input": "int8/token"}}]}


@pytest.mark.parametrize("recipe", [W4A8, DYNAMIC], ids=["learned", "dynamic"])
def test_merging_loses_nothing(recipe: Any, llama_dir: Path, tmp_path: Path) -> None:
    model = trained(llama_dir, tmp_path, recipe)
    before, unmerged = logits(load(llama_dir, recipe)), logits(model)
    assert not torch.equal(unmerged, before)
    seen = codes(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), unmerged)
    after = codes(merged)
    assert set(after) == set(seen)
    for name, tensor in after.items():
        assert torch.equal(seen[name], tensor), name
    merged.save_pretrained(tmp_path / "merged")
    assert_same_state(load(tmp_path / "merged"), merged)
    assert torch.equal(logits(integer_model(merged)), unmerged)


def test_only_adapters_train(llama_dir: Path) -> None:
    model = add_lora(load(llama_dir, W4A8), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="gaussian"))
    model.train()
    model(ids(), labels=ids()).loss.backward()
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trains)
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given == trains
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if "lora_B" in name and p.grad is not None)


def test_adapters_are_saved_and_come_back(llama_dir: Path, tmp_path: Path) -> None:
    model = trained(llama_dir, tmp_path)
    model.save_pretrained(tmp_path / "adapter")
    base = load(llama_dir, W4A8)
    again = add_lora(base, peft.LoraConfig.from_pretrained(tmp_path / "adapter"))
    again.load_adapter(str(tmp_path / "adapter"), "default")
    assert torch.equal(logits(again.eval()), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(llama_dir, W4A8)))


def test_what_has_no_place_inside_a_weight_is_refused(llama_dir: Path) -> None:
    with pytest.raises(qt.RecipeError, match=r"lora_dropout=0\.1 drops inputs"):
        add_lora(load(llama_dir, W4A8), peft.LoraConfig(target_modules=TARGETS, lora_dropout=0.1))
    with pytest.raises(qt.RecipeError, match="no DoRA"):
        add_lora(load(llama_dir, W4A8), peft.LoraConfig(target_modules=TARGETS, use_dora=True))
    with pytest.raises(qt.ModelError, match="no quantized linear layer that trains"):
        add_lora(load(llama_dir, W4A8, config={"trainable": False}), peft.LoraConfig(target_modules=TARGETS))
