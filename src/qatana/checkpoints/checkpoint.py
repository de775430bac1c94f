"""What a file of another library holds: quantized weights (codes, parameters, scheme) and the tensors that stayed float."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qatana.errors import SchemeError
from qatana.numerics import Parameters, Scheme, dequantize_by


@dataclass(frozen=True)
class Stored:
    """One quantized weight, as `numerics.quantize_by` returns one.

    scheme      the grid that its values lie on; how its writer chose the scales is not in a file, so that part is the default
    codes       in the format's storage dtype, shaped like the scheme's stack (`granularity.stack`)
    parameters  float32, broadcasting against the codes
    shape       of the weight;  dtype: what the writer's library dequantizes to
    transposed  the codes are those of the transposed weight (bitsandbytes on a transformers Conv1D)"""

    scheme: Scheme
    codes: Tensor
    parameters: Parameters
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    @classmethod
    def of(cls, scheme: Scheme, codes: Tensor, parameters: Parameters, dtype: torch.dtype) -> Stored:
        """From codes of the weight's shape and parameters of `granularity.scale_shape`. Raises: SchemeError if they do not fit."""
        granularity, shape = scheme.granularity, tuple(codes.shape)
        scheme.check(shape, "weight")
        for value in (parameters.scale, parameters.offset):
            if tuple(value.shape) != granularity.scale_shape(shape):
                raise SchemeError(
                    f"scales of shape {tuple(value.shape)} for a weight of shape {shape} per {granularity}: the file is damaged"
                )
        shaped = Parameters(*(granularity.stack_scale(value.float()) for value in parameters))
        return cls(scheme, granularity.stack(codes.contiguous()), shaped, shape, dtype)

    def values(self) -> Tensor:
        """The weight, float32: level * scale, or code * scale + offset, rounded once. Cast to `dtype` it is what the writer's
        library gives, bit for bit; of bitsandbytes' 8-bit weights up to two last places (`numerics.storage.unpack_8bit`)."""
        shape = self.shape[::-1] if self.transposed else self.shape
        values = dequantize_by(self.codes, self.parameters, self.scheme, shape)
        return values.t().contiguous() if self.transposed else values


@dataclass(frozen=True)
class Checkpoint:
    """A file or folder, read.

    writer       "compressed-tensors", "bitsandbytes", "bitnet", "gguf" or "onnx"
    weights      by the model's own names ("model.layers.0.mlp.up_proj.weight"; GGUF's names are its own: "blk.0.ffn_up.weight")
    floats       what is not quantized, as stored: biases, norms, skipped layers
    activations  scales and zero points of activations and key-value caches; no part of a float model's state_dict"""

    writer: str
    weights: dict[str, Stored]
    floats: dict[str, Tensor] = field(default_factory=dict)
    activations: dict[str, Tensor] = field(default_factory=dict)

    @property
    def schemes(self) -> dict[str, str]:
        """Weight name -> scheme, as `qt.scheme` reads it."""
        return {name: str(stored.scheme) for name, stored in self.weights.items()}

    def state_dict(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Float tensors for `model.load_state_dict`: quantized weights dequantized, the others as they are.

        dtype  of every floating-point tensor. None: each weight in the dtype that its writer's library dequantizes to;
               torch.float32 is what training starts from: it leaves weights on their grid, which bfloat16 may not hold
        Tied weights stand once, as in the file: load those with strict=False."""
        out = {name: stored.values().to(dtype or stored.dtype) for name, stored in self.weights.items()}
        for name, tensor in self.floats.items():
            out[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        return out
