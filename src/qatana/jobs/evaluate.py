"""Running a model on the test part: PyTorch modules and deployed files behind one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qatana as qt
from qatana.batch import split_inputs
from qatana.jobs.progress import Progress
from qatana.jobs.tasks import Predictions, Task


class Runner(ABC):
    """Something that turns a batch into logits (batch, ..., classes)."""

    @abstractmethod
    def __call__(self, batch: Any) -> Tensor: ...


class TorchRunner(Runner):
    """A module in eval mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def __call__(self, batch: Any) -> Tensor:
        args, kwargs = split_inputs(batch, self.model)
        out = self.model(*args, **kwargs)
        return out["logits"] if hasattr(out, "items") else out


class ArtifactRunner(Runner):
    """An artifact: integers and their graph, run by PyTorch."""

    def __init__(self, path: str | Path) -> None:
        self.artifact = qt.Artifact.load(path)

    @torch.inference_mode()
    def __call__(self, batch: Any) -> Tensor:
        args, kwargs = split_inputs(batch)
        out = self.artifact(*args, **kwargs)
        return out if isinstance(out, Tensor) else out[0]


class FileRunner(Runner):
    """A deployed file in an engine ("onnxruntime", "openvino"). threads None: the engine's default."""

    def __init__(self, path: str | Path, engine: str, threads: int | None = None) -> None:
        self.session = qt.open_file(path, engine, threads=threads)

    def __call__(self, batch: Any) -> Tensor:
        if isinstance(batch, Mapping):
            feeds = batch
        else:
            tensors = (batch,) if isinstance(batch, Tensor) else batch
            feeds = dict(zip(self.session.inputs, tensors, strict=False))
        return torch.from_numpy(self.session.run(feeds)[self.session.outputs[0]])


def predict(runner: Runner, task: Task, batch_size: int, progress: Progress, what: str) -> Predictions:
    """What the task keeps of the outputs on the whole test part, in the order of the file."""
    loader = task.test(batch_size)
    parts = [task.read(runner(batch), batch) for batch in progress.over(what, loader, len(loader))]
    return task.gather(parts, batch_size)
