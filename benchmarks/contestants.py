"""Who takes part in the comparison of training steps: the float model, qatana by several recipes, and the peers.

Everything that needs qatana or a peer is imported where a contestant is made, in a process of its own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.models import Shape

FLOAT, BFLOAT16 = "float32", "bfloat16"
W8A8, W8A8_BFLOAT16 = "qatana-w8a8", "qatana-w8a8-bfloat16"
LAYERS, LAYERS_BFLOAT16 = "qatana-w8a8-layers", "qatana-w8a8-layers-bfloat16"
W4A8, W4 = "qatana-w4a8", "qatana-w4"
BLOCK = 128


@dataclass(frozen=True)
class Contestant:
    """name      on the command line and in the results;   title  in tables
    quantize   "" (float), "qatana", or the name of the peer, a module of benchmarks.peers
    recipe     of qatana: see `_recipe`;   autocast  the forward pass runs under torch.autocast of bfloat16"""

    name: str
    title: str
    quantize: str = ""
    recipe: str = ""
    autocast: bool = False

    @property
    def peer(self) -> bool:
        """Whether it lives in an environment of its own."""
        return self.quantize not in ("", "qatana")


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(FLOAT, "float32"),
        Contestant(BFLOAT16, "bfloat16 autocast", autocast=True),
        Contestant(W8A8, "qatana W8A8", "qatana", "w8a8"),
        Contestant(W8A8_BFLOAT16, "qatana W8A8, bfloat16 gradients", "qatana", "w8a8", autocast=True),
        Contestant(LAYERS, "qatana W8A8, layers alone", "qatana", "w8a8-layers"),
        Contestant(
            LAYERS_BFLOAT16, "qatana W8A8, layers alone, bfloat16 gradients", "qatana", "w8a8-layers", autocast=True
        ),
        Contestant(W4A8, f"qatana W4A8, blocks of {BLOCK}", "qatana", "w4a8"),
        Contestant(W4, f"qatana W4, blocks of {BLOCK}", "qatana", "w4"),
        Contestant("torchao", "torchao W8A8", "torchao"),
        Contestant("quanto", "quanto W8A8", "quanto"),
        Contestant("brevitas", "Brevitas W8A8", "brevitas"),
        Contestant("modelopt", "Model Optimizer W8A8", "modelopt"),
        Contestant("nncf", "NNCF W8A8", "nncf"),
        Contestant("aimet", "AIMET W8A8", "aimet"),
    )
}


def quantized(contestant: Contestant, shape: Shape, name: str) -> tuple[nn.Module, str]:
    """The model of a contestant, ready to train, and a remark on it.   name: of the shape ("bert", "llama", "resnet")."""
    model, batch = shape.make(), shape.batch(1)
    if not contestant.quantize:
        return model, ""
    if contestant.quantize == "qatana":
        return _qatana(model, contestant.recipe, shape, batch)
    peer: Any = importlib.import_module(f"benchmarks.peers.{contestant.quantize}")
    return peer.prepare(model, batch, shape.head, name)


def _qatana(model: nn.Module, recipe: str, shape: Shape, batch: Any) -> tuple[nn.Module, str]:
    import qatana as qt

    plan = qt.plan(model, _recipe(recipe).skip(shape.head), batch)
    model = qt.prepare(model, plan)
    qt.calibrate(model, [batch])
    return model, f"{len(plan.quantized)} of {len(plan.rows)} tensors quantized"


def _recipe(name: str) -> Any:
    """w8a8         static, every operator that ONNX Runtime computes in integers
    w8a8-layers  what the peers quantize: Linears, 8-bit weights per row, inputs with a scale per token; convolutions' weights per channel
                 and inputs per tensor; embeddings
    w4a8         the same with 4-bit weights in blocks (convolutions': per channel), embeddings in float
    w4           4-bit weights in blocks (convolutions': per channel), nothing else"""
    import qatana as qt

    if name == "w8a8":
        return qt.recipe("ort:int8")
    eight = name == "w8a8-layers"
    linear, conv = ("int8/channel", "int8/channel") if eight else (f"int4/group{BLOCK}", "int4/channel")
    per_token, per_tensor = ({}, {}) if name == "w4" else ({"input": "int8/token"}, {"input": "int8"})
    found = qt.recipe("torch").rule(type="Linear", weight=linear, **per_token)
    found = found.rule(type="Conv*", weight=conv, **per_tensor)
    return found.rule(type="Embedding", weight="int8/channel" if eight else None)


def autocast(contestant: Contestant) -> torch.dtype | None:
    return torch.bfloat16 if contestant.autocast else None
