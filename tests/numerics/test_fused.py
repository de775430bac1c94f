"""Compiled loops give the bits of the functions they were made from; gradients that are sums come in another order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatana.numerics import (
    Affine,
    coded_add,
    coded_attention,
    coded_conv,
    fake_quantize_by,
    fused,
    products,
    scheme,
)
from qatana.numerics.coded import decode, encode, encode_rows, encode_weight
from qatana.numerics.integer_sums import Geometry
from qatana.numerics.masks import apply_mask, pack_mask, unpack_mask

pytestmark = pytest.mark.skipif(fused.compiler() is None, reason="no C++ compiler, so nothing is compiled")
ACTIVATION = scheme("uint8", symmetric=False)
WEIGHT = scheme("int8n", "channel", scale="dynamic")
SCALE, ZERO, OUT = torch.tensor(0.02), torch.tensor(121.0), Affine.of(0.05, 130, 0, 255)
Case = Callable[[], tuple[list[Tensor], list[Tensor]]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def leaf(*shape: int) -> Tensor:
    return (torch.randn(*shape) * 2).requires_grad_()


def results(outputs: list[Tensor], y: Tensor, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return outputs, list(torch.autograd.grad(y, inputs, torch.randn_like(y)))


@case
def activation():
    x = leaf(5, 331)
    found = encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime")
    return results([found.codes], decode(found), [x])


@case
def activation_behind_relu():
    x = leaf(3, 6, 7, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    found = encode(x, SCALE, torch.tensor(3.0), ACTIVATION, "onnxruntime", relu=True)
    return results([found.codes], decode(found), [x])


@case
def activation_with_learned_scale():
    x, scale = leaf(6, 256), SCALE.clone().requires_grad_()
    found = encode(x, scale, ZERO, ACTIVATION, "onnxruntime")
    return results([found.codes], decode(found), [x, scale])


def linear_operands(rows: int, k: int, n: int = 20):
    x, w, b = leaf(rows, k), leaf(n, k), leaf(n)
    return x, w, b, encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT)


@case
def linear():
    x, w, b, coded_x, coded_w = linear_operands(9, 1500)
    y = products.linear(coded_x, coded_w, b, "onnxruntime")
    return results([coded_w.codes, coded_w.scale, y], y, [x, w, b])


@case
def linear_with_gradients_in_bfloat16():
    x, w, b, coded_x, coded_w = linear_operands(9, 70)
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(coded_x, coded_w, b, "onnxruntime")
    return results([y], y, [x, w, b])


@case
def rows_and_blocks():
    x, w, b = leaf(9, 192), leaf(20, 192), leaf(20)
    coded = (
        encode_rows(x, scheme("int8", "token", scale="dynamic")),
        encode_weight(w, scheme("int4", "group64", scale="dynamic")),
    )
    y = products.linear(*coded, b, products.ROWS)
    return results([coded[0].codes, coded[1].codes, y], y, [x, w, b])


@case
def linear_requantized():
    x, w, b, coded_x, coded_w = linear_operands(9, 70)
    y = products.linear_requantized(coded_x, coded_w, b, "onnxruntime", OUT, False)
    return results([y], y, [x, w, b])


@case
def linear_requantized_by_a_learned_scale():
    x, w, b, coded_x, coded_w = linear_operands(9, 70)
    scale = OUT.scale.clone().requires_grad_()
    y = products.linear_requantized(coded_x, coded_w, b, "onnxruntime", OUT._replace(scale=scale), True)
    return results([y], y, [x, w, b, scale])


@case
def convolution():
    x, w, b, factor = leaf(3, 8, 7, 9), leaf(6, 8, 3, 3), leaf(6), torch.rand(6).requires_grad_()
    coded = encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT)
    y = coded_conv.convolution(*coded, b, factor, Geometry([2, 1], [1, 1], [1, 1], 1))
    return results([y], y, [x, w, b, factor])


@case
def convolution_whose_sums_become_its_output():
    """Channels last, the sums come out as the output lies: the pass over them works in place."""
    x = leaf(3, 16, 7, 5).detach().to(memory_format=torch.channels_last).requires_grad_()
    w = leaf(16, 16, 3, 3)
    operands = encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime"), encode_weight(w, WEIGHT)
    y = coded_conv.convolution(*operands, None, torch.rand(16) + 0.5, Geometry([1, 1], [1, 1], [1, 1], 1))
    return results([], y, [x, w])


@case
def convolution_requantized_and_a_sum():
    x, w, b = leaf(3, 8, 7, 9), leaf(8, 8, 3, 3), leaf(8)
    coded = encode(x, SCALE, ZERO, ACTIVATION, "onnxruntime")
    geometry = Geometry([1, 1], [1, 1], [1, 1], 1)
    place, codes = coded_conv.convolution_requantized(
        coded, encode_weight(w, WEIGHT), b, geometry, "onnxruntime", OUT, True
    )
    found = coded._replace(hat=place, codes=codes, scale=OUT.scale, zero_point=OUT.zero_point - 128)
    place, total = coded_add.add(found, coded, OUT, True, "onnxruntime")
    y = decode(found._replace(hat=place, codes=total))
    return results([codes, total], y, [x, w, b])


@case
def attention():
    x = [leaf(2, 3, 10, 16) for _ in range(3)]
    q, k, v = (encode(t, SCALE, ZERO, ACTIVATION, "onnxruntime") for t in x)
    mask = torch.zeros(2, 1, 1, 10)
    mask[1, ..., 7:] = -1e9
    p = Affine.of(1 / 255, 0, 0, 255)
    y, codes = coded_attention.attention(q, k, v, mask, 0.25, 0.1, p, OUT, "onnxruntime", keep=True)
    return results([y, codes], y, x)


@case
def masks():
    x, inside = torch.randn(1337), torch.rand(1337) < 0.7
    bits = pack_mask(inside)
    return [bits, unpack_mask(bits, 1337), apply_mask(x, bits)], []


SCHEMES = [
    scheme("int4", "group32", scale="learned"),
    scheme("int8", "channel1", scale="learned"),
    scheme("int8", "tensor", scale="learned"),
    scheme("uint4", "group32", symmetric=False, scale="learned"),
    scheme("int4", "channel", scale_type="float16", scale="dynamic"),
    *(
        scheme("int4", "group32", rule=rule, scale="dynamic")
        for rule in ("", "torchao", "gptq", "awq", "compressed-tensors")
    ),
    scheme("uint4", "group32", symmetric=False, rule="compressed-tensors", scale="dynamic"),
    scheme("int8", "token", scale="dynamic"),
]


@pytest.fixture
def every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a test are small."""
    monkeypatch.setattr(fused, "WORTH", 1)


def both(function: Callable[[], tuple[list[Tensor], list[Tensor]]]) -> tuple[tuple[list[Tensor], list[Tensor]], ...]:
    """The results by torch's operators and by compiled loops, of which there must be some."""
    found = []
    for wanted in (False, True):
        torch.manual_seed(0)
        with fused.compiled(wanted):
            found.append(function())
            assert fused._state["asked"] == wanted  # a failure to compile turns it off
    assert any(loop is not None for loop in fused._loops.values())
    return tuple(found)


def assert_same(plain: tuple[list[Tensor], list[Tensor]], compiled: tuple[list[Tensor], list[Tensor]]) -> None:
    for a, b in zip(plain[0], compiled[0], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    for a, b in zip(
        plain[1], compiled[1], strict=True
    ):  # sums of up to 1,500 terms in another order: some 2^-24 of the largest
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str, every_size: None) -> None:
    assert_same(*both(CASES[name]))


def _shifted(x: Tensor, by: Tensor) -> tuple[Tensor]:
    return (x * 2 + by,)


def test_an_operand_that_is_the_result(every_size: None) -> None:
    """Two views of the same numbers, one read, one written."""
    by = torch.randn(1, 40)
    for wanted in (False, True):
        x = torch.randn(40, 30)
        expected = x.t() * 2 + by
        with fused.compiled(wanted):
            fused.sweep(_shifted, [x.t()], [x.view(40, 30).t(), by])
        assert torch.equal(x.t(), expected)


def test_a_call_made_before_asks_nothing_again(every_size: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of the same shapes goes straight to the compiled code; one of other shapes, strides or threads does not."""

    def call(x: Tensor, by: Tensor) -> None:
        out = torch.empty_like(x)
        fused.sweep(_shifted, [out], [x, by])
        assert torch.equal(out, x * 2 + by)

    asked: list[int] = []
    loop = fused._loop
    monkeypatch.setattr(fused, "_loop", lambda *args: asked.append(1) or loop(*args))
    fused._ready.clear()
    with fused.compiled(True):
        for made, x in enumerate((torch.randn(37, 30), torch.randn(38, 30), torch.randn(30, 37).t()), start=1):
            for _ in range(2):
                call(x, torch.randn(1, 30))
                assert len(asked) == made
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            call(torch.randn(37, 30), torch.randn(1, 30))
        finally:
            torch.set_num_threads(threads)
        assert len(asked) == 4


def test_an_operand_in_the_memory_of_the_result(every_size: None) -> None:
    """A call is remembered by shapes, which do not tell whether memory is shared: such a call is never taken for another."""
    with fused.compiled(True):
        for shared in (False, True, False):
            memory = torch.randn(41, 30)
            x, out = (memory[:40], memory[1:]) if shared else (memory[:40], torch.empty(40, 30))
            expected = x * 2 + 1
            by = torch.ones(1, 30)
            if shared:  # rows overlap: only that it is asked anew can be told, the order of rows is the loop's own
                assert fused._call_key(_shifted, [out], [x, by], (), (None, None)) is None
                continue
            fused.sweep(_shifted, [out], [x, by])
            assert torch.equal(out, expected)


@pytest.mark.parametrize("found", SCHEMES, ids=str)
def test_schemes(found, every_size: None) -> None:
    def run() -> tuple[list[Tensor], list[Tensor]]:
        x = leaf(24, 96)
        given = []
        if found.scale == "learned":
            shape = found.granularity.scale_shape(x.shape)
            offset = torch.full(shape, 7.0 if not found.symmetric else float(found.zero_point))
            given = [(0.1 + 0.3 * torch.rand(shape)).requires_grad_(), offset]
        y = fake_quantize_by(x, found, *given)
        return results([y], y, [x, *given[:1]])

    assert_same(*both(run))


SCRIPT = """
import torch, warnings
from qatana.numerics import fake_quantize_by, scheme
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = fake_quantize_by(torch.linspace(-1, 1, 2**19).view(512, 1024), scheme("int8", "channel", scale="dynamic"))
print([str(w.message)[:20] for w in caught if "torch.compile failed" in str(w.message)], float(y.double().sum()), y.unique().numel())
"""


def ran(tmp_path: Path, **environment: str) -> str:
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | cache | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_a_compiler(tmp_path: Path) -> None:
    """No compiler, one that is not asked, and one that fails: the same numbers; only the failure is worth a warning."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    plain = ran(tmp_path, QATANA_COMPILE="0")
    assert plain.startswith("[] ")
    assert ran(tmp_path, CXX="no-such-compiler") == plain
    failed = ran(tmp_path, CXX=str(broken))
    assert failed == plain.replace("[]", "['torch.compile failed']", 1)
