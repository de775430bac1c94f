"""verify on real files in real engines: what it must find equal, and what it must catch and name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch.fx import GraphModule
from verify.conftest import CLASSES, Deployed, bert_batches, resnet

import qatana as qt
from qatana.errors import ArtifactError, DataError, ModelError, ParityError
from qatana.report.data import Certificate as ReportCertificate

pytestmark = pytest.mark.engine
Tamper = Callable[..., Path]
QUERY = "bert.encoder.layer.0.attention.self.query"


# -- what is equal ---------------------------------------------------------------------------------------------------
def test_a_cnn_is_exact_end_to_end(cnn: Deployed) -> None:
    certificate = cnn.verify().raise_on_difference()
    # Two batches of 16 images; codes of 3x8x8 (input), 8x8x8 (stem, two convolutions, addition), 8 (pool).
    codes = 32 * (3 * 64 + 4 * 8 * 64 + 8)
    assert certificate.parity == {
        "codes_compared": codes + 32 * CLASSES, "codes_different": 0, "labels_compared": 32, "labels_different": 0,
    }  # fmt: skip
    assert certificate.drift == {"codes_compared": codes, "codes_different": 0}
    layers = certificate.comparison("layer by layer")
    assert (layers.compared, layers.different) == (codes + 32 * CLASSES, 0)
    assert certificate.comparison("end to end").allowed == "end to end, integers only"
    assert certificate.kernels["QLinearConv"] == 3
    assert certificate.kernels["QLinearAdd"] == 1
    assert certificate.exposing["kernels_changed"] == {}


@pytest.mark.parametrize("target", ["ort:int8", "ort:int8-dynamic", "ort:int4"])
def test_every_integer_operator_of_a_bert_is_exact(deployed_bert: Callable[[str], Deployed], target: str) -> None:
    certificate = deployed_bert(target).verify().raise_on_difference()
    training, layers = certificate.comparison("training"), certificate.comparison("layer by layer")
    assert training.different == layers.different == 0
    assert training.compared > 0
    # Six linear layers in a block, and three embeddings: each by itself.
    kinds = [tally.operator for tally in layers.tallies.values()]
    assert sum("linear" in kind for kind in kinds) == 6 * deployed_bert(target).model.config.num_hidden_layers
    assert kinds.count("embedding") == 3
    # Three batches; of 26 tokens each the first of 4 sentences has no label.
    assert certificate.parity["labels_compared"] == 3 * (26 - 4)
    between = certificate.comparison("float operators")
    assert {tally.operator for tally in between.tallies.values()} == {"layer_norm", "gelu"} | (
        {"softmax"} if target == "ort:int8" else {"matmul"}
    )


def test_the_model_and_its_training_flags_are_left_alone(cnn: Deployed) -> None:
    model = cnn.model.train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    cnn.verify()
    assert all(module.training for module in model.modules())
    assert all(quantizer.tap is None for quantizer in qt.quantizers(model).values())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_an_artifact_without_its_model(cnn: Deployed) -> None:
    certificate = qt.verify(None, cnn.artifact, cnn.path, cnn.batches)
    assert certificate.verdict
    assert "training" not in [comparison.mode for comparison in certificate.comparisons]


def test_layers_and_progress(cnn: Deployed) -> None:
    done: list[int] = []
    certificate = cnn.verify(layers=1, progress=done.append)
    assert done == [1, 2]
    assert certificate.comparison("layer by layer").compared * 2 == cnn.verify().comparison("layer by layer").compared
    assert "layer by layer" not in [c.mode for c in cnn.verify(layers=False).comparisons]


def test_another_engine_runs_the_same_file(cnn: Deployed) -> None:
    certificate = cnn.verify(engine="openvino")
    end = certificate.comparison("end to end")
    assert certificate.engine == "openvino"
    assert end.allowed == "another engine"
    assert end.compared == 32 * (3 * 64 + 4 * 8 * 64 + 8)
    # Formulas that differ in the last bit move few codes, by one step where they begin.
    assert end.different <= 1e-3 * end.compared


# -- what must be caught and named -----------------------------------------------------------------------------------
def test_one_changed_weight_code(cnn: Deployed, tampered: Tamper) -> None:
    def change(weight: np.ndarray) -> np.ndarray:
        weight[5, 2, 1, 0] += 1 if weight[5, 2, 1, 0] < 0 else -1
        return weight

    certificate = cnn.verify(tampered(cnn.path, "block.conv1.weight", change))
    first = certificate.comparison("constants").first
    assert not certificate.verdict
    assert first is not None
    assert (first.name, first.index, first.different) == ("block.conv1.weight", [5, 2, 1, 0], 1)
    assert abs(first.left - first.right) == 1
    assert first.left == float(cnn.artifact.tensors["block.conv1.weight"][5, 2, 1, 0])
    with pytest.raises(ParityError, match=r"block\.conv1\.weight.*index \[5, 2, 1, 0\]") as caught:
        certificate.raise_on_difference()
    assert caught.value.exit_code == 1
    # It is seen in what the file computes, too: the convolution behind that weight is the first that differs.
    for mode in ("layer by layer", "end to end"):
        first = certificate.comparison(mode).first
        assert first is not None
        assert first.name == "block.conv1.output"
    assert certificate.comparison("end to end").began_at == "conv_requantize"


def test_one_scale_changed_by_one_ulp(cnn: Deployed, tampered: Tamper) -> None:
    """No code of these batches needs to change: the constant itself is compared."""
    graph = onnx.load(str(cnn.path)).graph
    scale = next(node.input[1] for node in graph.node if node.output[0] == "block.conv1.output")
    path = tampered(cnn.path, scale, lambda x: np.nextafter(x, np.float32(np.inf)))
    first = cnn.verify(path).comparison("constants").first
    assert first is not None
    assert first.name == "block.conv1.output (scales)"
    assert first.right == float(np.nextafter(np.float32(first.left), np.float32(np.inf)))


def test_one_weight_scale_changed_by_one_ulp(deployed_bert: Callable[[str], Deployed], tampered: Tamper) -> None:
    deployed = deployed_bert("ort:int8")

    def change(scale: np.ndarray) -> np.ndarray:
        scale[7] = np.nextafter(scale[7], np.float32(0))
        return scale

    path = tampered(deployed.path, f"{QUERY}.weight_scale", change)
    with pytest.raises(ParityError, match=rf"{QUERY}\.weight_scale'.*index \[7\]"):
        deployed.verify(path).raise_on_difference()


def test_a_changed_float_parameter(deployed_bert: Callable[[str], Deployed], tampered: Tamper) -> None:
    deployed, name = deployed_bert("ort:int8"), "bert.encoder.layer.0.output.LayerNorm.weight"
    path = tampered(deployed.path, name, lambda x: np.nextafter(x, np.float32(9)))
    with pytest.raises(ParityError, match=name):
        deployed.verify(path).raise_on_difference()


def test_weights_of_another_training(cnn: Deployed) -> None:
    """Same architecture, other weights: a difference named after the first tensor, not a crash."""
    first = qt.verify(None, cnn.artifact, _export_other(cnn), cnn.batches).comparison("constants").first
    assert first is not None
    assert first.name == "conv.weight"


def _export_other(cnn: Deployed) -> Path:
    path = cnn.path.with_name("other.onnx")
    if not path.is_file():
        model = qt.prepare(resnet(seed=5), qt.plan(resnet(seed=5), "ort:int8", cnn.batches[0]))
        qt.calibrate(model, cnn.batches)
        qt.export(qt.convert(model), path)
    return path


def test_a_model_trained_on_after_conversion(cnn: Deployed) -> None:
    model = copy.deepcopy(cnn.model)
    with torch.no_grad():
        model.get_parameter("block.conv2.weight").mul_(1 + 0.5 * torch.rand(8, 8, 3, 3))
    certificate = qt.verify(model, cnn.artifact, cnn.path, cnn.batches)
    first = certificate.comparison("training").first
    assert first is not None
    assert first.name == "block.conv2.weight"
    with pytest.raises(ParityError, match="QAT model and integer model differ"):
        certificate.raise_on_difference()


def test_a_drift_names_the_float_operator_that_began_it(deployed_bert: Callable[[str], Deployed]) -> None:
    """GELU of the integer model replaced by its tanh form: first different codes behind the first GELU, and only there at its place."""
    deployed = deployed_bert("ort:int8")
    artifact = copy.deepcopy(deployed.artifact)
    gelus = [n for n in artifact.graph_module.graph.nodes if n.target is torch.ops.aten.gelu.default]
    gelus[0].kwargs = {"approximate": "tanh"}
    artifact.graph_module.recompile()
    assert isinstance(artifact.graph_module, GraphModule)
    certificate = qt.verify(None, artifact, deployed.path, deployed.batches)
    end, between = certificate.comparison("end to end"), certificate.comparison("float operators")
    assert end.first is not None
    assert (end.first.name, end.began_at) == ("bert.encoder.layer.0.output.dense.input", "gelu")
    assert [tally.name for tally in between.tallies.values() if tally.rate > 1e-4] == [end.first.name]
    assert certificate.comparison("layer by layer").different == 0
    with pytest.raises(ParityError, match=r"float operators.*layer\.0\.output\.dense\.input"):
        certificate.raise_on_difference()


def test_a_product_that_runs_in_float(cnn: Deployed) -> None:
    """With two sign changes between Conv and QuantizeLinear every value stays, and the pattern that ONNX Runtime fuses is gone."""
    model = onnx.load(str(cnn.path))
    quantize = next(node for node in model.graph.node if node.output[0] == "block.conv2.output")
    place = list(model.graph.node).index(quantize)
    model.graph.node.insert(place, onnx.helper.make_node("Neg", ["minus"], ["plus"]))
    model.graph.node.insert(place, onnx.helper.make_node("Neg", [quantize.input[0]], ["minus"]))
    quantize.input[0] = "plus"
    path = cnn.path.with_name("float.onnx")
    onnx.save(model, str(path))
    certificate = cnn.verify(path)
    assert not certificate.verdict
    assert any("in float, where the plan says integer" in problem for problem in certificate.problems)
    with pytest.raises(ParityError, match="in float, where the plan says integer"):
        certificate.raise_on_difference()


# -- bad input -------------------------------------------------------------------------------------------------------
def test_a_truncated_file(cnn: Deployed, tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    path.write_bytes(cnn.path.read_bytes()[:-500])
    with pytest.raises(ArtifactError, match=r"half\.onnx"):
        cnn.verify(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07"])
def test_no_onnx_file(cnn: Deployed, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"x\.onnx"):
        cnn.verify(path)


def test_a_missing_file(cnn: Deployed, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot read .*gone\.onnx: No such file"):
        cnn.verify(tmp_path / "gone.onnx")


def test_a_file_that_is_not_ours(cnn: Deployed, tmp_path: Path) -> None:
    model = onnx.load(str(cnn.path))
    del model.metadata_props[:]
    onnx.save(model, str(tmp_path / "foreign.onnx"))
    with pytest.raises(ArtifactError, match=r"foreign\.onnx was not written by qatana"):
        cnn.verify(tmp_path / "foreign.onnx")


def test_a_file_of_another_target(deployed_bert: Callable[[str], Deployed]) -> None:
    with pytest.raises(ArtifactError, match="was exported for ort:int4, the artifact for ort:int8"):
        deployed_bert("ort:int8").verify(deployed_bert("ort:int4").path)


def test_a_file_of_another_network(cnn: Deployed, deployed_bert: Callable[[str], Deployed]) -> None:
    with pytest.raises(ArtifactError, match="belongs to another artifact"):
        cnn.verify(deployed_bert("ort:int8").path)


def test_a_value_that_is_gone(cnn: Deployed, tmp_path: Path) -> None:
    model = onnx.load(str(cnn.path))
    for node in model.graph.node:
        node.input[:] = ["renamed" if name == "conv.output" else name for name in node.input]
        node.output[:] = ["renamed" if name == "conv.output" else name for name in node.output]
    onnx.save(model, str(tmp_path / "renamed.onnx"))
    with pytest.raises(ArtifactError, match=r"changed after export: value 'conv\.output' is gone"):
        cnn.verify(tmp_path / "renamed.onnx")


def test_no_batches(cnn: Deployed) -> None:
    with pytest.raises(DataError, match="verify got no batch"):
        qt.verify(cnn.model, cnn.artifact, cnn.path, [])


def test_a_batch_without_an_input(deployed_bert: Callable[[str], Deployed]) -> None:
    deployed = deployed_bert("ort:int8")
    batch = {name: x for name, x in bert_batches(1)[0].items() if name != "attention_mask"}
    with pytest.raises(DataError, match="lacks input 'attention_mask'"):
        qt.verify(deployed.model, deployed.artifact, deployed.path, [batch])


def test_a_model_whose_quantizers_are_off(cnn: Deployed) -> None:
    model = copy.deepcopy(cnn.model)
    qt.quantizers(model)["conv.output"].enabled = False
    with pytest.raises(ModelError, match=r"'conv\.output' is off"):
        qt.verify(model, cnn.artifact, cnn.path, cnn.batches)
    with pytest.raises(ModelError, match="no quantizers"):
        qt.verify(resnet(), cnn.artifact, cnn.path, cnn.batches)


# -- the certificate -------------------------------------------------------------------------------------------------
def test_the_certificate_on_disk_is_what_the_report_reads(cnn: Deployed, tmp_path: Path) -> None:
    path = cnn.verify().save(tmp_path)
    assert path == tmp_path / "certificate.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    read = ReportCertificate.model_validate(data)
    assert read.verdict == "pass"
    assert read.files[0].path == cnn.path.name
    assert str(cnn.path.parent) not in path.read_text(encoding="utf-8")
    assert data["target"] == "ort:int8"
    assert data["isa"]
    assert data["versions"]["onnxruntime"]
    assert [row.name for row in read.comparisons[2].layers] == [
        "conv.input", "conv.output", "block.conv1.output", "block.conv2.output", "add.output", "pool.output",
    ]  # fmt: skip
