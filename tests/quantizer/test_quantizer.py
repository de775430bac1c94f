"""The quantizer as a module: plain state, copies, files, switches, errors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

import qatana as qt
from qatana.errors import ModelError, SchemeError
from qatana.numerics import Scheme
from qatana.quantizer import Quantizer

SCHEMES = {
    "static": qt.scheme("uint8", symmetric=False),
    "percentile": qt.scheme("uint8", symmetric=False, range="percentile"),
    "mse": qt.scheme("int8", range="mse"),
    "learned": qt.scheme("int4", scale="learned"),
    "fixed": qt.scheme("uint8", symmetric=False, fixed=(1 / 255, 0)),
    "dynamic": qt.scheme("uint8", symmetric=False, scale="dynamic"),
    "blocks": qt.scheme("int8n", "group32", scale="dynamic"),
}


def calibrated(scheme: Scheme, x: Tensor) -> Quantizer:
    quantizer = Quantizer(scheme, None, "x")
    quantizer.observe(x)
    quantizer.settle()
    quantizer.enabled = True
    return quantizer


@pytest.fixture(params=SCHEMES)
def case(request: pytest.FixtureRequest) -> tuple[Quantizer, Tensor]:
    x = torch.randn(4, 64)
    return calibrated(SCHEMES[request.param], x), x


def test_state_has_its_shape_from_construction(case: tuple[Quantizer, Tensor]) -> None:
    quantizer, x = case
    fresh = Quantizer(quantizer.scheme, None, "x")
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {
        k: v.shape for k, v in quantizer.state_dict().items()
    }
    fresh.load_state_dict(quantizer.state_dict())
    fresh.enabled = True
    assert torch.equal(fresh(x), quantizer(x))


def test_copies(case: tuple[Quantizer, Tensor]) -> None:
    quantizer, x = case
    expected = quantizer(x)
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):  # noqa: S301 (our own bytes)
        assert torch.equal(twin(x), expected)
        assert twin.scheme == quantizer.scheme
        with torch.no_grad():
            twin.scale.mul_(2)
        assert torch.equal(quantizer(x), expected)


def test_safetensors(case: tuple[Quantizer, Tensor], tmp_path: Path) -> None:
    quantizer, x = case
    save_model(quantizer, str(tmp_path / "q.safetensors"))
    fresh = Quantizer(quantizer.scheme, None, "x")
    load_model(fresh, str(tmp_path / "q.safetensors"))
    fresh.enabled = True
    assert torch.equal(fresh(x), quantizer(x))


def test_learned_scales_are_parameters() -> None:
    assert [name for name, _ in Quantizer(SCHEMES["learned"], None, "x").named_parameters()] == ["scale"]
    assert [name for name, _ in Quantizer(SCHEMES["static"], None, "x").named_parameters()] == []


def test_a_learned_scale_learns() -> None:
    """Descent on the quantization error reaches what a search over scales finds best."""
    x = torch.randn(64, 64)
    quantizer = calibrated(qt.scheme("int4", scale="learned"), x)

    def error(scale: Tensor) -> float:
        return float((torch.clamp(torch.round(x / scale), -8, 7) * scale - x).square().mean())

    best = min(error(s) for s in torch.linspace(0.1, 1, 300))
    before = error(quantizer.scale.detach())
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    after = error(quantizer.scale.detach())
    assert before > 1.3 * best
    assert after < 1.05 * best  # within a few steps of size 3e-3 of the minimum


def test_a_learned_scale_never_divides_by_zero() -> None:
    quantizer = calibrated(qt.scheme("int4", scale="learned"), torch.randn(8))
    with torch.no_grad():
        quantizer.scale.zero_()
    assert bool(torch.isfinite(quantizer(torch.randn(8))).all())


def test_disabled_is_the_identity() -> None:
    quantizer, x = Quantizer(SCHEMES["static"], None, "x"), torch.randn(4)
    assert quantizer(x) is x


def test_observing_takes_batches_in_passing() -> None:
    quantizer = Quantizer(SCHEMES["static"], None, "x")
    quantizer.observing = True
    for k in (1.0, 5.0):
        quantizer(torch.tensor([-k, k]))
    assert quantizer.range is not None
    assert (float(quantizer.range.low), float(quantizer.range.high), int(quantizer.range.count)) == (-5, 5, 2)


def test_the_tap_hears_codes() -> None:
    x = torch.randn(3, 4)
    quantizer = calibrated(SCHEMES["static"], x)
    heard: dict[str, Tensor] = {}
    quantizer.tap = heard.__setitem__
    y = quantizer(x)
    scale, zero = quantizer.scale.numpy(), quantizer.zero_point.numpy()
    assert heard["x"].dtype == torch.uint8
    assert np.array_equal(heard["x"].numpy(), np.clip(np.rint(x.numpy() / scale) + zero, 0, 255))
    assert np.array_equal(y.numpy(), (heard["x"].numpy() - zero) * scale)


def test_fixed_parameters_stay() -> None:
    quantizer = Quantizer(SCHEMES["fixed"], None, "p")
    quantizer.observe(torch.tensor([0.0, 40.0]))
    quantizer.settle()
    assert float(quantizer.scale) == np.float32(1 / 255)
    assert bool(quantizer.calibrated)


def test_errors_name_the_tensor() -> None:
    quantizer = Quantizer(SCHEMES["static"], None, "layer.fc.input")
    quantizer.enabled = True
    with pytest.raises(ModelError, match=r"layer.fc.input: not calibrated; run qatana.calibrate"):
        quantizer(torch.randn(3))
    with pytest.raises(ModelError, match=r"layer.fc.input: saw no data during calibration"):
        quantizer.settle()
    weight = Quantizer(qt.scheme("int8", "channel"), (2, 3), "layer.fc.weight")
    weight.enabled = True
    with pytest.raises(ModelError, match=r"layer.fc.weight: not calibrated"):
        weight(torch.randn(2, 3))
    with pytest.raises(SchemeError, match=r"layer.fc.weight: group size 32 does not divide the last dimension 40"):
        Quantizer(qt.scheme("int4", "group32"), (8, 40), "layer.fc.weight")


def test_quantizers_lists_shared_ones_once() -> None:
    shared = Quantizer(SCHEMES["static"], None, "a.input")
    model = nn.ModuleList([nn.Module(), nn.Module()])
    for module in model:
        module.input_quantizer = shared
    model.append(Quantizer(SCHEMES["fixed"], None, "b"))
    assert list(qt.quantizers(model)) == ["a.input", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_has_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8).to(dtype)
    quantizer = calibrated(SCHEMES["static"], x)
    expected = (np.clip(np.rint(x.float().numpy() / quantizer.scale.numpy()) + float(quantizer.zero_point), 0, 255)
                - float(quantizer.zero_point)) * quantizer.scale.numpy()  # fmt: skip
    assert quantizer(x).dtype == dtype
    assert torch.equal(quantizer(x), torch.from_numpy(expected.astype(np.float32)).to(dtype))
