"""Artifact: a trained model as plain data. A folder of three files:

config.json        format, target, recipe, plan, inputs, sha256 of the others
graph.json         the operators, in order (artifact/graph_json.py)
model.safetensors  codes (packed below 8 bits), scales, biases, and what stayed float"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx

from qatana.artifact.graph_json import decode_graph, encode_graph
from qatana.errors import ArtifactError
from qatana.files import read_json, replacing_folder, standing_folder, write_json
from qatana.recipe import Plan, Recipe

FORMAT = "qatana-artifact"
VERSION = 1
REQUIRED = ("target", "recipe", "plan", "inputs", "sha256")


@dataclass
class Artifact:
    """The integer model: a graph of torch.ops.qatana and aten operators over plain tensors.

    config keys: format, version, target, recipe, plan (rows), inputs [{name, dtype, shape, dynamic}]"""

    graph_module: fx.GraphModule
    config: dict[str, Any]

    @classmethod
    def from_graph(cls, graph_module: fx.GraphModule, plan: Plan) -> Artifact:
        """From convert's captured graph; tensors are renamed after the model's own names."""
        tensors: dict[str, Tensor] = {}
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                tensor = _find(graph_module, str(node.target)).detach().contiguous()
                node.target = str(node.target).removeprefix("model.")
                tensors[node.target] = tensor
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        args, kwargs = plan.example_inputs
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        config = {
            "format": FORMAT,
            "version": VERSION,
            "target": plan.recipe.target,
            "recipe": plan.recipe.to_dict(),
            "plan": [row.to_dict() for row in plan.rows],
            "float_bytes": plan.float_bytes,
            "inputs": [_describe(node, x) for node, x in zip(placeholders, inputs, strict=True)],
        }
        return cls(decode_graph(encode_graph(graph_module.graph), tensors), config)

    # -- facts -----------------------------------------------------------------------------------------------------
    @property
    def target(self) -> str:
        return self.config["target"]

    @property
    def engine(self) -> str:
        return Recipe.from_dict(self.config["recipe"]).resolved.engine

    @property
    def free(self) -> bool:
        """Whether its target binds it to no engine: it runs in PyTorch and has no file."""
        return Recipe.from_dict(self.config["recipe"]).resolved.free

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and float parameters, in the order in which the graph reads them; then those that it does not read."""
        found = dict(self.graph_module.named_buffers())
        nodes = (argument for node in self.graph_module.graph.nodes for argument in node.all_input_nodes)
        read = [str(node.target) for node in nodes if node.op == "get_attr"]
        return {name: found[name] for name in dict.fromkeys((*read, *found)) if name in found}

    def operators(self) -> list[fx.Node]:
        """The integer operators, in order."""
        return [n for n in self.graph_module.graph.nodes if getattr(n.target, "namespace", "") == "qatana"]

    def code_nodes(self) -> dict[str, str]:
        """Node name -> quantizer name, for every operator that returns codes."""
        return {
            n.name: str(n.args[-1])
            for n in self.operators()
            if "quantize" in str(n.target) and not any(w in str(n.target) for w in ("dequantize", "fake_quantize"))
        }

    def example_inputs(self, batch: int = 2, sequence: int = 16) -> tuple[Tensor, ...]:
        """Inputs of the right shapes and dtypes (zeros; ones for masks), for tracing."""
        return tuple(_example(x, batch, sequence) for x in self.config["inputs"])

    # -- running ---------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def __call__(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Run the integer model in PyTorch on the reference operators."""
        names = [x["name"] for x in self.config["inputs"]]
        values = list(args) + [kwargs[name] for name in names[len(args) :]]
        return self.graph_module(*values)

    # -- files -----------------------------------------------------------------------------------------------------
    def save(self, path: str | Path) -> Path:
        """Write the folder; an older one is replaced only when the new one is complete."""
        path = Path(path)
        with replacing_folder(path) as folder:
            save_file({k: v.contiguous() for k, v in self.tensors.items()}, str(folder / "model.safetensors"))
            write_json(folder / "graph.json", encode_graph(self.graph_module.graph))
            sums = {name: sha256(folder / name) for name in ("graph.json", "model.safetensors")}
            write_json(folder / "config.json", self.config | {"sha256": sums})
        return path

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read a folder written by `save`; after a save that was killed between its two renames, the one that was there before.

        Raises: ArtifactError if it is missing, foreign, truncated or mixed up."""
        place = standing_folder(path, "config.json")
        if place is None:
            raise ArtifactError(
                f"{path} is not an artifact: it has no config.json; qatana.convert(...).save(path) writes one"
            )
        path = place
        config = read_json(path / "config.json")
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise ArtifactError(f"{path}/config.json was not written by qatana.convert")
        if config.get("version") != VERSION:
            raise ArtifactError(f"{path} has format version {config.get('version')}; this qatana reads {VERSION}")
        missing = [key for key in REQUIRED if key not in config]
        if (
            missing
            or not isinstance(config["sha256"], dict)
            or set(config["sha256"]) != {"graph.json", "model.safetensors"}
        ):
            raise ArtifactError(f"{path}/config.json lacks {', '.join(missing) or 'checksums'}; convert and save again")
        for name, expected in config.pop("sha256").items():
            if not (path / name).is_file() or sha256(path / name) != expected:
                raise ArtifactError(
                    f"{path}/{name} is missing, truncated or changed (its checksum differs); save the artifact again"
                )
        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(str(path / "model.safetensors"), "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}/model.safetensors cannot be read: {error}") from error
        return cls(decode_graph(read_json(path / "graph.json"), tensors), config)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _find(module: Any, target: str) -> Tensor:
    for part in target.split("."):
        module = getattr(module, part)
    return module


def _describe(node: fx.Node, x: Tensor) -> dict[str, Any]:
    """An input of the graph; a dimension that its capture had to fix is not listed as dynamic."""
    sequence = x.ndim == 2 and not x.is_floating_point()
    dynamic = {"0": "batch"} | ({"1": "sequence"} if sequence else {})
    traced = node.meta.get("val")
    if isinstance(traced, Tensor):
        dynamic = {axis: name for axis, name in dynamic.items() if not isinstance(traced.shape[int(axis)], int)}
    return {"name": node.name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape), "dynamic": dynamic}


def _example(x: dict[str, Any], batch: int, sequence: int) -> Tensor:
    sizes = {"batch": batch, "sequence": sequence}
    shape: list[int] = list(x["shape"])
    for axis, name in x["dynamic"].items():
        shape[int(axis)] = sizes[name]
    fill = torch.ones if "mask" in x["name"] else torch.zeros
    return fill(shape, dtype=getattr(torch, x["dtype"]))
