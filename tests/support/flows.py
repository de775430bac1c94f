"""The flow of a small model, done once per process: plan, prepare, calibrate, two training steps, convert, export.

What these functions return is shared between tests: look at it, do not change it."""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.networks import CASES, images, network
from torch import Tensor, nn

import qatana as qt

_FOLDER = tempfile.TemporaryDirectory(prefix="qatana-tests-")


@dataclass(frozen=True)
class Flow:
    """float_model before, model after training (eval mode), a batch it never saw, and what follows from the model."""

    float_model: nn.Module
    model: nn.Module
    plan: qt.Plan
    batch: Any
    artifact: qt.Artifact

    @property
    def inputs(self) -> dict[str, Any]:
        """The batch as a file takes it."""
        if isinstance(self.batch, Tensor):
            return {"input": self.batch.numpy()}
        return {name: value.numpy() for name, value in self.batch.items()}

    def outputs(self, model: Any) -> Tensor:
        """Logits of the batch from the QAT model, the integer model or the artifact."""
        with torch.no_grad():
            out = model(self.batch) if isinstance(self.batch, Tensor) else model(**self.batch)
        return out if isinstance(out, Tensor) else out["logits"]

    def codes(self) -> dict[str, Tensor]:
        """Codes at every quantizer of the QAT model on the batch, where the tensor is made (its readers may see it pooled or turned)."""
        heard: dict[str, Tensor] = {}
        for quantizer in qt.quantizers(self.model).values():
            quantizer.tap = heard.setdefault
        try:
            self.outputs(self.model)
        finally:
            for quantizer in qt.quantizers(self.model).values():
                quantizer.tap = None
        return heard


def four_bits() -> qt.Recipe:
    """W4A4: signed 4-bit weights per channel, unsigned 4-bit activations."""
    activations = {"format": "uint4"}
    return qt.recipe("ort:int8").rule("*", weight={"format": "int4"}, input=activations, output=activations)


@functools.cache
def cnn(case: str, bits: int = 8) -> Flow:
    """A network of support.networks, W8A8 or W4A4."""
    before, example = network(case), images(case, 3)
    plan = qt.plan(before, qt.recipe("ort:int8") if bits == 8 else four_bits(), example)
    model = qt.prepare(network(case), plan)
    qt.calibrate(model, [images(case, 8, seed) for seed in (5, 6)])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for seed in (7, 8):
        optimizer.zero_grad()
        model(images(case, 8, seed)).square().mean().backward()
        optimizer.step()
    model.eval()
    return Flow(before, model, plan, images(case, 6, seed=9), qt.convert(model))


def bert_batch(seed: int = 0, count: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Token ids, a mask with padding, segment ids."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, length, dtype=torch.int64)
    mask[-1, length // 2 :] = 0
    ids = torch.randint(1, 90, (count, length), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def bert_model() -> nn.Module:
    """A two-layer BERT for token classification with random weights of realistic spread."""
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=96, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64, num_labels=5, initializer_range=0.08,
    )  # fmt: skip
    return BertForTokenClassification(config).eval()


@functools.cache
def bert(target: str) -> Flow:
    """The BERT for one target; learned scales take two steps."""
    before = bert_model()
    recipe = qt.recipe(target).skip("classifier") if target == "ort:int8" else qt.recipe(target)
    plan = qt.plan(before, recipe, bert_batch())
    model = qt.prepare(copy.deepcopy(before), plan)
    qt.calibrate(model, [bert_batch(seed) for seed in (1, 2)])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for seed in (3, 4):
        optimizer.zero_grad()
        model(**bert_batch(seed))["logits"].square().mean().backward()
        optimizer.step()
    model.eval()
    return Flow(before, model, plan, bert_batch(9, count=5, length=17), qt.convert(model))


@functools.cache
def exported(kind: str, bits: int = 8) -> Path:
    """The ONNX file of `cnn(kind, bits)`, or of `bert(kind)` where kind is a target."""
    flow = cnn(kind, bits) if kind in CASES else bert(kind)
    return qt.export(flow.artifact, Path(_FOLDER.name) / f"{kind.replace(':', '-')}-{bits}.onnx")
