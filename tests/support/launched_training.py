"""A Trainer that `accelerate launch` runs in two processes: python -m support.launched_training MODEL_FOLDER OUTPUT_FOLDER."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from support.killed_training import Rows
from transformers import AutoModelForTokenClassification, Trainer, TrainingArguments

import qatana as qt
from qatana.integrations.huggingface import QatanaCallback, QatanaConfig

STEPS, FLOAT_STEPS, FROZEN_AT, BATCH = 5, 2, 4, 4


def main(model_folder: Path, output: Path) -> None:
    """Linears alone are quantized and the embeddings stand still, so that what enters the first layer is known from its ids."""
    inputs = {"format": "int8", "range": "moving_average"}
    recipe = qt.recipe("torch").rule(type="Linear", weight="int8/channel", input=inputs)
    recipe = recipe.rule("*.layer.1.*", "Linear", weight={"scale": "learned"}).skip("*embeddings*")
    model: Any = AutoModelForTokenClassification.from_pretrained(
        model_folder,
        quantization_config=QatanaConfig(recipe),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model.bert.embeddings.requires_grad_(False)
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=1e-3, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=3,
    )  # fmt: skip
    ours = QatanaCallback(float_steps=FLOAT_STEPS, freeze_ranges_at=FROZEN_AT)
    Trainer(model, arguments, train_dataset=Rows(), callbacks=[ours]).train()
    rank = dist.get_rank()
    save_file(model.state_dict(), output / f"{rank}.safetensors")
    save_file({"ids": torch.stack(seen)}, output / f"{rank}-ids.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
