"""A file cut into pieces that run by themselves, for an engine that cannot show its inner values without changing its kernels.

OpenVINO fuses a linear layer, the function behind it and the quantization behind that into one kernel; a value that is handed out
stays outside. So each operator runs as a small model of its own, cut from the file, on the values that the pieces before it gave.
Codes enter a piece as floats through a QuantizeLinear of their own parameters, which returns the same codes; without one OpenVINO
would run the piece in float.

    single   one operator of the artifact, from codes to codes (or to floats, where the operator returns floats)
    fused    everything between codes and codes, float functions included: the kernels of the file itself"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from qatana.artifact import Artifact
from qatana.errors import DataError, require
from qatana.verify.certificate import Comparison
from qatana.verify.engines import Kernel, OpenVinoSession, Session, open_file
from qatana.verify.onnx_graph import FileGraph, arguments_of, operator_name
from qatana.verify.operators import upstream_float


class Segments:
    """Runs a file piece by piece.   After `run(feeds)`, `values` holds a tensor for each operator and each quantized float value, and
    `fused` the codes of each piece that holds a float function."""

    def __init__(self, file: FileGraph, engine: str, threads: int) -> None:
        self.file, self.engine, self.threads = file, engine, threads
        self._onnx = require("onnx", "onnx")
        self.nodes = {file.values[n.name]: n for n in file.artifact.operators()}
        self.codes = {name for name, n in self.nodes.items() if n.name in file.artifact.code_nodes()}
        self.shapes = _shapes(self._onnx, file.model)
        self.sessions: dict[tuple[str, bool], tuple[Session, list[str]]] = {}
        self.values: dict[str, np.ndarray] = {}
        self.fused: dict[str, np.ndarray] = {}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """All values of one batch, in the order of the operators."""
        self.values = {name: np.asarray(x) for name, x in feeds.items()}
        for name, node in self.nodes.items():
            source = self.file.floats.get(node.name)
            if source is not None and source not in self.values:
                self.values[source] = self._piece(source, fused=False)
            self.values[name] = self._piece(name, fused=False)
        self.fused = {name: self._piece(name, fused=True) for name in self.behind_floats}
        return self.values

    def facts(self, whole: Session) -> dict[str, Any]:
        """For the certificate: nothing is handed out; how many pieces ran, and which products of the fused ones run in another kernel
        (type, precision, or the products that it computes together) than in the whole file."""

        def kernels(session: Session) -> set[Kernel]:
            return session.product_kernels() if isinstance(session, OpenVinoSession) else set()

        fused = [session for (_, is_fused), (session, _) in self.sessions.items() if is_fused]
        unlike = {kernel for session in fused for kernel in kernels(session)} - kernels(whole)
        changed = {name: kernel.type for kernel in unlike for name in sorted(kernel.products)}
        return {
            "values": 0, "left_out": [], "kernels_changed": changed, "outputs_different": 0, "pieces": len(self.sessions),
        }  # fmt: skip

    @functools.cached_property
    def inner(self) -> set[str]:
        """Codes that never leave a kernel: attention probabilities, which the second product reads."""
        products = [node for node in self.nodes.values() if operator_name(node) == "matmul_requantize"]
        return {
            self.file.values[n.name]
            for node in products
            for n in node.all_input_nodes
            if operator_name(n) == "quantize"
        }

    @functools.cached_property
    def behind_floats(self) -> list[str]:
        """Codes behind float functions: quantized floats, and the context of attention (behind the softmax)."""

        def is_one(node: fx.Node) -> bool:
            kind = operator_name(node)
            return kind == "matmul_requantize" or (kind == "quantize" and bool(upstream_float(node)))

        return [name for name, node in self.nodes.items() if is_one(node) and name not in self.inner]

    # -- one piece -------------------------------------------------------------------------------------------------
    def _piece(self, name: str, fused: bool) -> np.ndarray:
        if (name, fused) not in self.sessions:
            self.sessions[name, fused] = self._cut(name, fused)
        session, inputs = self.sessions[name, fused]
        found = session.run({self._entry(x): self._entering(x) for x in inputs})[name]
        if found.size == 0 and all(self.values[x].size for x in inputs):
            raise DataError(
                f"{self.engine} returns an empty tensor for '{name}' where it computes it by itself: cannot compare"
            )
        return found

    def _entry(self, name: str) -> str:
        """Name under which a value enters a piece."""
        return f"{name}.entry" if name in self.codes else name

    def _entering(self, name: str) -> np.ndarray:
        """A value as a piece takes it: codes as (code - zero point) * scale, which is exact in its QuantizeLinear's eyes."""
        x = self.values[name]
        if name not in self.codes:
            return x
        arguments = arguments_of(self.nodes[name])
        return (x.astype(np.float32) - np.float32(arguments["zero_point"])) * np.float32(arguments["scale"])

    def _cut(self, name: str, fused: bool) -> tuple[Session, list[str]]:
        """The nodes between a value and the values at which a piece of this kind begins, as a model."""
        stops = self._stops(name, fused)
        wanted, inputs, queue = [], [], [name]
        initializers = {t.name for t in self.file.model.graph.initializer}
        while queue:
            value = queue.pop(0)
            if value in initializers or not value:
                continue
            if value not in self.file.makers or (value in stops and value != name):
                inputs += [value] if value not in inputs else []
                continue
            node = self.file.makers[value]
            if not any(node is other for other in wanted):
                wanted.append(node)
                queue += node.input
        model = self._model([n for n in self.file.model.graph.node if any(n is w for w in wanted)], inputs, name)
        return open_file(model.SerializeToString(), self.engine, threads=self.threads), inputs

    def _stops(self, name: str, fused: bool) -> set[str]:
        floats = set(self.file.floats.values())
        if not fused:
            return {*self.nodes, *floats}
        own = self.file.floats.get(self.nodes[name].name, "")
        return (self.codes - self.inner) | {x for x in floats - {own} if not self.inside(x)}

    def inside(self, value: str) -> bool:
        """Whether a float value is made from the float output of products alone, and so lies inside a kernel."""
        queue, seen = [value], set()
        while queue:
            current = queue.pop()
            node = self.nodes.get(current)
            if node is not None:
                if operator_name(node) in ("linear", "matmul"):
                    continue
                return False
            maker = self.file.makers.get(current)
            if maker is None or current in seen:
                continue
            seen.add(current)
            queue += maker.input
        return True

    def _model(self, nodes: list[Any], inputs: list[str], output: str) -> Any:
        onnx, helper = self._onnx, self._onnx.helper
        entries, quantizers, extra = [], [], []
        for name in inputs:
            kind = (
                onnx.TensorProto.FLOAT
                if name in self.codes
                else helper.np_dtype_to_tensor_dtype(self.values[name].dtype)
            )
            shape = self.shapes.get(name) or [None] * self.values[name].ndim
            entries.append(helper.make_tensor_value_info(self._entry(name), kind, shape))
            if name in self.codes:
                made, constants = self._quantize(name)
                quantizers.append(made)
                extra += constants
        used = {x for node in nodes for x in node.input}
        kept = [t for t in self.file.model.graph.initializer if t.name in used]
        graph = helper.make_graph(
            [*quantizers, *nodes], "piece", entries, [onnx.ValueInfoProto(name=output)], [*kept, *extra]
        )
        out = helper.make_model(
            graph, opset_imports=self.file.model.opset_import, ir_version=self.file.model.ir_version
        )
        return onnx.shape_inference.infer_shapes(out)

    def _quantize(self, name: str) -> tuple[Any, list[Any]]:
        helper, array = self._onnx.helper, self._onnx.numpy_helper.from_array
        arguments = arguments_of(self.nodes[name])
        kind = np.int8 if int(arguments["lo"]) < 0 else np.uint8
        constants = [
            array(np.asarray(arguments["scale"], np.float32), f"{name}.entry.scale"),
            array(np.asarray(arguments["zero_point"], kind), f"{name}.entry.zero_point"),
        ]
        node = helper.make_node("QuantizeLinear", [self._entry(name), *(c.name for c in constants)], [name])
        return node, constants


def _shapes(onnx: Any, model: Any) -> dict[str, list[Any]]:
    """Value -> its shape with the names of free dimensions, as far as ONNX infers it."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found = {}
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            found[value.name] = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]
    return found


class Fused(fx.Interpreter):
    """Runs the integer model from the values of the pieces; behind each fused piece its own codes are compared with the piece's."""

    def __init__(self, artifact: Artifact, pieces: Segments, out: Comparison) -> None:
        super().__init__(artifact.graph_module)
        self.pieces, self.names, self.out = pieces, pieces.file.values, out
        self._own: dict[Any, Tensor] = {}
        self._sources = {n.args[0]: name for n in artifact.operators() if (name := pieces.file.floats.get(n.name))}

    def run_node(self, n: fx.Node) -> Any:
        own, name = super().run_node(n), self.names.get(n.name, "")
        if name in self.pieces.codes:
            if name in self.pieces.inner:
                return own
            if name in self.pieces.fused:
                source = n.args[0]
                own = n.target(self._own[source], *n.args[1:]) if source in self._own else own  # type: ignore[operator]
                self.out.tally(name, upstream_float(n) or operator_name(n)).compare(own, self.pieces.fused[name])
            return torch.from_numpy(self.pieces.values[name])
        if n in self._sources and isinstance(own, Tensor) and not self.pieces.inside(self._sources[n]):
            self._own[n] = own
            return torch.from_numpy(self.pieces.values[self._sources[n]])
        return own
