"""The artifact's graph as an instrument: run freely, its codes are compared with the file's end to end; run on the file's own values,
each integer operator is compared by itself, and what float operators do between integers shows at its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qatana.artifact import Artifact
from qatana.errors import SchemeError
from qatana.numerics import IntFormat, nbits, unpack
from qatana.numerics.dynamic import dynamic_blocks, dynamic_tensor
from qatana.verify.certificate import Comparison
from qatana.verify.onnx_graph import arguments_of, operator_name

MOVES = frozenset({
    "view", "reshape", "transpose", "permute", "clone", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze", "dropout",
    "max_pool1d", "max_pool2d", "_unsafe_view", "alias", "expand", "slice", "select", "to", "_to_copy", "detach", "chunk", "split", "cat",
})  # fmt: skip
"""Operators of a graph that hand values on; an engine cannot round them otherwise."""

PRODUCTS = frozenset({
    "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "conv1d", "conv2d", "conv3d", "convolution", "scaled_dot_product_attention",
})  # fmt: skip
DYNAMIC = {"block_linear", "dynamic_linear"}
UNIT = 2.0**-24
"""Half an ulp of 1 in float32: the largest relative error of one rounding."""


class Watch(fx.Interpreter):
    """Runs the integer model and shows every integer operator: `see(node, first input, output)`."""

    def __init__(self, graph_module: fx.GraphModule, see: Callable[[fx.Node, Any, Any], None]) -> None:
        super().__init__(graph_module)
        self.see = see

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if is_integer_operator(n):
            self.see(n, self.env.get(n.args[0]) if isinstance(n.args[0], fx.Node) else n.args[0], result)
        return result


class Forced(fx.Interpreter):
    """Runs the integer model with every value that the file also has replaced by the file's own.

    values   node name -> what the file computed there (integer operators, and float inputs of operators that quantize)
    names    node name -> what reports call its tensor
    operators, between   comparisons to fill: reference against file on equal inputs; codes of torch's floats against the file's codes"""

    def __init__(
        self, artifact: Artifact, values: Mapping[str, Tensor], names: Mapping[str, str], operators: Comparison, between: Comparison,
        threads: int,
    ) -> None:  # fmt: skip
        super().__init__(artifact.graph_module)
        self.values, self.names, self.operators, self.between = values, names, operators, between
        self.tensors, self.threads = artifact.tensors, threads
        self._own: dict[Any, Tensor] = {}
        self._seen: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        own = super().run_node(n)
        given = self.values.get(n.name)
        if is_integer_operator(n):
            if given is None:
                return own
            self._check(n, own, given)
            return given
        if given is None or not isinstance(own, Tensor) or own.shape != given.shape:
            return own
        self._own[n] = own
        return given

    def _check(self, n: fx.Node, own: Tensor, given: Tensor) -> None:
        kind, source = operator_name(n), n.args[0]
        x = self.env[source] if isinstance(source, fx.Node) else None
        tally = self.operators.tally(self.names[n.name] if kind not in DYNAMIC else n.name, kind)
        if kind == "block_linear" and x is not None:
            reference, tolerance = block_reference(n, x, self.tensors, self.threads)
            tally.compare(reference, given, tolerance)
        elif kind == "matmul" and arguments_of(n)["engine"] == "openvino":
            tally.compare(
                own, given, own.abs() * 4 * UNIT
            )  # its scale is inverted twice or not, by the kernel: 1 ulp, then a rounding
        else:
            tally.compare(own, given)
        if source in self._own and x is not None:
            self._check_float(n, self._own[source], given if kind == "quantize" else input_codes(n, x))

    def _check_float(self, n: fx.Node, own: Tensor, theirs: Tensor | None) -> None:
        """Codes of what torch's float operators make of the file's own values, against the file's codes; once per tensor."""
        ours, operator = input_codes(n, own), upstream_float(n)
        if ours is None or theirs is None or not operator or self.names[n.name] in self._seen:
            return
        self._seen.add(self.names[n.name])
        self.between.tally(self.names[n.name], operator).compare(ours, theirs)


def is_integer_operator(node: fx.Node) -> bool:
    """Whether a node calls one of our operators."""
    return getattr(node.target, "namespace", "") == "qatana"


def input_codes(node: fx.Node, x: Tensor) -> Tensor | None:
    """The codes into which an operator quantizes its float input; None for an operator that takes codes."""
    kind = operator_name(node)
    if kind == "quantize":
        return node.target(x, *node.args[1:])  # type: ignore[operator]
    if kind == "block_linear":
        return dynamic_blocks(x, int(arguments_of(node)["size"]))[0].to(torch.int8)
    if kind == "dynamic_linear":
        levels, _, zero = dynamic_tensor(x)
        return (levels + zero).to(torch.uint8)
    return None


def input_names(artifact: Artifact) -> dict[str, str]:
    """Node name -> name of the quantizer of its float input, for operators that quantize at run time.

    The weight's place says which layer it is, the plan whose quantizer serves its input."""
    serves = {row["name"]: row["shares"] or row["name"] for row in artifact.config["plan"]}
    names = {}
    for node in artifact.operators():
        weight = arguments_of(node).get("weight")
        if operator_name(node) in DYNAMIC and isinstance(weight, fx.Node):
            own = f"{str(weight.target).removesuffix('.weight')}.input"
            names[node.name] = serves.get(own, own)
    return names


# -- MatMulNBits -------------------------------------------------------------------------------------------------------
def block_reference(
    node: fx.Node, x: Tensor, tensors: Mapping[str, Tensor], threads: int
) -> tuple[Tensor, Tensor | None]:
    """What MatMulNBits returns for x, and None; on a machine whose order of sums is not known, the exact result and a bound.

    threads: of the engine, which deals out rows by it."""
    arguments = arguments_of(node)
    bits, size = int(arguments["bits"]), int(arguments["size"])
    weight, scale = (tensors[str(arguments[key].target)] for key in ("weight", "weight_scale"))
    bias = tensors[str(arguments["bias"].target)] if isinstance(arguments["bias"], fx.Node) else None
    codes = unpack(weight, size, IntFormat(bits, signed=False))
    scale = scale.reshape(codes.shape[:2])
    try:
        isa = nbits.detect_isa()
        y = nbits.matmul_nbits(x, codes, scale, None, bias, bits=bits, block_size=size, isa=isa, threads=threads)
    except SchemeError:
        return _bounded(x, codes, scale, bias, bits)
    return y.reshape(*x.shape[:-1], -1), None


def _bounded(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """MatMulNBits on its own codes, in float64, and how far any order of float32 sums may lie from it.

    n roundings in a row err by at most n * 2^-24 of the sum of magnitudes, to first order (Higham 2002, section 3.1). Behind the unsigned
    codes an engine subtracts the zero point's share, so magnitudes are |x_hat| times (code + zero point) * scale. n: product sums of
    K / 4 integer quadruples at most, the correction of each block, and 8 for scales, bias and final sums."""
    zero, size = 2 ** (bits - 1), codes.shape[2]
    levels, x_scale = dynamic_blocks(x, size)
    x_hat = (levels.double() * x_scale.double()).reshape(x.shape)
    rows, scales = codes.shape[0], scale[..., None].double()
    exact = x_hat @ ((codes.double() - zero) * scales).reshape(rows, -1).T
    magnitude = x_hat.abs() @ ((codes.double() + zero) * scales.abs()).reshape(rows, -1).T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    roundings = x.shape[-1] // 4 + codes.shape[1] + 8
    return exact, roundings * UNIT * magnitude


# -- where drift begins ------------------------------------------------------------------------------------------------
def upstream_float(node: fx.Node) -> str:
    """The nearest float operator before a node ("layer_norm", "softmax", "gelu"), "" if it reads none."""
    return next((operator_name(n) for n in _upstream(node) if _is_float_operator(n)), "")


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    """Nodes before a node, nearest first, not beyond integer operators."""
    queue, seen = list(node.all_input_nodes), set()
    while queue:
        n = queue.pop(0)
        if n in seen or n.op != "call_function":
            continue
        seen.add(n)
        yield n
        if not is_integer_operator(n):
            queue += n.all_input_nodes


def _is_float_operator(node: fx.Node) -> bool:
    """An aten operator that computes (on what an integer operator or an input gave it), not one that moves or measures."""
    if getattr(node.target, "namespace", "") != "aten":
        return False
    name = operator_name(node)
    return name not in MOVES and not name.startswith("sym_")


def between_integers(artifact: Artifact) -> bool:
    """Whether a float operator stands before some integer operator (and may so move its codes)."""
    reached = _fed_by_values(artifact.graph_module.graph)
    return any(n in reached and _is_float_operator(n) for node in artifact.operators() for n in _upstream(node))


def _fed_by_values(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that descend from a float-valued integer operator (masks and positions do not)."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_integer_operator(node) or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def float_products(artifact: Artifact) -> int:
    """How many products (linear, matmul, convolution) the artifact itself computes in float."""
    nodes = artifact.graph_module.graph.nodes
    return sum(getattr(n.target, "namespace", "") == "aten" and operator_name(n) in PRODUCTS for n in nodes)
