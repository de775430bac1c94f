"""Writes tests/recipe/other_libraries.safetensors: weights as optimum-quanto, GPTQ and AWQ quantize them.

These libraries want other versions of transformers, or GPUs, and are not installed with the tests. Make them an environment:

    python -m venv other && other/bin/pip install torch==2.13.0 transformers==5.23.0 optimum-quanto==0.2.7 datasets==5.2.0 accelerate
    other/bin/pip install --no-deps --no-build-isolation auto-gptq==0.7.1 autoawq==0.2.9
    other/bin/python tests/support/record_other_libraries.py"""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

TARGET = Path(__file__).parents[1] / "recipe" / "other_libraries.safetensors"
GROUP = 64


def weights() -> Tensor:
    """(16, 256): random rows of many sizes; rows of bfloat16; rows on a grid, whose quotients by a scale tie; one-sided rows."""
    torch.manual_seed(0)
    x = torch.randn(16, 256) * torch.logspace(-2, 1, 16)[:, None]
    x[6:9] = x[6:9].bfloat16().float()
    x[9:12] = torch.randint(-30, 31, (3, 256)) / 16
    x[9:12, ::32] = torch.tensor([-1.875, 1.875]).repeat(4)
    x[15] = x[15].abs() + 1
    return x


def quanto(x: Tensor) -> dict[str, Tensor]:
    """`QLinear`, as transformers makes it of a QuantoConfig."""
    library: Any = importlib.import_module("optimum.quanto")
    names = {"int8": "qint8", "int4": "qint4", "int2": "qint2", "float8": "qfloat8"}
    found = {}
    for ours, theirs in names.items():
        layer = library.QLinear(256, 16, bias=False, weights=getattr(library, theirs))
        layer.weight = torch.nn.Parameter(x.clone())
        layer.freeze()
        found[f"quanto.{ours}"] = layer.weight.dequantize().detach().contiguous()
    return found


def gptq(x: Tensor) -> dict[str, Tensor]:
    """Range and codes of groups by `Quantizer`; the package itself does not import with today's transformers, that file does."""
    spec = importlib.util.find_spec("auto_gptq")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    path = Path(spec.submodule_search_locations[0]) / "quantization" / "quantizer.py"
    file = importlib.util.spec_from_file_location("gptq_quantizer", path)
    assert file is not None
    assert file.loader is not None
    module: Any = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    found = {}
    for bits in (4, 8):
        for symmetric in (True, False):
            quantizer = module.Quantizer()
            quantizer.configure(bits, perchannel=True, sym=symmetric)
            groups = x.reshape(-1, GROUP)
            quantizer.find_params(groups, weight=True)
            found[f"gptq.{bits}.{'sym' if symmetric else 'asym'}"] = quantizer.quantize(groups).reshape(x.shape)
    return found


def awq(x: Tensor) -> dict[str, Tensor]:
    """`pseudo_quantize_tensor`; whether there is a zero point is a field of its object."""
    cls: Any = importlib.import_module("awq.quantize.quantizer").AwqQuantizer
    found = {}
    for zero_point in (True, False):
        quantizer = cls.__new__(cls)
        quantizer.group_size, quantizer.zero_point, quantizer.w_bit = GROUP, zero_point, 4
        found[f"awq.{'asym' if zero_point else 'sym'}"] = quantizer.pseudo_quantize_tensor(x.clone())[0]
    return found


def main() -> None:
    x = weights()
    tensors = {"x": x} | quanto(x) | gptq(x) | awq(x)
    made = {name: version(name) for name in ("torch", "optimum-quanto", "auto-gptq", "autoawq")}
    save_file({name: value.contiguous() for name, value in tensors.items()}, TARGET, made)


if __name__ == "__main__":
    main()
