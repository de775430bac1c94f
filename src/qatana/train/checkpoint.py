"""Checkpoints of `fit`: two safetensors files and a JSON file, written whole or not at all, never unpickled.

model.safetensors     every parameter and buffer of the model, tied ones once
training.safetensors  optimizer.<i>.<key>; start.<quantizer>: scales when training began;
                      random.<when>.<generator>
state.json            step, position in the data, schedule, optimizer groups, the training's fields, records"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qatana.errors import ArtifactError
from qatana.files import read_json, replacing_folder, standing_folder
from qatana.train.failure import TrainingError
from qatana.train.random_state import RandomState

FORMAT = "qatana-checkpoint"
VERSION = 1


@dataclass
class Checkpoint:
    """Everything between two steps.

    random  "epoch": before this epoch's first batch was asked for; "step": now"""

    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    start: dict[str, Tensor]
    random: dict[str, RandomState]

    def save(self, folder: Path) -> None:
        """Replace `folder`. Raises: ArtifactError if it cannot be written; what was there before is
        intact."""
        tensors, values = _flatten(self.optimizer)
        tensors |= {f"start.{name}": scale for name, scale in self.start.items()}
        for when, random in self.random.items():
            tensors |= {f"random.{when}.{name}": value for name, value in random.tensors.items()}
        state = {
            "format": FORMAT,
            "version": VERSION,
            **self.state,
            "optimizer": values,
            "random": {when: random.numbers for when, random in self.random.items()},
        }
        with replacing_folder(folder) as temporary:
            _save(self.model, temporary / "model.safetensors")
            _save(tensors, temporary / "training.safetensors")
            (temporary / "state.json").write_text(json.dumps(state) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read a checkpoint. Raises: ArtifactError naming the file that is missing, truncated or foreign."""
        state = read_json(folder / "state.json")
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ArtifactError(f"{folder / 'state.json'} is no checkpoint of qatana; give another folder")
        if state.get("version") != VERSION:
            raise ArtifactError(
                f"{folder} is a checkpoint of version {state.get('version')}, this qatana reads {VERSION}"
            )
        tensors = _load(folder / "training.safetensors")
        try:
            random = {
                when: RandomState(_under(tensors, f"random.{when}."), numbers)
                for when, numbers in state.pop("random").items()
            }
            optimizer = _unflatten(_under(tensors, "optimizer."), state.pop("optimizer"))
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{folder} is damaged ({error!r}); delete it and train again") from error
        return cls(state, _load(folder / "model.safetensors"), optimizer, _under(tensors, "start."), random)


def find(folder: Path) -> Path | None:
    """Where the checkpoint lies: at `folder`, or, after a kill between the two renames of a replacement, beside it.

    Returns None if there is none. Raises: ArtifactError if the folder holds other files."""
    place = standing_folder(folder, "state.json")
    if place is not None:
        return place
    if folder.is_dir() and any(folder.iterdir()):
        raise ArtifactError(
            f"{folder} holds files but no checkpoint, and would be replaced; give an empty or new folder"
        )
    return None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, the tensors themselves; tied ones under their first name."""
    return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


@torch.no_grad()
def restore_model(model: nn.Module, saved: dict[str, Tensor], folder: Path) -> None:
    """Copy saved tensors into the model. Raises: TrainingError naming the first that does not belong
    there."""
    own = model_tensors(model)
    for name in [*own, *saved]:
        shapes = [tuple(side[name].shape) if name in side else None for side in (own, saved)]
        if shapes[0] != shapes[1]:
            raise TrainingError(
                f"{folder} is of another model: '{name}' is {shapes[1] or 'missing'} there and "
                f"{shapes[0] or 'missing'} here; "
                f"resume with the same model and recipe, or give another folder"
            )
    for name, tensor in own.items():
        tensor.copy_(saved[name])


def _flatten(optimizer: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as tensors by "optimizer.<index>.<key>", and the rest as plain values."""
    tensors, values = {}, {}
    for index, entry in optimizer["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{key}"] = value
            else:
                values[f"{index}.{key}"] = value
    return tensors, {"groups": optimizer["param_groups"], "values": values}


def _unflatten(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain["values"].items()]:
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in plain["groups"]]
    return {"state": state, "param_groups": groups}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    seen: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        plain[name] = value.clone() if place in seen else value  # safetensors refuses tensors that share memory
        seen.add(place)
    save_file(plain, path, metadata={"format": "pt"})


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"{path} is missing, truncated or no safetensors file ({error}); delete the folder and train again"
        ) from error
