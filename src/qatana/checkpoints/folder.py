"""Tensors and config.json of a Hugging Face folder: one safetensors file or several, with or without an index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qatana.errors import ArtifactError
from qatana.files import read_json

INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; empty where there is none. Raises: ArtifactError if it is no object or qatana's own."""
    if not (folder / "config.json").is_file():
        return {}
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder}/config.json is no JSON object; take the one that the model was saved with")
    if str(config.get("format", "")).startswith("qatana"):
        raise ArtifactError(f"{folder} was written by qatana.convert; read it with qatana.Artifact.load")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor by name. Raises: ArtifactError for missing or truncated files and for names that stand in two."""
    tensors: dict[str, Tensor] = {}
    for file in _files(folder):
        for name, tensor in read_safetensors(file).items():
            if name in tensors:
                raise ArtifactError(
                    f"{folder}: '{name}' stands in two files; remove those that are no part of this model"
                )
            tensors[name] = tensor
    missing = sorted(set(_index(folder)) - set(tensors))
    if missing:
        raise ArtifactError(f"{folder}/{INDEX} names '{missing[0]}', which no file holds; copy the folder again")
    return tensors


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    try:
        with safe_open(str(file), "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{file} is truncated, missing or not safetensors ({error}); copy or save it again"
        ) from error


def _files(folder: Path) -> list[Path]:
    """What the index names; without one, every *.safetensors."""
    named = sorted(set(_index(folder).values()))
    files = [folder / name for name in named] or sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if found := sorted(folder.glob("*.gguf")):
        raise ArtifactError(f"{folder} holds GGUF files; read one of them: {found[0]}")
    if pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise ArtifactError(
            f"{pickled[0]} is a pickle, which qatana does not open; save the model as safetensors (save_pretrained does)"
        )
    raise ArtifactError(f"{folder} has no *.safetensors; give the folder that save_pretrained wrote, or a .gguf file")


def _index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, of the index; empty where there is none."""
    if not (folder / INDEX).is_file():
        return {}
    data = read_json(folder / INDEX)
    index = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(file, str) for file in index.values()):
        raise ArtifactError(f"{folder}/{INDEX} has no weight_map of file names; copy it again")
    for file in index.values():
        if Path(file).name != file:
            raise ArtifactError(f"{folder}/{INDEX} names '{file}', which is outside the folder; it was not saved so")
    return index
