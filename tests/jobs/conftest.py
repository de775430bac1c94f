"""A job that runs in seconds: a BERT of two small layers with random weights, on 64 real sentences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

SENTENCES = 64
TRAINING: dict[str, Any] = {"steps": 3, "lr": 1e-3, "distillation": 0.5, "checkpoint_every": 1}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, minilm_dir: Path) -> Path:
    """Folder of a BERT with 2 layers of width 32 and MiniLM's tokenizer."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-bert")
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
    )
    BertModel(config).save_pretrained(folder)
    for file in minilm_dir.glob("*"):
        if file.name.startswith(("tokenizer", "vocab", "special_tokens")):
            shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture(scope="session")
def sentences(tmp_path_factory: pytest.TempPathFactory, conll_dir: Path) -> Path:
    """A CoNLL file with the first 64 sentences of the training part."""
    parts = (conll_dir / "train.txt").read_text(encoding="utf-8").split("\n\n")
    path = tmp_path_factory.mktemp("conll") / "sentences.txt"
    path.write_text("\n\n".join(parts[: SENTENCES + 1]) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tiny(tiny_model: Path, sentences: Path) -> dict[str, Any]:
    """The job as plain data: one recipe, ONNX Runtime, 3 steps of everything."""
    return {
        "name": "tiny",
        "task": "token-classification",
        "model": str(tiny_model),
        "data": {"train": str(sentences), "test": str(sentences)},
        "float": {"training": {"steps": 4, "lr": 1e-3, "checkpoint_every": 1}, "batch_size": 16},
        "recipes": [
            {
                "name": "int8",
                "recipe": "ort:int8",
                "calibration": {"batches": 2, "batch_size": 16},
                "training": dict(TRAINING),
                "batch_size": 16,
            }
        ],
        "engines": ["onnxruntime"],
        "evaluation": {"batch_size": 32, "verify_batches": 1},
        "benchmark": {"batch": 2, "sequence": 32, "rounds": 3},
    }


@pytest.fixture
def tiny_file(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """The same as a YAML file whose output is a folder beside it."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny | {"output": str(tmp_path / "run")}), encoding="utf-8")
    return path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)
