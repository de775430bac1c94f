"""GGUF block types among the other grids. Their own package has the equations; here stands what held parameters add to them: weights
that moved since they were solved for may lie outside the range, and then they clip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qatana.numerics import gguf
from qatana.numerics.grid import Dims, Grid
from qatana.numerics.scales import Parameters

_AFFINE = {
    "q8_0": (-127, 127), "q4_0": (-8, 7), "q5_0": (-16, 15), "q4_1": (0, 15), "q5_1": (0, 31), "tq1_0": (-1, 1),
    "tq2_0": (-1, 1), "q2_0": (-1, 2),
}  # fmt: skip
"""The least and the greatest level of the types whose level is round((x - encode_offset) * encode)."""
_HALF_AWAY = ("q8_0", "tq1_0", "tq2_0", "q2_0")
"""Those of them that round half away from zero; the others round half up."""
_OPEN = {"q8_0": (-127, 127), "tq1_0": (0, 2), "tq2_0": (0, 2)}
"""The codes of the types that do not clip by themselves."""
_OWN = ("q4_0", "q5_0", "mxfp4", "nvfp4", "q4_k", "q5_k", "q6_k")
"""Types that clip elements of the very block that their parameters come from."""
_SUPER = ("super_scale", "super_offset", "scale_code", "offset_code")


@dataclass(frozen=True)
class GgufGrid(Grid):
    """A GGUF block type. Its stack is (rows, blocks of a row, block); its parameters have more fields than `Parameters`, and are read
    by name."""

    name: str = "q8_0"

    @property
    def clips(self) -> bool:
        return self.name in _OWN

    @property
    def straight(self) -> bool:
        """Signs clip nothing."""
        return self.name == "q1_0"

    @property
    def fields(self) -> tuple[str, ...]:
        if self.name in ("q4_k", "q5_k"):
            return ("scale", "offset", *_SUPER)
        if self.name == "q6_k":
            return ("scale", "super_scale", "scale_code")
        if self.name in ("q4_1", "q5_1"):
            return ("scale", "offset", "encode", "encode_offset")
        return ("scale", "encode") if self.name in _AFFINE else ("scale",)

    def solve(self, view: Tensor, dims: Dims = (-1,)) -> Parameters:
        return gguf.grid(self.name).solve(view.float())

    def restore(self, held: Sequence[Tensor]) -> Parameters:
        known = dict(zip(self.fields, held, strict=True))
        zero = known["scale"].new_zeros(())
        known = {"offset": zero, "encode": known["scale"]} | known
        known.setdefault("encode_offset", known["offset"])
        made: Any = gguf.Parameters
        if self.name.endswith("_k"):
            made = gguf.SuperParameters
            known = {"super_offset": zero, "offset_code": zero} | known
        return made(**known)

    def field_shape(self, name: str, stack: Sequence[int], dims: Dims) -> tuple[int, ...]:
        """Numbers of a super-block: (rows, 1, 1);  codes of its scales and minima: (rows, 1, blocks of a row)."""
        rows, blocks, _ = stack
        if name in _SUPER:
            return (rows, 1, blocks) if name.endswith("code") else (rows, 1, 1)
        return (rows, blocks, 1)

    def apply(
        self, view: Tensor, p: Parameters, *, fits: bool = False, mask: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        grid = gguf.grid(self.name)
        clipped = self.name in _OPEN and not fits
        out = grid.values(self.codes(view, p), p) if clipped else grid.fake(view, p)
        inside = grid.inside(view, p) if mask else None
        if mask and not fits and self.name in _AFFINE:
            among = self._among(view, p)
            inside = among if inside is None else inside.logical_and_(among)
        return out, None if inside is None else inside.float()

    def _among(self, view: Tensor, p: Any) -> Tensor:
        """Where the level rounds to one between the least and the greatest."""
        low, high = _AFFINE[self.name]
        t = (view - p.encode_offset).mul_(p.encode) if p.encode_offset.ndim else view * p.encode
        above = t > low - 0.5 if self.name in _HALF_AWAY else t >= low - 0.5
        return above.logical_and_(t < high + 0.5)

    def codes(self, view: Tensor, p: Parameters) -> Tensor:
        codes: Tensor = gguf.grid(self.name).codes(view.float(), p)
        return codes.clamp_(*_OPEN[self.name]) if self.name in _OPEN else codes

    def values(self, codes: Tensor, p: Parameters) -> Tensor:
        return gguf.grid(self.name).values(codes.float(), p)
