"""TRL's SFTTrainer trains adapters inside the quantizers of a QAT model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretrained import W4A8, codes, load, logits, write_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Trainer

import qatana as qt
from qatana.integrations.huggingface import QatanaCallback, add_lora, integer_model

peft = pytest.importorskip("peft", reason='pip install "qatana[lora]"')
trl = pytest.importorskip("trl", reason='pip install "qatana[lora]"')
datasets = pytest.importorskip("datasets", reason='pip install "qatana[lora]"')
pytestmark = [
    # TRL 1.16 and PEFT 0.21 still call what transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning"),
]
WORDS = ("<pad>", "</s>", "<unk>", "the", "sea", "is", "deep", "and", "blue", "bread", "warm")


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


class OwnLoss(trl.SFTTrainer):
    """With the loss that the model computes itself, from its logits."""

    compute_loss = Trainer.compute_loss


def trainer(folder: Path, float_head: bool, kind: Any = trl.SFTTrainer) -> Any:
    """Two steps of adapters of rank 4, as TRL does it by default (gradient checkpointing)."""
    skipped = {"modules_to_not_convert": ["lm_head"]} if float_head else {}
    model = load(write_llama(folder / "llama"), W4A8, config=skipped)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights="gaussian")
    arguments = trl.SFTConfig(
        output_dir=str(folder / "out"), max_steps=2, per_device_train_batch_size=4, learning_rate=3e-2, logging_steps=1, use_cpu=True,
        bf16=float_head, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, save_strategy="no",
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"text": "the sea is deep and blue"}, {"text": "the bread is warm"}] * 8)
    return kind(
        add_lora(model, config), arguments, train_dataset=rows, processing_class=tokenizer(), callbacks=[QatanaCallback()]
    )  # fmt: skip


@pytest.mark.parametrize("float_head", [False, True], ids=["quantized head", "float head, bfloat16"])
def test_sft_trains_the_integers_that_ship(float_head: bool, tmp_path: Path) -> None:
    """Merging keeps every code; the integer model computes what was trained."""
    run = trainer(tmp_path, float_head, trl.SFTTrainer if float_head else OwnLoss)
    before = logits(run.model.eval())
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False).eval()
    unmerged, seen = logits(model), codes(model)
    assert not torch.equal(unmerged, before)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), unmerged)
    after = codes(merged)
    assert set(after) == set(seen)
    assert [name for name, tensor in after.items() if not torch.equal(seen[name], tensor)] == []
    assert torch.equal(logits(integer_model(merged)), unmerged)


def test_a_loss_past_the_quantizers_of_the_head_is_an_error(tmp_path: Path) -> None:
    """TRL's own loss multiplies by lm_head.weight."""
    with pytest.raises(qt.ModelError, match="output head is quantized and did not run"):
        trainer(tmp_path, float_head=False).train()
