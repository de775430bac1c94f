"""Tensors to safetensors files and back, with errors in one line and never half a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatana.errors import ArtifactError, ModelError, nearest
from qatana.files import replacing


def save_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors; tied ones are stored once per name. The old file stays until the new one is whole.

    Raises: ArtifactError if the folder is not writable or the disk is full."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read a safetensors file.   Raises: ArtifactError if it is missing, truncated or something else."""
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(
            f"{path} is missing, truncated or no safetensors file ({reason}); delete it or give another"
        ) from error


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Load a state_dict from a safetensors file into a model, every tensor of it.

    Raises: ModelError naming the first tensor that is missing, unknown or of another shape."""
    saved, own = load_tensors(path), model.state_dict()
    for name in own:
        if name not in saved:
            raise ModelError(
                f"{path} has no tensor '{name}' of {type(model).__name__}{nearest(name, list(saved)[:50])}"
            )
    for name, tensor in saved.items():
        if name not in own:
            raise ModelError(f"{path}: {type(model).__name__} has no tensor '{name}'; give the weights of this network")
        if tensor.shape != own[name].shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[name].shape)} in the model"
            raise ModelError(f"{path}: '{name}' is {shapes}; give weights of the same size")
    model.load_state_dict(saved)
    return model


def check_weights(model: nn.Module) -> None:
    """Raises: ModelError naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"parameter '{name}' holds NaN or infinite values; give other weights or train again")
