"""Quantizer: statistics -> parameters -> codes, for one tensor of a model.

State is plain: `scale`, `zero_point`, `calibrated` and the range's buffers have their final shape from construction,
so state_dict, deepcopy, pickle and safetensors work, and loading never derives a range again."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qatana.errors import ModelError
from qatana.numerics import Affine, IntFormat, Parameters, Scheme, engine, fake_quantize_by, levels, scale_gradient
from qatana.numerics.coded import Coded, decode, encode, encode_rows, encode_weight, origin_of
from qatana.numerics.dynamic import at_run_time, dynamic_blocks, dynamic_parameters, dynamic_tensor
from qatana.numerics.held import fake_quantize_held, held_shapes, hold
from qatana.numerics.parameters import SMALLEST_SCALE
from qatana.numerics.products import goes_by_rows
from qatana.quantizer.ranges import Range, weight_parameters


class Quantizer(nn.Module):
    """Quantizes one activation or weight by a scheme.

    scheme  how; `shape` is the weight's shape (activations: None, their static scale is per tensor)
    name    full name in the model ("encoder.layer.0.attention.self.query.input"): what `plan`, `verify` and errors say
    State: scale float32 (a parameter if learned), zero_point float32 integers, calibrated bool, range.*; held.* of schemes whose parameters
    are more than a scale, solved for at calibration and kept.
    `enabled` quantizes, `observing` takes part in calibration, `following` observes batches of training alone, not of an evaluation between
    its steps; all are switches of the training schedule, not state.
    `lifted`: an asymmetric zero point stays above the lowest code, as some engines' formulas want (Target.lifted).
    `tap`, if set, is called with (name, codes) for each tensor quantized: verification listens there."""

    scale: Tensor
    zero_point: Tensor
    calibrated: Tensor

    def __init__(
        self, scheme: Scheme, shape: tuple[int, ...] | None = None, name: str = "", engine_name: str = "onnxruntime"
    ) -> None:
        super().__init__()
        self.scheme, self.name, self.engine = scheme, name, engine(engine_name)
        self.is_weight = shape is not None
        if shape is not None:
            scheme.check(shape, name)
        dynamic_activation = scheme.scale == "dynamic" and not self.is_weight
        scale_shape = () if shape is None or scheme.holds else scheme.granularity.scale_shape(shape)
        self.by_rows = goes_by_rows(scheme, self.is_weight)
        self.enabled, self.observing, self.following = False, False, False
        self.lifted = False
        self.tap: Callable[[str, Tensor], None] | None = None
        self._last: tuple[weakref.ref[Tensor], tuple[int, ...], Coded] | None = None
        scale, zero = scheme.fixed or (1.0, scheme.zero_point)
        initial = torch.full(scale_shape, float(scale))
        if scheme.scale == "learned" and scheme.fixed is None:
            self.scale = nn.Parameter(initial)
        else:
            self.register_buffer("scale", initial)
        self.register_buffer("zero_point", torch.full(scale_shape, float(zero)))
        self.register_buffer("calibrated", torch.tensor(scheme.fixed is not None or dynamic_activation))
        self.needs_range = not self.is_weight and scheme.scale != "dynamic" and scheme.fixed is None
        self.range = Range(scheme, scale_shape) if self.needs_range else None
        self.held = None if shape is None or not scheme.holds else Held(scheme, shape)

    @property
    def learned(self) -> bool:
        return isinstance(self.scale, nn.Parameter)

    @property
    def has_levels(self) -> bool:
        """Whether it hands out integer levels, as integer products need them. Else it is x_hat as a whole: floats, codebooks, small
        scales, activations in ways that no kernel quantizes at run time."""
        if self.is_weight or self.scheme.scale != "dynamic":
            return self.scheme.is_integer
        return at_run_time(self.scheme)

    def extra_repr(self) -> str:
        return f"{self.scheme}"

    # -- calibration -----------------------------------------------------------------------------------------------
    def observe(self, x: Tensor) -> None:
        """Take one batch of an activation into account (no effect on weights and on fixed or dynamic scales). Gradient checkpointing runs
        a forward pass again inside the backward pass: the same batch does not count twice."""
        inside_backward = torch._C._current_graph_task_id() != -1  # what torch.utils.checkpoint itself asks
        if self.range is not None and not inside_backward and (self.training or not self.following):
            self.range.update(x, self.name)

    @torch.no_grad()
    def settle(self, weight: Tensor | None = None) -> None:
        """Set scale and zero point: of an activation from what was observed, of a weight from its values.

        Raises: ModelError if nothing was observed."""
        if not self.scheme.takes_scale:
            if self.held is not None:
                assert weight is not None
                self.held.solve(weight)
            self.calibrated.fill_(True)
            return
        if self.is_weight:
            assert weight is not None
            scale, zero = weight_parameters(weight, self.scheme)
        elif self.range is not None:
            if int(self.range.count) == 0:
                raise ModelError(
                    f"{self.name}: saw no data during calibration (its layer never ran); skip it in the recipe or calibrate "
                    f"with batches that reach it"
                )
            scale, zero = self.range.parameters_of()
            if self.lifted and not self.scheme.symmetric and int(zero) == self.scheme.integer.lo:
                steps = torch.tensor(float(self.scheme.integer.hi - self.scheme.integer.lo)).to(scale)
                scale, zero = scale * steps / (steps - 1), zero + 1
        else:
            return
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)
        self.calibrated.fill_(True)

    @torch.no_grad()
    def take(self, parameters: Parameters) -> None:
        """Quantize a weight by parameters that were found elsewhere, shaped for the scheme's stack."""
        if self.held is not None:
            self.held.take(parameters)
        else:
            for buffer, value in ((self.scale, parameters.scale), (self.zero_point, parameters.offset)):
                buffer.copy_(value.reshape(buffer.shape) if value.ndim else value)
        self.calibrated.fill_(True)

    # -- parameters ------------------------------------------------------------------------------------------------
    def affine(self, shape: torch.Size | None = None) -> Affine:
        """Scale, zero point and code range of a static per-tensor activation, differentiable in a learned scale.

        shape  of the tensor (batch, *features) that they quantize: a learned scale's gradient is multiplied by LSQ's
               1 / sqrt(features * hi) (Esser et al. 2020, section 2.2); None where no gradient is asked for"""
        format = self._integers()
        self._require_calibrated()
        features = None if shape is None else math.prod(shape[1:])
        return Affine(self._used_scale(features), self.zero_point, format.lo, format.hi)

    def _require_calibrated(self) -> None:
        """Raise ModelError before calibration. Not inside a compiled graph, which cannot branch on the state."""
        if not torch.compiler.is_compiling() and not self.calibrated:
            raise ModelError(f"{self.name}: not calibrated; run qatana.calibrate(model, loader) first")

    def _integers(self) -> IntFormat:
        """The integer format. Raises: ModelError where an integer product is asked of a scheme that has no integer codes."""
        format = self.scheme.format
        if not (isinstance(format, IntFormat) and self.scheme.is_integer):
            raise ModelError(
                f"{self.name}: {self.scheme} has no integer codes with a zero point, and this layer multiplies integers; "
                f"use an integer scheme here or leave the layer's other operand in float"
            )
        return format

    def _used_scale(self, elements: int | None) -> Tensor:
        if not self.learned:
            return self.scale
        factor = self._gradient_factor(elements) if elements else 1.0
        return scale_gradient(self.used_scale(), factor) if factor != 1.0 else self.used_scale()

    def used_scale(self) -> Tensor:
        """A learned scale as it is used, which training may have taken to 0."""
        tiny = torch.where(self.scale < 0, -SMALLEST_SCALE, SMALLEST_SCALE)
        return torch.where(self.scale.abs() < SMALLEST_SCALE, tiny, self.scale)

    def _gradient_factor(self, elements: int) -> float:
        """LSQ's 1 / sqrt(elements * hi)."""
        format = self.scheme.format
        largest = format.hi if isinstance(format, IntFormat) else getattr(format, "largest", 1)
        return (elements * max(1, largest)) ** -0.5

    def weight_gradient_factor(self, weight: Tensor) -> float:
        """What the gradient of a weight's learned scale was multiplied by (LSQ, Esser et al. 2020, section 2.2)."""
        return self._gradient_factor(self._elements(weight))

    def _elements(self, weight: Tensor) -> int:
        return max(1, weight.numel() // max(1, self.scale.numel()))

    def weight_parameters(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point for a weight now: from its values if dynamic, else the state."""
        if self.scheme.scale == "dynamic":
            return weight_parameters(weight, self.scheme)
        self._require_calibrated()
        return self._used_scale(self._elements(weight)), self.zero_point

    def given(self, weight: Tensor) -> dict[str, Any]:
        """What `numerics.stored.store` needs to know besides the weight: its scale and zero point, or its held parameters, or nothing
        where all follows from the weight itself."""
        if self.held is not None:
            self._require_calibrated()
            return {"held": self.held.parameters_of()}
        if not self.has_levels and self.scheme.scale == "dynamic":
            return {}
        scale, zero_point = self.weight_parameters(weight)
        return {"scale": scale.detach(), "offset": zero_point.detach()}

    # -- quantization ----------------------------------------------------------------------------------------------
    def weight_levels(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Levels (block view of the weight, float32 integers) and scale of a weight."""
        format = self._integers()
        scale, zero = self.weight_parameters(weight)
        view = self.scheme.granularity.view(weight)
        out = levels(view, scale, zero, format.lo, format.hi)
        self.record(out, zero)
        return out, scale

    def after_relu(self, x: Tensor) -> Tensor:
        """x_hat of max(x, 0): what `self(x.relu())` gives, in one operator where codes allow it, which keeps bits for both."""
        if not self._on_codes or self.learned or self.observing:
            return self(x.relu())
        return self._float_of(self.encode(x, relu=True)).to(x.dtype)

    @property
    def _on_codes(self) -> bool:
        """Whether an activation goes by way of int8 codes of one scale."""
        return (
            self.enabled and not self.is_weight and self.has_levels and self.scheme.granularity.kind == "tensor"
        )  # fmt: skip

    def floats(self, place: Tensor, codes: Tensor, *scales: Tensor) -> Tensor:
        """y_hat of codes on this quantizer's grid that an operator computed, with their place in the graph.

        scales  of the operator's operands: where one is NaN, y is"""
        format = self._integers()
        origin = origin_of(format.lo)
        nothing = sum((0 * s.sum() for s in scales), self.scale.new_zeros(()))
        found = Coded(place, codes, self.scale.detach() + nothing, self.zero_point - origin, format, origin)
        if self.tap is not None:
            self.tap(self.name, found.own_codes())
        return self._float_of(found)

    def _float_of(self, found: Coded) -> Tensor:
        """x_hat as floats; who encodes them again gets the codes they came from."""
        y = decode(found)
        if not torch.compiler.is_compiling():
            self._keep(y, found)
        return y

    def encode(self, x: Tensor, relu: bool = False) -> Coded:
        """An activation as codes: what integer products take. Observes first, if observing. The codes of the tensor seen last are kept as
        long as it lives: layers that read one tensor quantize it once.

        Raises: ModelError before calibration, and where the scheme has no integer codes."""
        if self.observing:
            self.observe(x.detach())
        found = None if relu else self._recent(x)
        if found is not None:
            return found
        if self.scheme.granularity.kind == "token":
            found = encode_rows(x, self.scheme)
        elif self.scheme.scale == "dynamic":
            found = encode(x, *dynamic_parameters(x), self.scheme, self.engine.name, relu)
        else:
            self._integers()
            self._require_calibrated()
            scale = self._used_scale(math.prod(x.shape[1:]))
            found = encode(x, scale, self.zero_point, self.scheme, self.engine.name, relu)
        if self.tap is not None:
            self.tap(self.name, found.own_codes())
        if not (relu or torch.compiler.is_compiling()):
            self._keep(x, found)
        return found

    def _recent(self, x: Tensor) -> Coded | None:
        """The codes of x, if it is the tensor encoded last and nothing has changed since."""
        if self._last is None or self.tap is not None or torch.compiler.is_compiling() or x.is_inference():
            return None
        seen, state, found = self._last
        return found if seen() is x and state == self._state(x) else None

    def _keep(self, x: Tensor, found: Coded) -> None:
        """Keep codes as long as x lives and no gradient went through them: a second backward pass needs a graph of its own. Not those of
        a leaf that wants a gradient: its graph would keep it alive."""
        self._last = None
        if x.is_inference() or (x.is_leaf and x.requires_grad):
            return
        self._last = (weakref.ref(x, self._forget), self._state(x), found)
        if found.hat.requires_grad:
            owner = weakref.ref(self)
            found.hat.register_hook(lambda grad: _forget_last(owner()))

    def _forget(self, seen: object) -> None:
        if self._last is not None and self._last[0] is seen:
            self._last = None

    def _state(self, x: Tensor) -> tuple[int, ...]:
        """What the codes of x depend on besides its identity."""
        return x._version, self.scale._version, self.zero_point._version, torch.is_grad_enabled(), x.requires_grad

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_last": None}  # type: ignore[misc]

    def encode_weight(self, weight: Tensor) -> Coded:
        """A weight as levels."""
        self._integers()
        given = () if self.scheme.scale == "dynamic" else self.weight_parameters(weight)
        found = encode_weight(weight, self.scheme, *given)
        if self.tap is not None:
            self.tap(self.name, found.own_codes())
        return found

    def activation_levels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels of an activation, with the scale and zero point used (dynamic ones come from x itself)."""
        if self.scheme.scale == "dynamic":
            if self.scheme.granularity.kind == "group":
                out, scale = dynamic_blocks(x, self.scheme.granularity.size)
                zero = torch.zeros_like(scale)
            else:
                out, scale, zero = dynamic_tensor(x)
        else:
            parameters = self.affine(x.shape)
            out, scale, zero = self.engine.levels(x, parameters), parameters.scale, parameters.zero_point
        self.record(out, zero)
        return out, scale, zero

    def record(self, values: Tensor, zero_point: Tensor) -> None:
        """Show codes to the tap, if one listens."""
        if self.tap is not None:
            self.tap(self.name, (values.detach() + zero_point).to(self.scheme.format.dtype))

    def record_values(self, y: Tensor) -> None:
        """`record` of values on the grid of a static scale."""
        if self.tap is not None:
            self.record(torch.round(y.detach() / self.scale.detach()), self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """x_hat in the dtype and shape of x; x itself while disabled. Observes first, if observing."""
        if self.observing and not self.is_weight and not self._on_codes:
            self.observe(x.detach())
        if not self.enabled:
            return x
        if not self.has_levels:
            return self.by_scheme(x)
        if self._on_codes:
            return self._float_of(self.encode(x)).to(x.dtype)
        if self.is_weight and self.tap is None:
            given = () if self.scheme.scale == "dynamic" else self.weight_parameters(x)
            return fake_quantize_by(x, self.scheme, *given, check=False)
        if self.is_weight:
            out, scale = self.weight_levels(x)
        else:
            out, scale, _ = self.activation_levels(x)
        return (out * scale).reshape(x.shape).to(x.dtype)

    def by_scheme(self, x: Tensor) -> Tensor:
        """Fake quantization of formats that integer layers do not multiply: floats, codebooks, blocks with small scales."""
        if self.scheme.scale == "dynamic":
            return fake_quantize_by(x, self.scheme)
        self._require_calibrated()
        if self.held is not None:
            return fake_quantize_held(x, self.scheme, self.held.parameters_of())
        elements = x.numel() // max(1, self.scale.numel()) if self.is_weight else max(1, x[:1].numel())
        return fake_quantize_by(x, self.scheme, self._used_scale(elements), self.zero_point)


def _forget_last(quantizer: Quantizer | None) -> None:
    if quantizer is not None:
        quantizer._last = None


class Held(nn.Module):
    """Held parameters of a weight as buffers, one for each name."""

    def __init__(self, scheme: Scheme, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.scheme, self.names = scheme, list(held_shapes(scheme, shape))
        for name, size in held_shapes(scheme, shape).items():
            self.register_buffer(name, torch.ones(size))

    def solve(self, weight: Tensor) -> None:
        """Take the parameters that the weight asks for now."""
        for buffer, found in zip(self.parameters_of(), hold(weight, self.scheme), strict=True):
            buffer.copy_(found)

    def take(self, parameters: Parameters) -> None:
        """Take the numbers of those names. What codes are computed with follows from the scales: files of other libraries lack it."""
        if not self.scheme.is_gguf:
            scale = parameters.scale
            parameters = parameters._replace(encode=scale.reciprocal() if self.scheme.grid.inverse else scale)
        for name, buffer in zip(self.names, self.parameters_of(), strict=True):
            buffer.copy_(getattr(parameters, name))

    def parameters_of(self) -> list[Tensor]:
        return [self.get_buffer(name) for name in self.names]


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """All quantizers of a model by their own names (shared ones once), in module order."""
    return {module.name: module for module in model.modules() if isinstance(module, Quantizer)}
