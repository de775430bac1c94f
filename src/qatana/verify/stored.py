"""Verification on the free target: its deployed form is the artifact's folder, and it runs in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qatana import hardware
from qatana.artifact import Artifact, sha256
from qatana.batch import split_inputs
from qatana.errors import ArtifactError, DataError
from qatana.numerics.stored import read_back
from qatana.quantizer import Quantizer
from qatana.verify.certificate import Certificate, Comparison
from qatana.verify.qat import QatRun, tensors_of
from qatana.verify.versions import versions


@torch.no_grad()
def verify_stored(
    model: nn.Module | None,
    artifact: Artifact,
    path: Path,
    batches: Iterable[Any],
    progress: Callable[[int], None] | None,
) -> Certificate:
    """The QAT model, its artifact and the folder that it was saved to: tensors, weights as they read back, and outputs, all of them: labels
    of padding count here, too."""
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: target '{artifact.target}' is deployed as a folder; give the one that artifact.save(folder) wrote"
        )
    deployed = Artifact.load(path)
    constants = Comparison("artifact", path.name, "constants", "constants")
    training = Comparison("QAT model", "integer model", "training", "training")
    end = Comparison("integer model", path.name, "end to end", "end to end, integers only", "torch")
    _compare_tensors(artifact.tensors, deployed.tensors, constants)
    if model is not None:
        _compare_weights(model, artifact, training)
    qat = None if model is None else QatRun(model)
    seen = 0
    for batch in batches:
        _step(batch, qat, artifact, deployed, training, end)
        seen += 1
        if progress is not None:
            progress(seen)
    if not seen:
        raise DataError("verify got no batch; check the data path, the split and the batch size")
    file = path / "model.safetensors"
    facts = {"path": path.name, "sha256": sha256(file), "bytes": file.stat().st_size}
    comparisons = [constants, *([training] if qat is not None else []), end]
    return Certificate(
        artifact.target, "torch", dict(hardware.describe()), versions(), facts, comparisons, batches=seen
    )


def _step(
    batch: Any, qat: QatRun | None, artifact: Artifact, deployed: Artifact, training: Comparison, end: Comparison
) -> None:
    args, kwargs = split_inputs(batch)
    names = [x["name"] for x in artifact.config["inputs"]]
    kwargs = {name: kwargs[name] for name in names if name in kwargs}
    args = args[: len(names) - len(kwargs)]
    if len(args) + len(kwargs) < len(names):
        raise DataError(f"a batch lacks inputs of the integer model, which takes {', '.join(names)}")
    ours, theirs = (tensors_of(run(*args, **kwargs)) for run in (artifact, deployed))
    _compare(end, ours, theirs)
    if qat is not None:
        _compare(training, qat(args, kwargs), ours)


def _compare(comparison: Comparison, left: list[Tensor], right: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        comparison.tally(f"output {i}", "output").compare(a.float(), b.float())
        if a.is_floating_point() and a.ndim in (2, 3) and a.shape[-1] > 1:
            comparison.labels_compared += a[..., 0].numel()
            comparison.labels_different += int((a.argmax(-1) != b.argmax(-1)).sum())


def _compare_tensors(left: dict[str, Tensor], right: dict[str, Tensor], out: Comparison) -> None:
    for name, ours in left.items():
        tally, theirs = out.tally(name, "tensor"), right.get(name)
        if theirs is None or theirs.dtype != ours.dtype:
            tally.missing(ours.numel())
        else:
            tally.compare(ours.float(), theirs.float())


def _compare_weights(model: nn.Module, artifact: Artifact, out: Comparison) -> None:
    """Weights as training sees them now against those that the artifact's codes read back to."""
    tensors = artifact.tensors
    stored = {str(node.args[-1]): node for node in artifact.operators() if "read_back" in str(node.target)}
    for layer in model.modules():
        quantizer = getattr(layer, "weight_quantizer", None)
        if not isinstance(quantizer, Quantizer) or quantizer.name not in stored:
            continue
        module: Any = layer
        ours = quantizer(module.folded()[0] if hasattr(layer, "folded") else module.weight)
        codes, parameters, *rest = stored[quantizer.name].args[-5:]  # rows of a table: their ids stand before
        given: Any = [tensors[str(node.target)] for node in parameters]  # type: ignore[union-attr]
        theirs = read_back(tensors[str(codes.target)], given, *rest)  # type: ignore[union-attr]
        out.tally(quantizer.name, "weight").compare(ours.float().cpu(), theirs.to(ours.dtype).float())
