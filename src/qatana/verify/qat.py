"""The QAT model's side: codes at every quantizer in one forward pass in eval mode, and the weight codes that it trains on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qatana.artifact import Artifact
from qatana.batch import evaluating, move
from qatana.errors import ModelError
from qatana.numerics import IntFormat, unpack
from qatana.quantizer import Quantizer, quantizers
from qatana.verify.certificate import Comparison
from qatana.verify.onnx_graph import arguments_of

Records = dict[str, list[Tensor]]


class QatRun:
    """Runs a QAT model batch by batch. After a call, `records` holds the codes of each quantizer of activations, in order."""

    def __init__(self, model: nn.Module) -> None:
        found = quantizers(model)
        if not found:
            raise ModelError("the model has no quantizers; verify takes the model that qatana.prepare returned")
        off = [name for name, quantizer in found.items() if not quantizer.enabled]
        if off:
            raise ModelError(f"quantizer '{off[0]}' is off; calibrate the model or switch it on before verifying")
        self.model = model
        self.activations = {name: q for name, q in found.items() if not q.is_weight}
        self.records: Records = {}

    @torch.no_grad()
    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Outputs as a list of tensors (of a Hugging Face output: the logits), on the CPU."""
        self.records = {}
        device = next(self.model.parameters()).device
        args, kwargs = move((args, kwargs), device)
        with evaluating(self.model), self._listening():
            return [x.detach().cpu() for x in tensors_of(self.model(*args, **kwargs))]

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def tap(name: str, codes: Tensor) -> None:
            self.records.setdefault(name, []).append(codes.cpu())

        for quantizer in self.activations.values():
            quantizer.tap = tap
        try:
            yield
        finally:
            for quantizer in self.activations.values():
                quantizer.tap = None

    def produced(self, name: str, uses: int) -> list[Tensor]:
        """The records that made the tensors of a quantizer, one for each of its `uses` in the integer graph.

        A shared quantizer records the tensor again wherever it is read; the first record of each use is the one that made it.
        Empty if the records do not divide among the uses."""
        records = self.records.get(name, [])
        if not uses or not records or len(records) % uses:
            return []
        return records[:: len(records) // uses]


def tensors_of(out: Any) -> list[Tensor]:
    """What the integer model returns of the same output: logits of a Hugging Face output (else its first tensor), or the tensors."""
    if isinstance(out, Tensor):
        return [out]
    if hasattr(out, "items"):
        return [out["logits"] if "logits" in out else next(v for v in out.values() if isinstance(v, Tensor))]
    return [x for item in out for x in tensors_of(item)] if isinstance(out, (list, tuple)) else []


@torch.no_grad()
def compare_weights(model: nn.Module, artifact: Artifact, out: Comparison) -> None:
    """Weight codes of the QAT model as it is now against the artifact's."""
    bits = _packed_bits(artifact)
    tensors = artifact.tensors
    for layer in model.modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if not isinstance(quantizer, Quantizer):
            continue
        module: Any = layer
        levels, scale = quantizer.weight_levels(module.folded()[0] if hasattr(layer, "folded") else module.weight)
        tally = out.tally(quantizer.name, "weight")
        stored = tensors.get(quantizer.name)
        if stored is None:
            tally.missing(levels.numel())
            continue
        if quantizer.name in bits:
            width = bits[quantizer.name]
            stored = unpack(stored, stored.shape[-1] * 8 // width, IntFormat(width, signed=False)).to(
                torch.int16
            ) - 2 ** (width - 1)
        tally.compare(levels.cpu().to(torch.int16).reshape(-1), stored.to(torch.int16).reshape(-1))
        stored_scale = tensors.get(f"{quantizer.name}_scale")
        if stored_scale is not None:
            ours = scale.detach().float().cpu().reshape(-1)
            out.tally(f"{quantizer.name}_scale", "weight").compare(
                ours.expand(stored_scale.numel()), stored_scale.reshape(-1)
            )


def _packed_bits(artifact: Artifact) -> dict[str, int]:
    """Tensor name -> bits, for weights that are packed below 8 bits."""
    found: dict[str, int] = {}
    for node in artifact.operators():
        arguments = arguments_of(node)
        weight = arguments.get("weight", arguments.get("table"))
        if isinstance(weight, fx.Node) and int(arguments.get("bits", 8)) < 8:
            found[str(weight.target)] = int(arguments["bits"])
    return found
