"""Keys and values of attention as a cache keeps them: codes packed to their width, with scales of their own for each token.

    from_cache(to_cache(x, scheme), scheme, ...) = fake_quantize_by(x, scheme)        bit for bit, token by token

A token's codes do not change when others come behind it, so that a cache grows by concatenation along dimension -2. Schemes whose scales
follow from all tokens together cannot do that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qatana.numerics.by_scheme import parameters_of, stack_of
from qatana.numerics.formats import GgufFormat
from qatana.numerics.packing import pack, unpack
from qatana.numerics.scales import Parameters
from qatana.numerics.scheme import Scheme
from qatana.numerics.stored import stored_width
from qatana.numerics.to_codes import dequantize_by, quantize_by

_SCALES = {"e8m0": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that hold every scale of a scale type exactly."""


def grows(scheme: Scheme) -> bool:
    """Whether codes of some tokens stay as they are when tokens are added: scales per token or group of a token, or one that is given."""
    if isinstance(scheme.format, GgufFormat):
        return False
    if scheme.scale == "dynamic":
        return scheme.grid.local and scheme.granularity.kind in ("token", "group")
    return scheme.takes_scale and scheme.granularity.kind == "tensor"


def to_cache(x: Tensor, scheme: Scheme, scale: Tensor | None = None, offset: Tensor | None = None) -> list[Tensor]:
    """Codes (*lead, T, bytes) uint8 of x (*lead, T, D); without a given scale also scales (*lead, T, groups), and behind them the offsets
    of asymmetric schemes.   Raises: SchemeError, DataError as `quantize_by`."""
    if scale is not None and offset is not None:
        p = parameters_of(scheme, scale, offset)
        codes, kept = scheme.grid.codes(stack_of(x.detach().contiguous(), scheme), p), []
    else:
        codes, p = quantize_by(x, scheme)
        scales = p.scale.to(_SCALES.get(scheme.scale_type.name, torch.float32))
        kept = [v.reshape(*x.shape[:-1], -1) for v in ([scales] if scheme.symmetric else [scales, p.offset])]
    return [pack(codes.reshape(x.shape), stored_width(scheme)), *kept]


def from_cache(
    parts: Sequence[Tensor], scheme: Scheme, size: int, dtype: torch.dtype,
    scale: Tensor | None = None, offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x_hat (*lead, T, size) of what `to_cache` gave, with the same given scale and offset."""
    codes = unpack(parts[0], size, stored_width(scheme))
    if scale is not None and offset is not None:
        p = parameters_of(scheme, scale, offset)
    else:
        found = parts[1].float().reshape(-1, 1)
        zero = parts[2].reshape(-1, 1) if len(parts) > 2 else torch.full_like(found, scheme.zero_point)
        p = Parameters(found, zero, found)
    return dequantize_by(stack_of(codes, scheme), p, scheme, codes.shape, dtype)
