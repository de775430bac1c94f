"""The deployed file as a graph: which of its values belongs to which operator of the artifact, and whether its constants are the
artifact's.

A file is ours if its metadata says so and names the artifact's operators. Weight integers, scales and float parameters must be
the artifact's bit for bit, and every scale and zero point of the Q/DQ nodes around an operator must be one of its own: a code that
happens not to change on the batches at hand does not hide a changed constant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from qatana.artifact import Artifact
from qatana.errors import ArtifactError, require
from qatana.verify.certificate import Comparison

METADATA = "qatana"
_SOURCES = {"quantize": "QuantizeLinear", "block_linear": "MatMulNBits", "dynamic_linear": "DynamicQuantizeLinear"}


class FileGraph:
    """An ONNX file beside the artifact that it should hold.

    values   artifact node name -> name of its value in the file
    floats   artifact node name -> name of the float value that its operator reads (quantize, block_linear, dynamic_linear)"""

    def __init__(self, path: str | Path, artifact: Artifact) -> None:
        self.path, self.artifact = Path(path), artifact
        self.model = _load(self.path)
        self._onnx = require("onnx", "onnx")
        self.makers = {name: node for node in self.model.graph.node for name in node.output}
        self._initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.inputs = [x.name for x in self.model.graph.input]
        self.outputs = [x.name for x in self.model.graph.output]
        self.values = self._values()
        self._named = {name: node for node, name in self.values.items()}
        self.floats = {n.name: name for n in artifact.operators() if (name := self._float_input(n))}

    # -- names -----------------------------------------------------------------------------------------------------
    def _values(self) -> dict[str, str]:
        """From the file's metadata, checked against the artifact's operators."""
        entry = next((e.value for e in self.model.metadata_props if e.key == METADATA), None)
        if entry is None:
            raise ArtifactError(f"{self.path} was not written by qatana.export: it has no '{METADATA}' metadata")
        try:
            data = json.loads(entry)
            target, values = data["target"], dict(data["values"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{self.path}: its '{METADATA}' metadata is damaged ({error}); export again") from error
        if target != self.artifact.target:
            raise ArtifactError(
                f"{self.path} was exported for {target}, the artifact for {self.artifact.target}; export this artifact"
            )
        ours = [node.name for node in self.artifact.operators()]
        if set(ours) != set(values):
            raise ArtifactError(
                f"{self.path} belongs to another artifact: it has {len(values)} operators, the artifact {len(ours)}"
                f"{_example(set(values) ^ set(ours))}; export this artifact"
            )
        values |= self._renamed_outputs(values)
        lost = [name for name in values.values() if name not in self.makers]
        if lost:
            raise ArtifactError(f"{self.path} was changed after export: value '{lost[0]}' is gone; export again")
        return values

    def _renamed_outputs(self, values: dict[str, str]) -> dict[str, str]:
        """Operators that are outputs of the graph keep the output's name."""
        return {
            node.name: out
            for node, out in zip(output_nodes(self.artifact.graph_module.graph), self.outputs, strict=False)
            if node.name in values and values[node.name] not in self.makers
        }

    def _float_input(self, node: fx.Node) -> str:
        """Name of the float value that an operator quantizes, found by walking back to the node that does it."""
        kind = _SOURCES.get(operator_name(node))
        if kind is None:
            return ""
        for onnx_node in self.region(node):
            if onnx_node.op_type == kind:
                return onnx_node.input[0]
        raise ArtifactError(f"{self.path}: no {kind} makes '{self.values[node.name]}'; export again")

    def region(self, node: fx.Node) -> Iterator[Any]:
        """The file's nodes that make up one operator: back from its value to the values of other operators, nearest first."""
        stop = _SOURCES.get(operator_name(node))
        queue, seen = [self.values[node.name]], set()
        while queue:
            name = queue.pop(0)
            maker = self.makers.get(name)
            if maker is None or name in seen or (seen and name in self._named):
                continue
            seen.add(name)
            yield maker
            if maker.op_type == stop:
                queue += maker.input[1:]
            else:
                queue += maker.input

    # -- constants -------------------------------------------------------------------------------------------------
    def array(self, name: str) -> np.ndarray | None:
        """The value of an initializer, None for anything else."""
        tensor = self._initializers.get(name)
        return None if tensor is None else self._onnx.numpy_helper.to_array(tensor)

    def compare_constants(self) -> Comparison:
        """Tensors of the artifact against the initializers of the same name, then the scales around every operator."""
        out = Comparison("artifact", self.path.name, "constants", "constants")
        anonymous: set[bytes] | None = None
        read = self._weights()
        for name, tensor in self.artifact.tensors.items():
            ours, theirs = tensor.detach().cpu().numpy(), self.array(name)
            if theirs is not None:
                out.tally(name, "constant").compare(*_flat(ours, theirs))
                continue
            anonymous = self._contents() if anonymous is None else anonymous
            if name in read and ours.tobytes() not in anonymous:
                out.tally(name, "constant").missing(ours.size)
        for node in self.artifact.operators():
            self._compare_scales(node, out)
        return out

    def _contents(self) -> set[bytes]:
        return {self._onnx.numpy_helper.to_array(tensor).tobytes() for tensor in self.model.graph.initializer}

    def _weights(self) -> set[str]:
        """Tensors that integer operators read."""
        nodes = (arg for node in self.artifact.operators() for arg in node.all_input_nodes)
        return {str(node.target) for node in nodes if node.op == "get_attr"}

    def _compare_scales(self, node: fx.Node, out: Comparison) -> None:
        """Each Q/DQ node's scale and zero point must be one of the operator's own, and each of those must be there."""
        wanted, vectors = _parameters(node), self._vectors(node)
        if not wanted:
            return
        name, found, wrong = self.values[node.name], set(), False
        for onnx_node in self.region(node):
            if onnx_node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            scale = self.array(onnx_node.input[1])
            if scale is None:
                continue
            zero = self.array(onnx_node.input[2]) if len(onnx_node.input) > 2 else None
            pair = (float(scale.flat[0]), 0 if zero is None else int(zero.flat[0]))
            if scale.size == 1 and pair in wanted:
                found.add(pair)
            elif vectors and any(_same(vector, scale) for vector in vectors):
                out.tally(f"{name} (scales)", "constant").compare(scale, scale)
            else:
                wrong = True
                closest, actual = _closest(scale, pair, wanted, vectors)
                out.tally(f"{name} (scales)", "constant").compare(closest, actual)
        out.tally(f"{name} (scales)", "constant").compared += len(found)
        if not wrong and len(found) < len(wanted):
            out.tally(f"{name} (scales)", "constant").missing(len(wanted) - len(found))

    def _vectors(self, node: fx.Node) -> list[np.ndarray]:
        arguments = arguments_of(node)
        weight = arguments.get("weight_scale")
        if not isinstance(weight, fx.Node):
            return []
        vector = self.artifact.tensors[str(weight.target)].detach().cpu().numpy().reshape(-1)
        if "x_scale" not in arguments:
            return [vector]
        return [np.float32(arguments["x_scale"]) * vector, vector]


def _load(path: Path) -> Any:
    """Raises: ArtifactError if the file is missing, truncated or no ONNX model."""
    onnx = require("onnx", "onnx")
    try:
        model = onnx.load(str(path))
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # DecodeError of whichever protobuf is installed
        raise ArtifactError(f"{path} is truncated or no ONNX file; export it again") from error
    if not model.graph.node:
        raise ArtifactError(f"{path} is truncated or no ONNX file: its graph is empty; export it again")
    return model


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """What the graph returns."""
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    return list(returned) if isinstance(returned, (list, tuple)) else [returned]  # type: ignore[list-item]


def operator_name(node: fx.Node) -> str:
    """ "quantize" of torch.ops.qatana.quantize.default, "layer_norm" of torch.ops.aten.layer_norm.default."""
    schema = getattr(node.target, "_schema", None)
    return (
        str(schema.name).partition("::")[2]
        if schema is not None
        else getattr(node.target, "__name__", str(node.target))
    )


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Arguments of a torch.library operator by the names of its schema."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _parameters(node: fx.Node) -> set[tuple[float, int]]:
    """The (scale, zero point) pairs of an operator's activations, scales as float32."""
    arguments = arguments_of(node)
    pairs = set()
    for prefix in ("x_", "a_", "b_", "other_", ""):
        scale, zero = arguments.get(f"{prefix}scale"), arguments.get(f"{prefix}zero_point")
        if isinstance(scale, float) and isinstance(zero, int):
            pairs.add((float(np.float32(scale)), zero))
    return pairs


def _closest(
    scale: np.ndarray, pair: tuple[float, int], wanted: set[tuple[float, int]], vectors: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What a wrong scale (or scale and zero point) should have been, and what it is."""
    candidates = [v for v in vectors if v.size == scale.size]
    if candidates and scale.size > 1:
        return min(candidates, key=lambda v: float(np.abs(v - scale.reshape(-1)).max())), scale.reshape(-1)
    return np.array(min(wanted, key=lambda w: (abs(w[0] - pair[0]), w[1] != pair[1]))), np.array(pair)


def _flat(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays; where shapes differ but hold as many elements, flat."""
    if ours.shape != theirs.shape and ours.size == theirs.size:
        return ours.reshape(-1), theirs.reshape(-1)
    return ours, theirs


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.size == b.size and bool((a.reshape(-1) == b.reshape(-1)).all())


def _example(names: set[str]) -> str:
    return f" ('{min(names)}' is in one of them only)" if names else ""
