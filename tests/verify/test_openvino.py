"""openvino:int8 from end to end: QAT model == integer model == file in OpenVINO, on small networks and on real data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.networks import images, network
from torch import nn
from verify.conftest import CLASSES, Deployed, bert_batches, deploy, resnet

import qatana as qt
from qatana.errors import ParityError, SchemeError
from qatana.verify import open_file, run_file
from qatana.verify.engines import OpenVinoSession

pytestmark = [pytest.mark.engine, pytest.mark.slow]
TARGET = "openvino:int8"


@pytest.fixture(scope="session")
def openvino_cnn(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    draw = torch.Generator().manual_seed(1)
    batches = [(torch.randn(16, 3, 8, 8, generator=draw), torch.zeros(16, dtype=torch.int64)) for _ in range(4)]
    return deploy(resnet(), TARGET, batches, tmp_path_factory.mktemp("openvino"))


def test_a_cnn_is_exact_to_the_last_bit_of_its_logits(openvino_cnn: Deployed) -> None:
    certificate = openvino_cnn.verify().raise_on_difference()
    # Two batches of 16 images; codes of 3x8x8 (input), 8x8x8 (stem, convolution, convolution with the sum), 8 (pool); logits.
    compared = 32 * (3 * 64 + 3 * 8 * 64 + 8 + CLASSES)
    end, layers = certificate.comparison("end to end"), certificate.comparison("layer by layer")
    assert (end.allowed, end.compared, end.different) == ("end to end, integers only", compared, 0)
    assert (layers.compared, layers.different) == (compared, 0)
    assert certificate.comparison("training").different == 0
    # The sum is part of the second convolution's kernel.
    assert certificate.kernels["Convolution:i8"] == 3
    assert not {"Eltwise", "Convolution:f32"} & set(certificate.kernels)


@pytest.mark.parametrize("case", ["functional", "bottleneck", "mixed", "1d", "control-flow", "pre-activation"])
def test_every_network_is_exact(case: str, tmp_path: Path) -> None:
    """Depthwise and grouped convolutions, sums of two convolutions, sums that stay float, BatchNorm in front: logits of the whole file."""
    deployed = deploy(network(case), TARGET, [(images(case, 8, seed),) for seed in (5, 6, 9)], tmp_path)
    certificate = deployed.verify().raise_on_difference()
    assert certificate.comparison("layer by layer").different == 0
    x = deployed.batches[0][0]
    (found,) = run_file(deployed.path, {"input": x}, "openvino").values()
    assert np.array_equal(found, deployed.artifact(x).numpy())


def test_formats_below_8_bits(tmp_path: Path) -> None:
    """The container is 8 bits wide; a Clip in front of QuantizeLinear keeps the range."""
    recipe = qt.recipe(TARGET).rule(
        "*", weight={"format": "int4n"}, input={"format": "uint4"}, output={"format": "uint4"}
    )
    example = images("functional", 8, 5)
    model = qt.prepare(network("functional"), qt.plan(network("functional"), recipe, example))
    qt.calibrate(model, [example])
    artifact = qt.convert(model)
    path = qt.export(artifact, tmp_path / "w4a4.onnx")
    qt.verify(model, artifact, path, [(images("functional", 16, 7),)]).raise_on_difference()


def test_every_integer_operator_of_a_bert_is_exact(deployed_bert: Callable[[str], Deployed]) -> None:
    certificate = deployed_bert(TARGET).verify().raise_on_difference()
    training, layers = certificate.comparison("training"), certificate.comparison("layer by layer")
    assert training.different == layers.different == 0
    kinds = [tally.operator for tally in layers.tallies.values()]
    assert sum("linear" in kind for kind in kinds) == 6
    assert (kinds.count("matmul"), kinds.count("matmul_requantize"), kinds.count("embedding")) == (1, 1, 3)
    between = certificate.comparison("float operators")
    assert {tally.operator for tally in between.tallies.values()} >= {"layer_norm", "gelu"}
    # Six linear layers on integers and the classifier, which the recipe skips; both products of attention in one kernel.
    assert certificate.kernels["FullyConnected:i8"] == 6
    assert certificate.kernels["FullyConnected:f32"] == 1
    assert "MatMul:f32" not in certificate.kernels
    assert certificate.exposing["kernels_changed"] == {}


def test_codes_that_move_between_quantize_and_dequantize_run_in_float(deployed_bert: Callable[[str], Deployed]) -> None:
    """The attention of an ort:int8 file: why openvino:int8 dequantizes before it moves. `float_products` sees the difference."""
    own, other = (open_file(deployed_bert(target).path, "openvino") for target in (TARGET, "ort:int8"))
    assert isinstance(own, OpenVinoSession)
    assert own.float_products() == []
    assert {kernel.precision for kernel in own.product_kernels()} == {"u8", "i8"}
    assert len(other.float_products()) == 2 * 2  # both products, in two layers


def test_a_product_that_runs_in_float(deployed_bert: Callable[[str], Deployed], tmp_path: Path) -> None:
    """With two sign changes behind DequantizeLinear every value stays, and the pattern that OpenVINO fuses is gone."""
    deployed = deployed_bert(TARGET)
    model = onnx.load(str(deployed.path))
    product = next(node for node in model.graph.node if node.op_type == "MatMul")
    place = list(model.graph.node).index(product)
    # One at the product's other side: dequantized weights that are not constant codes any more.
    model.graph.node.insert(place, onnx.helper.make_node("Sin", [product.input[0]], ["bent"], name="bent"))
    product.input[0] = "bent"
    onnx.save(model, str(tmp_path / "float.onnx"))
    certificate = deployed.verify(tmp_path / "float.onnx")
    assert not certificate.verdict
    assert any("in float" in problem for problem in certificate.problems)


def test_one_changed_weight_code(openvino_cnn: Deployed, tampered: Callable[..., Path]) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[5, 2, 1, 0] += 1 if weight[5, 2, 1, 0] < 0 else -1
        return weight

    certificate = openvino_cnn.verify(tampered(openvino_cnn.path, "block.conv1.weight", change))
    with pytest.raises(ParityError, match=r"block\.conv1\.weight.*index \[5, 2, 1, 0\]"):
        certificate.raise_on_difference()
    first = certificate.comparison("layer by layer").first
    assert first is not None
    assert first.name == "block.conv1.output"


# -- the plan ----------------------------------------------------------------------------------------------------------
def test_a_linear_layers_zero_point_lies_above_its_lowest_code() -> None:
    """Behind a ReLU the range begins at 0; the kernel that fuses Linear, ReLU and QuantizeLinear has one formula for zero points above 0.
    The largest value keeps its code, 255."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
    ready = qt.calibrate(
        qt.prepare(model, qt.plan(model, qt.recipe(TARGET).rule("2", input={"range": "minmax"}), x)), [x]
    ).eval()
    quantizer = qt.quantizers(ready)["2.input"]
    assert int(quantizer.zero_point) == 1
    heard: list[torch.Tensor] = []
    quantizer.tap = lambda _, codes: heard.append(codes)
    ready(x)
    assert (int(heard[0].min()), int(heard[0].max())) == (1, 255)


def test_attention_needs_zero_point_0() -> None:
    from verify.conftest import bert

    recipe = qt.recipe(TARGET).rule("*", key={"format": "uint8", "symmetric": False})
    with pytest.raises(SchemeError, match="multiplies two activations on integers only where their zero point is 0"):
        qt.plan(bert(), recipe, bert_batches(1)[0])


def test_sums_are_part_of_a_convolution_or_float() -> None:
    plan = qt.plan(resnet(), TARGET, torch.randn(2, 3, 8, 8))
    assert plan.row("add.output") is None
    row = plan.row("block.conv2.other")
    assert row is not None
    assert (row.shares, row.scheme is None) == ("conv.output", False)


# -- real data ---------------------------------------------------------------------------------------------------------
def test_fashion_mnist(repository: Path, fashion_mnist_dir: Path, tmp_path: Path) -> None:
    """The network of the examples with its trained weights, on 1,024 test images: every code and every logit."""
    import gzip
    import sys

    from safetensors.torch import load_file

    sys.path.insert(0, str(repository / "examples"))
    try:
        from models import SmallCNN  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    model: Any = SmallCNN()
    model.load_state_dict(load_file(repository / "examples/weights/smallcnn-fashion.safetensors"))
    (file,) = fashion_mnist_dir.glob("t10k-images-idx3-ubyte*")
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    pixels = torch.from_numpy(
        np.frombuffer(raw, np.uint8, 1280 * 784, offset=16).reshape(-1, 1, 28, 28).astype(np.float32)
    )
    batches = [(x,) for x in ((pixels / 255 - 0.286) / 0.353).split(256)]
    ready = qt.prepare(model.eval(), qt.plan(model, TARGET, batches[0]))
    qt.calibrate(ready, batches[:1])
    artifact = qt.convert(ready)
    path = qt.export(artifact, tmp_path / "smallcnn.onnx")
    certificate = qt.verify(ready, artifact, path, batches[1:]).raise_on_difference()
    assert certificate.parity["codes_different"] == 0
    assert certificate.parity["codes_compared"] > 20_000_000
    assert (certificate.parity["labels_compared"], certificate.parity["labels_different"]) == (1024, 0)


def test_minilm(minilm_dir: Path, conll_dir: Path, tmp_path: Path) -> None:
    """8 sentences of CoNLL-2003: integer operators to the bit; float functions move a code in a million or so (ALLOWED: 1e-4)."""
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    words = [
        line.split()[0]
        for line in (conll_dir / "test.txt").read_text().splitlines()
        if line.strip() and "DOCSTART" not in line
    ]
    sentences = [" ".join(words[i : i + 14]) for i in range(0, 24 * 14, 14)]
    tokenizer = AutoTokenizer.from_pretrained(str(minilm_dir))
    model = AutoModelForTokenClassification.from_pretrained(str(minilm_dir), num_labels=9).eval()
    batches = [
        {
            k: v
            for k, v in tokenizer(sentences[i : i + 8], padding=True, return_tensors="pt").items()
            if k != "token_type_ids"
        }
        for i in (0, 8, 16)
    ]
    certificate = deploy(model, TARGET, batches, tmp_path).verify()
    assert certificate.comparison("training").different == 0
    layers = certificate.comparison("layer by layer")
    assert layers.compared > 5_000_000
    assert layers.different == 0
    assert certificate.comparison("float operators").passed
    assert certificate.problems == []
    # The classifier is not trained here: its labels say nothing.
