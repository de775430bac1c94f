"""verify: QAT model, integer model and deployed file on the same batches, compared code by code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from qatana import hardware
from qatana.artifact import Artifact, sha256
from qatana.batch import split_inputs
from qatana.errors import DataError
from qatana.verify.certificate import Certificate, Comparison
from qatana.verify.engines import FLOAT_PRODUCTS, Session, open_file
from qatana.verify.onnx_graph import FileGraph, operator_name
from qatana.verify.operators import (
    Forced,
    Watch,
    between_integers,
    float_products,
    input_codes,
    input_names,
    upstream_float,
)
from qatana.verify.qat import QatRun, compare_weights, tensors_of
from qatana.verify.segments import Fused, Segments
from qatana.verify.stored import verify_stored
from qatana.verify.versions import versions

IGNORED_LABEL = -100
_MOVEMENT = {"Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze"}


@torch.no_grad()
def verify(
    model: nn.Module | None,
    artifact: Artifact,
    path: str | Path,
    batches: Iterable[Any],
    *,
    engine: str | None = None,
    layers: bool | int = True,
    progress: Callable[[int], None] | None = None,
) -> Certificate:
    """Compare a trained model, its artifact and the deployed file; the verdict follows the table ALLOWED.

    model    the QAT model; None leaves the comparison with training out
    path     the exported file; for the target "torch", which has none, the folder that `artifact.save` wrote
    batches  as the model takes them; labels of -100 and tokens outside attention_mask do not count as labels
    engine   default: the one of the target ("ort:int8" runs in ONNX Runtime)
    layers   compare operator by operator, on all batches or on so many of them
    progress called with the number of batches done
    Memory does not grow with the number of batches.
    Raises: ArtifactError for a file that is truncated, foreign or of another artifact; DataError for no batch; MissingExtra."""
    if artifact.free:
        return verify_stored(model, artifact, Path(path), batches, progress)
    run = _Verification(model, artifact, Path(path), engine or artifact.engine)
    limit = float("inf") if layers is True else int(layers)
    for done, batch in enumerate(batches):
        run.step(batch, layer_by_layer=done < limit)
        if progress is not None:
            progress(done + 1)
    return run.finish()


class _Verification:
    """Everything that lives through the batches: sessions, names, and the comparisons that are being filled."""

    def __init__(self, model: nn.Module | None, artifact: Artifact, path: Path, engine: str) -> None:
        self.artifact, self.engine, self.own = artifact, engine, engine == artifact.engine
        self.file = FileGraph(path, artifact)
        self.qat = None if model is None else QatRun(model)
        self.threads = int(hardware.describe()["cpus"])
        self.plain = open_file(path, engine, threads=self.threads)
        self.code_names, self.dynamic_names = artifact.code_nodes(), input_names(artifact)
        self.pieces = Segments(self.file, engine, self.threads) if self.own and engine == "openvino" else None
        self.exposed, self.exposing = self._expose() if self.pieces is None else (self.plain, {})
        self.batches = 0
        self.constants = self.file.compare_constants()
        self.training = Comparison("QAT model", "integer model", "training", "training")
        self.end = Comparison("integer model", path.name, "end to end", self._allowed_end_to_end(), engine)
        self.operators = Comparison("reference operator", path.name, "layer by layer", "layer by layer", engine)
        self.between = Comparison(
            "float operators of torch", f"float operators of {engine}", "float operators", "float operators", engine
        )
        self.nodes = {node.name: node for node in artifact.operators()}
        if model is not None:
            compare_weights(model, artifact, self.training)

    def _allowed_end_to_end(self) -> str:
        if self.dynamic_names:
            return "end to end, ranges at run time"
        if not self.own:
            return "another engine"
        return "end to end" if between_integers(self.artifact) else "end to end, integers only"

    # -- exposing --------------------------------------------------------------------------------------------------
    def _expose(self) -> tuple[Session, dict[str, Any]]:
        """A session that hands out what is compared, as far as handing it out does not change the kernels."""
        codes = [self.file.values[name] for name in self.code_names]
        floats = [self.file.floats[name] for name in self.dynamic_names]
        if self.own:
            codes, floats = list(self.file.values.values()), list(self.file.floats.values())
        known = {*self.file.inputs, *self.file.outputs}
        wanted = [name for name in dict.fromkeys([*codes, *floats]) if name not in known]
        expected = _computing(self.plain.kernels())
        session = self._open(wanted)
        difference = _difference(expected, _computing(session.kernels()))
        left_out: list[str] = []
        if difference and self.own and self.engine == "onnxruntime":
            neutral = self._neutral(wanted, expected)
            left_out = [name for name in wanted if name not in neutral]
            session = self._open(neutral)
            difference = _difference(expected, _computing(session.kernels()))
        facts = {
            "values": len(session.outputs) - len(self.plain.outputs), "left_out": left_out,
            "kernels_changed": difference, "outputs_different": 0,
        }  # fmt: skip
        return session, facts

    def _open(self, expose: list[str]) -> Session:
        return open_file(self.file.path, self.engine, threads=self.threads, expose=expose)

    def _neutral(self, names: list[str], expected: Counter[str]) -> list[str]:
        """The values that can be handed out without a change of kernels, found by halving."""
        if not names or _computing(self._open(names).kernels()) == expected:
            return names
        if len(names) == 1:
            return []
        middle = len(names) // 2
        return self._neutral(names[:middle], expected) + self._neutral(names[middle:], expected)

    # -- one batch -------------------------------------------------------------------------------------------------
    def step(self, batch: Any, layer_by_layer: bool) -> None:
        args, kwargs, feeds = self._inputs(batch)
        trained = None if self.qat is None else self.qat(args, kwargs)
        outputs = self.plain.run(feeds)
        found = self._inner_values(feeds, outputs, layer_by_layer)
        values = {name: torch.from_numpy(np.array(x)) for name, x in found.items()} | {
            name: x for name, x in feeds.items() if name in self.file.inputs
        }
        result = tensors_of(Watch(self.artifact.graph_module, self._watcher(values)).run(*feeds.values()))
        if trained is not None:
            for i, (ours, theirs) in enumerate(zip(trained, result, strict=True)):
                self.training.tally(f"output {i}", "output").compare(ours, theirs)
        if self.pieces is not None and self.end.allowed == "end to end, integers only":
            for name, ours in zip(self.file.outputs, result, strict=True):
                if name in self.pieces.nodes:  # not behind a float layer
                    self.end.tally(name, "output").compare(ours, outputs[name])
        self._labels(batch, feeds, result, [outputs[name] for name in self.file.outputs])
        if layer_by_layer and self.own:
            self._layers(feeds, values)
        self.batches += 1

    def _inner_values(
        self, feeds: dict[str, Tensor], outputs: dict[str, np.ndarray], layer_by_layer: bool
    ) -> dict[str, np.ndarray]:
        """What the file computes inside: handed out by the engine, or piece by piece."""
        if self.pieces is not None:
            return self.pieces.run(feeds) if layer_by_layer else {}
        found = self.exposed.run(feeds)
        self.exposing["outputs_different"] += sum(int((found[name] != x).sum()) for name, x in outputs.items())
        return found

    def _inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Tensor]]:
        """Arguments of the QAT model, and the same as inputs of the integer model and of the file, by name."""
        args, kwargs = split_inputs(batch)
        names = [x["name"] for x in self.artifact.config["inputs"]]
        positional = names[: max(0, len(names) - sum(name in kwargs for name in names))]
        args = args[: len(positional)]
        kwargs = {name: kwargs[name] for name in names if name in kwargs}
        feeds = dict(zip(positional, args, strict=False)) | kwargs
        missing = [name for name in names if name not in feeds]
        if missing:
            raise DataError(
                f"batch {self.batches} lacks input '{missing[0]}' of the integer model (it takes {', '.join(names)})"
            )
        return args, kwargs, {name: feeds[name].detach().cpu() for name in names}

    def _watcher(self, values: dict[str, Tensor]) -> Callable[[fx.Node, Any, Any], None]:
        """Compares codes of the integer model with the QAT model's and with the file's while the graph runs."""
        trained = self._trained_codes()
        seen: set[str] = set()

        def see(node: fx.Node, x: Any, result: Any) -> None:
            if node.name in self.code_names:
                name, ours = self.code_names[node.name], result
                theirs = values.get(self.file.values[node.name])
            elif node.name in self.dynamic_names and self.dynamic_names[node.name] not in seen:
                name, ours = self.dynamic_names[node.name], input_codes(node, x)
                assert ours is not None
                seen.add(name)
                x = values.get(self.file.floats[node.name])
                theirs = None if x is None else input_codes(node, x)
            else:
                return
            if self.qat is not None:
                tally = self.training.tally(name, operator_name(node))
                made = next(trained.get(name, iter(())), None)
                tally.missing(ours.numel()) if made is None else tally.compare(made, ours)
            if theirs is not None:
                self.end.tally(name, operator_name(node)).compare(ours, theirs)

        return see

    def _trained_codes(self) -> dict[str, Iterator[Tensor]]:
        """Quantizer name -> the QAT model's codes of this batch, one tensor for each that the integer model computes."""
        if self.qat is None:
            return {}
        uses = Counter(self.code_names.values()) | dict.fromkeys(self.dynamic_names.values(), 1)
        return {name: iter(self.qat.produced(name, count)) for name, count in uses.items()}

    def _labels(self, batch: Any, feeds: dict[str, Tensor], ours: list[Tensor], theirs: list[np.ndarray]) -> None:
        """argmax of logits (batch, classes) or (batch, sequence, classes), at real tokens that have a label."""
        for a, b in zip(ours, theirs, strict=True):
            if not a.is_floating_point() or a.ndim not in (2, 3) or a.shape[-1] < 2:
                continue
            counted = _counted(batch, feeds, a.shape[:-1])
            different = (a.argmax(-1) != torch.from_numpy(np.array(b)).argmax(-1)) & counted
            self.end.labels_compared += int(counted.sum())
            self.end.labels_different += int(different.sum())

    def _layers(self, feeds: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        given = {node: values[name] for node, name in self.file.values.items() if name in values}
        for node, name in self.file.floats.items():
            source = self.nodes[node].args[0]
            if isinstance(source, fx.Node) and source.op == "call_function" and name in values:
                given.setdefault(source.name, values[name])
        names = self.file.values | self.dynamic_names
        between = self.between if self.pieces is None else Comparison("", "", "each float operator by itself")
        Forced(self.artifact, given, names, self.operators, between, self.threads).run(*feeds.values())
        if self.pieces is not None:
            Fused(self.artifact, self.pieces, self.between).run(*feeds.values())

    # -- the verdict -----------------------------------------------------------------------------------------------
    def finish(self) -> Certificate:
        if not self.batches:
            raise DataError("verify got no batch; check the data path, the split and the batch size")
        self.end.began_at = self._began()
        if self.pieces is not None:
            self.exposing = self.pieces.facts(self.plain)
        kernels = self.plain.kernels()
        comparisons = [self.constants, self.end]
        if self.qat is not None:
            comparisons.insert(1, self.training)
        comparisons += [c for c in (self.operators, self.between) if c.tallies]
        return Certificate(
            self.artifact.target, self.engine, dict(hardware.describe()), versions(), _digest(self.file.path), comparisons,
            dict(sorted(kernels.items())), self.exposing, self._problems(kernels), self.batches,
        )  # fmt: skip

    def _began(self) -> str:
        """The operator behind the first tensor that differs end to end: a float operator, or the integer operator itself."""
        first = self.end.first
        if first is None:
            return ""
        names = {name: node for node, name in [*self.dynamic_names.items(), *self.code_names.items()]}
        names |= {name: node for node, name in self.file.values.items() if name in self.file.outputs}
        if first.name not in names:
            return ""
        node = self.nodes[names[first.name]]
        return upstream_float(node) or operator_name(node)

    def _problems(self, kernels: Counter[str]) -> list[str]:
        """Products in float where the plan says integer, and a file that computes otherwise once it is looked into."""
        if not self.own:
            return []
        problems = [
            f"{self.engine} computes {name} in float, where the plan says integer"
            for name in self.plain.float_products()
        ]
        products, planned = (
            sum(n for kind, n in kernels.items() if kind in FLOAT_PRODUCTS),
            float_products(self.artifact),
        )
        if not problems and products > planned:
            problems.append(
                f"{self.engine} runs {products} products in float, the plan has {planned}: see 'kernels' in the certificate"
            )
        blocks = sum(operator_name(node) == "block_linear" for node in self.artifact.operators())
        if kernels["MatMulNBits"] > blocks:
            problems.append(
                f"{self.engine} runs {kernels['MatMulNBits']} MatMulNBits, the plan has {blocks}: a float layer became one"
            )
        changed = self.exposing["outputs_different"] or self.exposing["kernels_changed"]
        if (
            changed and self.engine == "onnxruntime"
        ):  # OpenVINO fuses less around every output: its rates speak of the exposed file
            problems.append(
                f"{self.engine} computes otherwise when codes are read out ({self.exposing['outputs_different']} outputs, "
                f"kernels {self.exposing['kernels_changed']}); the comparison would not speak of the file"
            )
        return problems


def _counted(batch: Any, feeds: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Which labels count: real tokens, with a label other than -100."""
    counted = torch.ones(shape, dtype=torch.bool)
    mask = feeds.get("attention_mask")
    if mask is not None and mask.shape == shape:
        counted &= mask != 0
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if isinstance(labels, Tensor) and labels.shape == shape:
        counted &= labels.cpu() != IGNORED_LABEL
    return counted


def _computing(kernels: Counter[str]) -> Counter[str]:
    """Kernels that compute: layout changes come and go with outputs."""
    return Counter({kind: n for kind, n in kernels.items() if kind not in _MOVEMENT})


def _difference(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    return {kind: after[kind] - before[kind] for kind in sorted({*before, *after}) if after[kind] != before[kind]}


def _digest(path: Path) -> dict[str, Any]:
    return {"path": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
