"""Inputs for an artifact that comes without a job: from a safetensors file, or drawn at random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qatana as qt
from qatana.errors import DataError, nearest
from qatana.jobs.weights import load_tensors

BATCHES, BATCH, SEQUENCE = 4, 4, 32
TOKENS = 1000
"""Random token ids lie below this number: every vocabulary has as many."""


def batches_for(artifact: qt.Artifact, path: Path | None) -> list[dict[str, Tensor]]:
    """Batches by input name. From a file: its tensors, one per input, as one batch. Without one: four random batches.

    Raises: DataError if the file lacks an input."""
    if path is None:
        generator = torch.Generator().manual_seed(0)
        return [_random(artifact, generator) for _ in range(BATCHES)]
    tensors = load_tensors(path)
    for entry in artifact.config["inputs"]:
        if entry["name"] not in tensors:
            raise DataError(
                f"{path} has no tensor '{entry['name']}', an input of the artifact{nearest(entry['name'], tensors)}"
            )
    return [{entry["name"]: tensors[entry["name"]] for entry in artifact.config["inputs"]}]


def _random(artifact: qt.Artifact, generator: torch.Generator) -> dict[str, Tensor]:
    entries: list[dict[str, Any]] = artifact.config["inputs"]
    examples = artifact.example_inputs(BATCH, SEQUENCE)
    return {entry["name"]: _values(entry["name"], x, generator) for entry, x in zip(entries, examples, strict=True)}


def _values(name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal floats; token ids for inputs called ids; other integers (masks, token types) as the example has them."""
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.randint(0, TOKENS, x.shape, generator=generator, dtype=x.dtype) if name == "input_ids" else x
