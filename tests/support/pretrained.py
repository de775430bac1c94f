"""Tiny models on disk and what tests of from_pretrained do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.llama import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForTokenClassification

import qatana as qt
from qatana.integrations.huggingface import QatanaConfig

W4A8 = {"target": "torch", "rules": [{"schemes": {"weight": "int4/group32 sym learned mse", "input": "int8/token"}}]}


def write_llama(folder: Path) -> Path:
    """Two layers, tied embeddings, 96 ids."""
    torch.manual_seed(1)
    tiny_llama(tied=True, layers=2).save_pretrained(folder)
    return folder


def write_bert(folder: Path) -> Path:
    """Two layers, 60 ids, 5 labels, dropout."""
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, num_labels=5,
        max_position_embeddings=32,
    )  # fmt: skip
    BertForTokenClassification(config).save_pretrained(folder)
    return folder


def ids(size: int = 96, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(0, size, (batch, 9), generator=torch.Generator().manual_seed(seed))


def load(folder: Path, recipe: Any = None, **kwargs: Any) -> Any:
    options = {} if recipe is None else {"quantization_config": QatanaConfig(recipe, **kwargs.pop("config", {}))}
    return AutoModelForCausalLM.from_pretrained(folder, **options, **kwargs)


def step(model: Any, rate: float = 1e-2) -> None:
    """One training step on random ids."""
    model.train()
    optimizer = torch.optim.SGD(qt.parameter_groups(model, rate, 0.0))
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def assert_same_state(a: Any, b: Any) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@torch.no_grad()
def logits(model: Any, given: Tensor | None = None) -> Tensor:
    return model(ids() if given is None else given).logits


def codes(model: Any) -> dict[str, Tensor]:
    """All codes of one forward pass, by quantizer."""
    found: dict[str, Tensor] = {}
    for quantizer in qt.quantizers(model).values():
        quantizer.tap = found.__setitem__
    logits(model)
    for quantizer in qt.quantizers(model).values():
        quantizer.tap = None
    return found
