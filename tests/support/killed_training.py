"""A Trainer that is killed in the middle of a step, run as a program: python killed_training.py MODEL_FOLDER OUTPUT_FOLDER."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForTokenClassification, Trainer, TrainerCallback, TrainingArguments

import qatana as qt
from qatana.integrations.huggingface import QatanaCallback, QatanaConfig

STEPS, SAVED, KILLED = 8, 4, 6


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Random sentences of 12 ids."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(4)
        self.ids = torch.randint(0, 60, (40, 12), generator=generator)
        self.labels = torch.randint(0, 5, (40, 12), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Kill(TrainerCallback):
    """kill -9, between two checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(model_folder: Path, output: Path, callbacks: tuple[TrainerCallback, ...] = ()) -> Trainer:
    """Dropout is on; ranges are observed, followed, then frozen; scales of the recipe are partly learned."""
    torch.manual_seed(0)
    recipe = qt.recipe("ort:int8").rule("*.layer.0.*", "Linear", weight={"scale": "learned"})
    model = AutoModelForTokenClassification.from_pretrained(model_folder, quantization_config=QatanaConfig(recipe))
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=STEPS, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=SAVED,
        learning_rate=1e-3, logging_steps=1, use_cpu=True, disable_tqdm=True, report_to=[], dataloader_pin_memory=False, seed=3,
    )  # fmt: skip
    ours = QatanaCallback(float_steps=2, freeze_ranges_at=7)
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[ours, *callbacks])  # type: ignore[arg-type]


if __name__ == "__main__":
    trainer(Path(sys.argv[1]), Path(sys.argv[2]), (Kill(),)).train()
