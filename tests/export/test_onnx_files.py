"""Law 3 outside PyTorch: the exported file in ONNX Runtime and OpenVINO, on graphs as the engines optimize them."""

from __future__ import annotations

import copy
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.files import FLOAT_PRODUCTS, codes, metadata, openvino_outputs, optimized, outputs
from support.flows import bert, cnn, exported
from support.networks import images

import qatana as qt

pytestmark = [pytest.mark.engine, pytest.mark.slow]

NETWORKS = ["functional", "bottleneck", "mixed", "1d", "control-flow", "pre-activation"]
TARGETS = ["ort:int8", "ort:int8-dynamic", "ort:int4", "ort:int2"]


def differences(theirs: np.ndarray, ours: torch.Tensor) -> int:
    """Codes that differ; what reads a tensor last may have seen it flattened."""
    assert theirs.size == ours.numel()
    return int((theirs.ravel() != ours.numpy().ravel()).sum())


@pytest.mark.parametrize(("case", "bits"), [*((case, 8) for case in NETWORKS), ("functional", 4)])
def test_networks_are_bit_equal_in_onnx_runtime(case: str, bits: int) -> None:
    """Every code at every quantizer, and the float outputs."""
    flow, path = cnn(case, bits), exported(case, bits)
    ours = flow.codes()
    theirs = codes(path, flow.inputs, set(ours))
    activations = {
        row.name for row in flow.plan.rows if row.scheme is not None and row.role != "weight" and not row.shares
    }
    assert set(theirs) == activations
    different = {name: differences(theirs[name], ours[name]) for name in theirs}
    assert not any(different.values()), different
    assert np.array_equal(outputs(path, flow.inputs), flow.outputs(flow.model).numpy())


@pytest.mark.parametrize("case", NETWORKS)
def test_no_float_product_is_left(case: str, tmp_path: Path) -> None:
    kinds = [node.op_type for node in optimized(exported(case), tmp_path)]
    assert not FLOAT_PRODUCTS & set(kinds)
    flow = cnn(case)
    planned = {
        kind: sum(row.kind == kind and row.role == "weight" for row in flow.plan.rows) for kind in ("conv", "linear")
    }
    assert kinds.count("QLinearConv") == planned["conv"]
    assert kinds.count("QGemm") == planned["linear"]
    assert kinds.count("QLinearAdd") == sum(row.kind == "add" and row.role == "input" for row in flow.plan.rows)
    assert kinds.count("QLinearGlobalAveragePool") == 1


@pytest.mark.parametrize("count", [1, 5])
def test_the_batch_is_free(count: int) -> None:
    flow, x = cnn("functional"), images("functional", count, seed=40)
    with torch.no_grad():
        expected = flow.model(x).numpy()
    assert np.array_equal(outputs(exported("functional"), {"input": x.numpy()}), expected)


@pytest.mark.parametrize("case", ["functional", "mixed", "1d"])
def test_networks_in_openvino(case: str) -> None:
    """The file loads and computes the same network: OpenVINO rounds by rules of its own, so a code may differ by one here and there."""
    flow = cnn(case)
    expected = flow.outputs(flow.model).numpy()
    found = openvino_outputs(exported(case), flow.inputs)
    pooled = next(row.name for row in flow.plan.rows if row.kind == "pool" and row.role == "output")
    step = float(qt.quantizers(flow.model)[pooled].scale)
    linear = next(row.module for row in flow.plan.rows if row.kind == "linear")
    weight = flow.model.get_parameter(f"{linear}.weight").detach()
    # two codes off at every input of the classifier
    assert np.abs(found - expected).max() <= 2 * step * float(weight.abs().sum(1).max())
    assert found.shape == expected.shape


def test_bert_int8_runs_on_integers(tmp_path: Path) -> None:
    """All linear layers but the skipped classifier, and both attention products."""
    kinds = [node.op_type for node in optimized(exported("ort:int8"), tmp_path)]
    assert kinds.count("QGemm") == 12
    assert kinds.count("QLinearMatMul") == 2
    assert kinds.count("MatMulIntegerToFloat") == 2
    assert sum(kinds.count(kind) for kind in FLOAT_PRODUCTS) == 1  # the classifier


def test_bert_int8_codes() -> None:
    """Softmax, GELU and LayerNorm have other last bits in the engine: about 1 code in 100,000 flips at each and a flip spreads along
    its token, so of some 150,000 codes a handful may differ; by one step where it begins."""
    flow, path = bert("ort:int8"), exported("ort:int8")
    ours = flow.codes()
    theirs = codes(path, flow.inputs, set(ours))
    assert set(theirs) == {
        row.name for row in flow.plan.rows if row.scheme is not None and row.role != "weight" and not row.shares
    }
    total = sum(v.size for v in theirs.values())
    different = sum(differences(theirs[name], ours[name]) for name in theirs)
    assert different <= 1e-3 * total
    expected, found = flow.outputs(flow.model).numpy(), outputs(path, flow.inputs)
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("target", ["ort:int8-dynamic", "ort:int4", "ort:int2"])
def test_bert_with_run_time_activations(target: str, tmp_path: Path) -> None:
    """Only the order of float sums differs (a few ulp), which now and then flips an activation code of a later layer.

    Query, key and value read one tensor: its quantization then stands alone, and their products are MatMulIntegerToFloat."""
    flow, path = bert(target), exported(target)
    kinds = [node.op_type for node in optimized(path, tmp_path)]
    if target == "ort:int8-dynamic":
        assert (kinds.count("DynamicQuantizeMatMul"), kinds.count("MatMulIntegerToFloat")) == (7, 6)
    else:
        assert kinds.count("MatMulNBits") == 13
    floats = [k for k in kinds if k in FLOAT_PRODUCTS]
    assert len(floats) == 4  # the products of attention: this target leaves them float
    expected, found = flow.outputs(flow.model).numpy(), outputs(path, flow.inputs)
    without = copy.deepcopy(flow.model)
    for quantizer in qt.quantizers(without).values():
        quantizer.enabled = False
    # a flip spreads to all tokens through attention and, per tensor, through the range; it then moves codes that were near a tie,
    # by much less than quantization itself moved the outputs. Without a flip (blocks here) only ulps differ
    noise = np.linalg.norm(expected - flow.outputs(without).numpy())
    assert np.linalg.norm(found - expected) <= 0.5 * noise
    assert np.array_equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    ("target", "kind"),
    [("ort:int4", "GatherBlockQuantized"), ("ort:int2", "GatherBlockQuantized"), ("ort:int8", "Gather")],
)
def test_embeddings_stay_integers(target: str, kind: str) -> None:
    model = onnx.load(str(exported(target)))
    stored = {t.name: t.data_type for t in model.graph.initializer}
    gathers = [
        n
        for n in model.graph.node
        if n.op_type == kind and stored.get(n.input[0]) in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    ]
    assert len(gathers) == 3


@pytest.mark.parametrize("target", TARGETS)
def test_bert_loads_in_openvino(target: str) -> None:
    """Same network, other arithmetic (OpenVINO quantizes run-time activations by rules of its own, or not at all)."""
    flow = bert(target)
    expected, found = flow.outputs(flow.model).numpy(), openvino_outputs(exported(target), flow.inputs)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < (0.15 if target == "ort:int2" else 0.1)


@pytest.mark.parametrize(("target", "most"), [("ort:int8", 0.35), ("ort:int4", 0.27), ("ort:int2", 0.25)])
def test_files_are_as_small_as_the_plan_says(target: str, most: float) -> None:
    """Prediction and file differ by the graph, which does not grow with the model: 80 kB at the most here."""
    flow, size = bert(target), exported(target).stat().st_size
    assert 0 <= size - flow.plan.predicted_bytes <= 80_000
    assert size / flow.plan.float_bytes < most


def test_names_and_metadata() -> None:
    flow, path = cnn("functional"), exported("functional")
    data = metadata(path)
    assert data["target"] == "ort:int8"
    assert set(data["values"]) == {node.name for node in flow.artifact.operators()}
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    made = {name for node in model.graph.node for name in node.output}
    assert set(flow.artifact.code_nodes().values()) <= made
    assert [i.name for i in model.graph.input] == ["input"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert [i.name for i in onnx.load(str(exported("ort:int8"))).graph.input] == [
        "input_ids",
        "attention_mask",
        "token_type_ids",
    ]


def test_the_file_tells_nothing_of_this_machine() -> None:
    """No source paths, stack traces or node documentation of the exporter."""
    raw = exported("functional").read_bytes()
    assert str(Path(__file__).resolve().parents[2]).encode() not in raw
    assert b"site-packages" not in raw


def test_bad_destinations(tmp_path: Path) -> None:
    artifact = cnn("functional").artifact
    with pytest.raises(qt.QatanaError, match=r"name the file 'model.onnx', not 'model.bin'"):
        qt.export(artifact, tmp_path / "model.bin")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(qt.QatanaError, match="cannot write"):
        qt.export(artifact, tmp_path / "file" / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(qt.QatanaError, match="choose a folder that you may write to"):
        qt.export(cnn("functional").artifact, folder / "model.onnx")
