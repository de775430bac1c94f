"""export: an Artifact as an ONNX file of integer operators, through torch's export-based exporter and our own translations.

Tensors of codes carry the names of the QAT model's quantizers, so that any tool can ask the file for them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from qatana.artifact import Artifact
from qatana.errors import ExportError, require
from qatana.export.dequantize_first import dequantize_first
from qatana.export.program import onnx_program, quiet
from qatana.export.translations import OPENVINO
from qatana.files import replacing
from qatana.recipe import TARGETS

METADATA = "qatana"


def export(artifact: Artifact, path: str | Path) -> Path:
    """Write an Artifact as an ONNX file. Returns the path. The file is written under a temporary name, then renamed.

    Raises: ExportError if an operator has no translation; ArtifactError if the path cannot be written."""
    path = Path(path)
    if path.suffix != ".onnx":
        raise ExportError(f"{artifact.target} is exported as ONNX: name the file '{path.stem}.onnx', not '{path.name}'")
    if artifact.free:
        raise ExportError(
            f"target '{artifact.target}' runs in PyTorch and has no file of an engine; keep artifact.save(folder), or choose one of "
            f"{', '.join(name for name, known in TARGETS.items() if not known.free)}"
        )
    model = onnx_model(artifact)
    with replacing(path) as temporary:
        temporary.write_bytes(model.SerializeToString())
    return path


def onnx_model(artifact: Artifact) -> Any:
    """The ONNX ModelProto of an Artifact."""
    require("onnxscript", "onnx")
    onnx = require("onnx", "onnx")
    with quiet():
        program = onnx_program(artifact)
    model = program.model_proto
    names = _value_names(artifact, program)
    _tidy(model, onnx)
    if artifact.engine == OPENVINO:
        dequantize_first(model, set(names))
    kept = _rename(model, names)
    model.graph.name, model.producer_name = "qatana", "qatana"
    entry = model.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps({"target": artifact.target, "values": kept})
    onnx.checker.check_model(model)
    return model


def names_of_operators(artifact: Artifact) -> dict[str, str]:
    """Artifact node name -> name of its value in the file: the quantizer's name for codes, the node's own for floats."""
    codes, used, names = artifact.code_nodes(), Counter[str](), {}
    for node in artifact.operators():
        name = codes.get(node.name, f"qatana.{node.name}")
        used[name] += 1
        names[node.name] = name if used[name] == 1 else f"{name}#{used[name]}"
    return names


def _value_names(artifact: Artifact, program: Any) -> dict[str, tuple[str, str]]:
    """ONNX value -> (artifact node, its new name). The exporter keeps the order of our operators, so they pair up."""
    exported = [n for n in program.exported_program.graph.nodes if getattr(n.target, "namespace", "") == "qatana"]
    ours = artifact.operators()
    if [str(n.target) for n in exported] != [str(n.target) for n in ours]:
        raise ExportError("torch.export reordered the integer operators; report this model")
    names = names_of_operators(artifact)
    return {new.name: (old.name, names[old.name]) for new, old in zip(exported, ours, strict=True)}


def _tidy(model: Any, onnx: Any) -> None:
    """Constants become initializers, once each; products of constants (bias scales) are computed; unused ones go."""
    graph, arrays, seen, alias, kept = model.graph, {}, {}, {}, []
    for tensor in graph.initializer:
        arrays[tensor.name] = onnx.numpy_helper.to_array(tensor)
    for node in graph.node:
        node.input[:] = [alias.get(name, name) for name in node.input]
        value = None
        if node.op_type == "Constant":
            value = _constant(node.attribute[0], onnx)
        elif node.op_type == "Mul" and all(name in arrays for name in node.input):
            value = np.multiply(*(arrays[name] for name in node.input))
        if value is None:
            kept.append(node)
            continue
        key = (str(value.dtype), value.shape, value.tobytes())
        if key in seen:
            alias[node.output[0]] = seen[key]
            continue
        seen[key] = node.output[0]
        arrays[node.output[0]] = value
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), node.output[0]))
    for node in kept:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in graph.node for name in node.input} | {out.name for out in graph.output}
    for node in graph.node:
        if node.op_type == "MaxPool" and len(node.output) == 2 and node.output[1] not in used:
            del node.output[1]
    live = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(live)
    del graph.value_info[:]


def _constant(attribute: Any, onnx: Any) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return onnx.numpy_helper.to_array(value)
    return np.asarray(value, dtype=np.int64 if attribute.name.startswith("value_int") else np.float32)


def _rename(model: Any, names: dict[str, tuple[str, str]]) -> dict[str, str]:
    """Give values their names (outputs of the file keep theirs). Returns artifact node -> name in the file."""
    outputs = {out.name for out in model.graph.output}
    new = {old: old if old in outputs else name for old, (_, name) in names.items()}
    for node in model.graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    return {node: new[old] for old, (node, _) in names.items()}
