"""The states of all random generators that a training draws from, as tensors and plain numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed(number: int) -> None:
    """Seed torch, NumPy and Python alike."""
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


@dataclass
class RandomState:
    """Generators at one moment.

    tensors  "torch" uint8, "numpy" and "python" int64, "cuda.<i>" uint8
    numbers  what of them is no array of integers"""

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]

    @classmethod
    def now(cls) -> RandomState:
        """The generators as they stand."""
        version, words, gauss = random.getstate()
        legacy: Any = np.random.get_state(legacy=False)
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(words, dtype=torch.int64),
            "numpy": torch.from_numpy(legacy["state"]["key"].astype(np.int64)),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        numbers = {
            "python": [version, gauss],
            "numpy": [legacy["bit_generator"], legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]],
        }
        return cls(tensors, numbers)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.tensors["torch"])
        version, gauss = self.numbers["python"]
        random.setstate((version, tuple(self.tensors["python"].tolist()), gauss))
        name, position, has_gauss, cached = self.numbers["numpy"]
        key = self.tensors["numpy"].numpy().astype(np.uint32)
        np.random.set_state((name, key, position, has_gauss, cached))
        cuda = [self.tensors[k] for k in sorted(k for k in self.tensors if k.startswith("cuda."))]
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
