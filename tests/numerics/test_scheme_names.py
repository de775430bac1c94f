"""Short names of schemes, what they stand for, and every impossible combination refused with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qatana.errors import SchemeError
from qatana.numerics import FloatFormat, Scheme, fake_quantize_by, scheme


@pytest.mark.parametrize(
    ("made", "written", "bits"),
    [
        (scheme("int4", group=128, symmetric=False), "int4/group128 asym static minmax", 4.28125),
        (scheme("mxfp8"), "e4m3/group32 sym dynamic e8m0:floor", 8.25),
        (scheme("mxfp8:e5m2", rule="even"), "e5m2/group32 sym dynamic e8m0:even", 8.25),
        (scheme("mxfp6:e3m2"), "e3m2/group32 sym dynamic e8m0:floor", 6.25),
        (scheme("mxfp4", rule="rceil"), "e2m1/group32 sym dynamic e8m0:rceil", 4.25),
        (scheme("nvfp4"), "e2m1/group16 sym dynamic e4m3", 4.5),
        (scheme("nf4"), "nf4/flat64 sym dynamic", 4.5),
        (scheme("nf4+double"), "nf4/flat64 sym dynamic double", 4 + (8 + 32 / 256) / 64),
        (scheme("fp4/flat128"), "fp4/flat128 sym dynamic", 4.25),
        (scheme("bitnet"), "int2n/tensor sym dynamic rule=absmean", 2),
        (scheme("binary"), "binary/channel sym dynamic", 1),
        (scheme("fp8:e4m3/token"), "e4m3/token sym dynamic", 8),
        (scheme("int8/token asym"), "int8/token asym dynamic", 8),
        (scheme("fp8:e5m2/tensor"), "e5m2/tensor sym static minmax", 8),
        (scheme("float(3,3)/group32", scale="learned"), "float(3,3)/group32 sym learned minmax", 8),
        (scheme("gguf:q4_0"), "gguf:q4_0/group32 sym dynamic", 4.5),
        (scheme("hqq4"), "uint4/group64 asym static rule=hqq", 5),
        (scheme("gguf:q4_k"), "gguf:q4_k/group32 sym static", 4.5),
        (scheme("nvfp4", scale="static"), "e2m1/group16 sym static e4m3", 4.5),
    ],
    ids=str,
)
def test_names(made: Scheme, written: str, bits: float) -> None:
    assert (str(made), made.bits_per_element) == (written, bits)
    assert Scheme.parse(written) == made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: scheme("int8", "token"), "per-token scales belong to activations and are dynamic"),
        (lambda: scheme("nf4", symmetric=False), "nf4 is symmetric about 0 and has no zero point"),
        (lambda: scheme("mxfp4", symmetric=False), "e2m1 is symmetric about 0 and has no zero point"),
        (lambda: scheme("gguf:q4_0", symmetric=False), "gguf:q4_0 is symmetric about 0"),
        (lambda: scheme("int1"), "int1 has nothing above its zero point"),
        (lambda: scheme("int8n", symmetric=False), "no room for a zero point"),
        (
            lambda: scheme("fp8:e4m3/group32", scale="learned", scale_type="e8m0"),
            "must be rounded to a power of two: say how",
        ),
        (lambda: scheme("mxfp4", scale="learned", rule="even"), "must be rounded to a power of two"),
        (lambda: scheme("nvfp4", scale="learned"), "follow from the tensor's own values and cannot be learned"),
        (lambda: scheme("nf4+double", scale="learned"), "static' \\(solved once, then held\\) or scale='dynamic'"),
        (lambda: scheme("bitnet", scale="learned"), "int2n with absmean follow from the tensor's own values"),
        (lambda: scheme("gguf:q8_0", scale="learned"), "cannot be learned"),
        (lambda: scheme("hqq4", scale="learned"), "static' \\(solved once, then held\\)$"),
        (lambda: scheme("hqq4", scale="dynamic"), "search that costs about [0-9]+ copies .* hold them: scale='static'"),
        (lambda: scheme("gguf:q4_k", scale="dynamic"), "gguf:q4_k are found by a search .* hold them"),
        (lambda: scheme("gguf:q5_k", scale="dynamic"), "hold them: scale='static'"),
        (lambda: scheme("gguf:q6_k", scale="dynamic"), "hold them: scale='static'"),
        (lambda: scheme("bitnet", scale="static", fixed=(0.1, 0)), "rule 'absmean' does not take"),
        (lambda: scheme("gguf:q8_0", group=64), "has blocks of 32 elements by definition"),
        (lambda: scheme("gguf:q9_0"), "unknown GGUF type 'q9_0'"),
        (lambda: scheme("mxfp8:e2m1"), "'mxfp8' has no variant 'e2m1'; write mxfp8:e4m3 or mxfp8:e5m2"),
        (lambda: scheme("mxfp4", rule="round"), "e8m0 knows no rule 'round'; its rules: floor, ceil, even, rceil"),
        (lambda: scheme("int8", scale_type="e4m3"), "e4m3 block scales belong to float formats"),
        (lambda: scheme("nvfp4/channel"), "per group with one float32 scale per tensor, not per channel"),
        (lambda: scheme("int4+double"), "belong to bitsandbytes' codebooks"),
        (lambda: scheme("nf4+double/tensor"), "need many blocks, not one per tensor"),
        (lambda: scheme("int8", scale_type="e8m0:even"), "looks at the mantissa of a float format"),
        (lambda: scheme("int8", scale_type="float8"), "unknown scale type 'float8'"),
        (lambda: scheme("int4", rule="absmean"), "rule 'absmean' is BitNet's for ternary weights"),
        (lambda: scheme("uint4", rule="hqq"), "float zero point per group"),
        (lambda: scheme("e4m3", rule="torchao"), "is one of integer formats"),
        (lambda: scheme("int8", rule="onnx"), "unknown rule 'onnx'"),
        (lambda: scheme("fp8", fixed=(0.1, 0)), "fixed parameters are for integer formats"),
        (lambda: scheme("int4/group32", "channel"), "two granularities, 'channel' and 'group32': say one"),
        (lambda: scheme("nf4+triple"), "unknown part '\\+triple'"),
        (lambda: scheme("nf5"), "unknown number format 'nf5'; did you mean 'nf4'"),
        (lambda: FloatFormat(8, 3), "1 to 7 exponent bits"),
    ],
)
def test_impossible_schemes(make: Any, reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        make()


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("mxfp4", (4, 40), "group size 32 does not divide the last dimension 40"),
        ("nvfp4", (4, 24), "group size 16 does not divide the last dimension 24"),
        ("gguf:q4_k", (4, 128), "rows of a multiple of 256"),
        ("gguf:q4_0", (4, 40), "group size 32 does not divide"),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(SchemeError, match=reason):
        fake_quantize_by(torch.randn(shape), scheme(name))


def test_a_scale_is_not_given_to_a_scheme_that_finds_its_own() -> None:
    with pytest.raises(SchemeError, match="cannot be given"):
        fake_quantize_by(torch.randn(4, 64), scheme("nvfp4"), torch.ones(4, 4, 1))
