"""Running a deployed file in a real engine, with chosen inner values handed out as extra outputs.

An engine sees the file as a user's program does: default optimizations, the CPU, the sessions' own choice of kernels. `kernels()` is
what the engine made of the graph: operator counts of the optimized graph, which certificates keep."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qatana.errors import ArtifactError, DataError, SchemeError, nearest, require

ENGINES = ("onnxruntime", "openvino")

FLOAT_PRODUCTS = frozenset(
    {"MatMul", "Gemm", "Conv", "FusedMatMul", "FusedGemm", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Attention"}
    | {"FullyConnected:f32", "Convolution:f32", "GroupConvolution:f32"}
)
"""Products that run in float: ONNX Runtime's operators (integer ones are QGemm, QLinearConv, MatMulIntegerToFloat ...), and labels that
`OpenVinoSession.kernels` gives; OpenVINO's MatMul is left out, since what is fused around it decides its precision."""

INTEGER_PRODUCTS = frozenset(
    {"QGemm", "QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}
    | {"MatMulInteger", "ConvInteger"}
)
"""ONNX Runtime's products of integers, some of which a file may ask for by name."""

_PRODUCTS = {"FullyConnected", "MatMul", "Convolution", "GroupConvolution", "Gemm"}


class Session(ABC):
    """A file loaded in an engine. `outputs`: names of the file's outputs, then of the exposed values."""

    inputs: list[str]
    outputs: list[str]

    @abstractmethod
    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Output name -> array. feeds: arrays or tensors by input name; more than the file takes are passed over.

        Raises: DataError if an input is missing or does not fit."""

    @abstractmethod
    def kernels(self) -> Counter[str]:
        """How often each operator stands in the optimized graph."""

    @abstractmethod
    def float_products(self) -> list[str]:
        """Products (Gemm, MatMul, Conv) of the optimized graph that compute in float although a DequantizeLinear feeds them."""

    @abstractmethod
    def integer_products(self) -> tuple[int, int]:
        """(asked, computed): products of two dequantized tensors and integer products in the file; how many of them are integer kernels."""

    def _arrays(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise DataError(f"the file needs input '{missing[0]}'{nearest(missing[0], feeds) if feeds else ''}")
        return {name: np.ascontiguousarray(_array(feeds[name])) for name in self.inputs}


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU, all graph optimizations.   source: a file, or the bytes of a model."""

    def __init__(self, source: Path | bytes, threads: int | None = None) -> None:
        self._ort = require("onnxruntime", "onnx")
        self._source: Any = source if isinstance(source, bytes) else str(source)
        self._threads = threads
        self._optimized: Any = None
        self._session = self._open(self._options())
        self.inputs = [x.name for x in self._session.get_inputs()]
        self.outputs = [x.name for x in self._session.get_outputs()]

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        return options

    def _open(self, options: Any) -> Any:
        try:
            return self._ort.InferenceSession(self._source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exception classes differ from version to version
            name = "the model" if isinstance(self._source, bytes) else self._source
            raise ArtifactError(f"ONNX Runtime cannot load {name}: {_line(error)}; export it again") from error

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = self._arrays(feeds)
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, arrays), strict=True))
        except Exception as error:
            raise DataError(f"ONNX Runtime cannot run the file on this batch: {_line(error)}") from error

    def kernels(self) -> Counter[str]:
        return Counter(node.op_type for node in self._graph().node)

    def float_products(self) -> list[str]:
        graph = self._graph()
        makers = {name: node for node in graph.node for name in node.output}
        return [
            f"{node.op_type} '{node.output[0]}'"
            for node in graph.node
            if node.op_type in FLOAT_PRODUCTS and any(_is_dequantized(name, makers) for name in node.input)
        ]

    def integer_products(self) -> tuple[int, int]:
        asked = len(_asked(_nodes(self._source)))
        return asked, min(asked, sum(node.op_type in INTEGER_PRODUCTS for node in self._graph().node))

    def _graph(self) -> Any:
        """The optimized graph, as the engine writes it."""
        if self._optimized is None:
            onnx = require("onnx", "onnx")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "optimized.onnx"
                options = self._options()
                options.optimized_model_filepath = str(path)
                self._open(options)
                self._optimized = onnx.load(str(path)).graph
        return self._optimized


def _nodes(source: Path | str | bytes) -> list[Any]:
    """The nodes of the file as it was written."""
    onnx = require("onnx", "onnx")
    model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
    return list(model.graph.node)


def _asked(nodes: Sequence[Any]) -> list[Any]:
    """Products of two dequantized tensors, and those that are integer by their name."""
    makers = {name: node for node in nodes for name in node.output}
    return [
        node for node in nodes
        if node.op_type in INTEGER_PRODUCTS
        or (node.op_type in _PRODUCTS | {"Conv"} and all(_is_dequantized(x, makers) for x in node.input[:2]))
    ]  # fmt: skip


_MOVES = {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Expand", "Slice"}


def _is_dequantized(name: str, makers: Mapping[str, Any]) -> bool:
    node = makers.get(name)
    while node is not None and node.op_type in _MOVES:
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


_NO_KERNELS = {"Const", "Input", "Output", "Reorder", "Subgraph"}


class Kernel(NamedTuple):
    """One kernel that OpenVINO runs: its type, the precision of its first input, and which of the file's products it computes."""

    type: str
    precision: str
    products: frozenset[str]


class OpenVinoSession(Session):
    """OpenVINO on the CPU with float32 as its float precision.   source: a file, or the bytes of a model."""

    def __init__(self, source: Path | bytes, threads: int | None = None, expose: Sequence[str] = ()) -> None:
        openvino = require("openvino", "openvino")
        self._source = source
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            config["INFERENCE_NUM_THREADS"] = threads
        try:
            core = openvino.Core()
            model = core.read_model(source if isinstance(source, bytes) else str(source))
            self.outputs = [next(iter(sorted(out.get_names()))) for out in model.outputs]
            added = model.add_outputs(list(expose)) if expose else []
            self._compiled = core.compile_model(model, "CPU", config)
        except RuntimeError as error:
            name = "the model" if isinstance(source, bytes) else source
            raise ArtifactError(f"OpenVINO cannot load {name}: {_line(error)}; export it again") from error
        self.outputs += list(expose) if added or not expose else []
        self.inputs = [x.get_node().get_friendly_name() for x in self._compiled.inputs]  # a tensor may have more names

    def run(self, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = self._arrays(feeds)
        try:
            results = self._compiled([arrays[name] for name in self.inputs])
        except RuntimeError as error:
            raise DataError(f"OpenVINO cannot run the file on this batch: {_line(error)}") from error
        return {name: np.array(results[i]) for i, name in enumerate(self.outputs)}

    def kernels(self) -> Counter[str]:
        return Counter(_label(op) for op in self._operators())

    def float_products(self) -> list[str]:
        return sorted(
            {
                name
                for kernel in self.product_kernels()
                if kernel.precision not in ("i8", "u8")
                for name in kernel.products
            }
        )

    def product_kernels(self) -> set[Kernel]:
        """Kernels that hold a product of two dequantized tensors, as far as OpenVINO keeps the names of nodes."""
        products = {node.name for node in _asked(self._nodes)}
        found = set()
        for op in self._operators(skipped=set()):
            inside = {name.partition("/")[0] for name in _info(op, "originalLayersNames").split(",")} & products
            if inside:
                found.add(Kernel(_info(op, "layerType"), _info(op, "runtimePrecision"), frozenset(inside)))
        return found

    def integer_products(self) -> tuple[int, int]:
        integer = (kernel.products for kernel in self.product_kernels() if kernel.precision in ("i8", "u8"))
        return len(_asked(self._nodes)), len(frozenset().union(*integer))

    @functools.cached_property
    def _nodes(self) -> list[Any]:
        return _nodes(self._source)

    def _operators(self, skipped: set[str] = _NO_KERNELS) -> list[Any]:
        return [op for op in self._compiled.get_runtime_model().get_ops() if _info(op, "layerType") not in skipped]


def _info(op: Any, key: str) -> str:
    info = op.get_rt_info()
    return str(info[key].astype(str)) if key in info and hasattr(info[key], "astype") else str(info.get(key, ""))


def _label(op: Any) -> str:
    """ "MatMul:i8" for products, the layer type for the rest."""
    kind = _info(op, "layerType")
    return f"{kind}:{_info(op, 'primitiveType').rpartition('_')[2].lower()}" if kind in _PRODUCTS else kind


def open_file(
    source: str | Path | bytes, engine: str, *, threads: int | None = None, expose: Sequence[str] = ()
) -> Session:
    """A session on a file or on the bytes of a model.

    expose   names of inner values that become outputs behind the file's own
    threads  None: the engine's default
    Raises: SchemeError for an unknown engine, MissingExtra if it is not installed, ArtifactError if it cannot load the file."""
    if engine not in ENGINES:
        raise SchemeError(f"unknown engine '{engine}'{nearest(engine, ENGINES)}")
    if isinstance(source, (str, Path)):
        source = Path(source)
        if not source.is_file():
            raise ArtifactError(f"{source} does not exist; qatana.export(artifact, path) writes it")
    if engine == "openvino":
        return OpenVinoSession(source, threads, expose)
    if expose:
        source = with_outputs(source, expose)
    return OnnxRuntimeSession(source, threads)


def with_outputs(source: Path | bytes, names: Sequence[str]) -> bytes:
    """The bytes of an ONNX model with more outputs (their types are inferred by the engine)."""
    onnx = require("onnx", "onnx")
    model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(str(source))
    present = {out.name for out in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return model.SerializeToString()


def run_file(
    path: str | Path, feeds: Mapping[str, Any], engine: str, threads: int | None = None
) -> dict[str, np.ndarray]:
    """Outputs of a file on one batch, by name. For many batches keep `open_file(path, engine)` and call `.run(feeds)`."""
    return open_file(path, engine, threads=threads).run(feeds)


def latency(
    path: str | Path, feeds: Mapping[str, Any], engine: str, rounds: int, *, threads: int | None = None, warmup: int = 3
) -> float:
    """Median milliseconds of one call, over `rounds` calls behind `warmup` uncounted ones.

    Two files are compared fairly by interleaving short calls of this function on both."""
    session = open_file(path, engine, threads=threads)
    for _ in range(warmup):
        session.run(feeds)
    times = []
    for _ in range(max(1, rounds)):
        start = time.perf_counter()
        session.run(feeds)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).strip()[:300]
