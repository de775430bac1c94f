"""Schemes as torchao's and compressed-tensors' own dictionaries write them."""

from __future__ import annotations

from typing import Any

from qatana.errors import RecipeError, SchemeError
from qatana.numerics import Scheme


def torchao_schemes(config: dict[str, Any]) -> tuple[str, str | None]:
    """(weight, input or None) of what `torchao.core.config.config_to_dict` writes. Raises: RecipeError for configs without equivalent."""
    name, data = str(config.get("_type")), config.get("_data") or {}
    if name == "Int8WeightOnlyConfig":
        return _integers("int8", _granularity(data), True), None
    if name == "Int8DynamicActivationInt8WeightConfig":
        symmetric = _value(data, "act_mapping_type") == "SYMMETRIC"
        return _integers("int8", _granularity(data), True), _integers("int8", "token", symmetric)
    if name in ("IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"):
        return _intx(name, data)
    if name in ("Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"):
        return _floats(name, data)
    raise RecipeError(
        f"torchao: {name} has no equivalent; known: Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, IntxWeightOnlyConfig, "
        f"Int8DynamicActivationIntxWeightConfig, Float8WeightOnlyConfig, Float8DynamicActivationFloat8WeightConfig"
    )


def _intx(name: str, data: dict[str, Any]) -> tuple[str, str | None]:
    dynamic = name.startswith("Int8Dynamic")
    prefix = "weight_" if dynamic else ""
    if _value(data, "intx_choose_qparams_algorithm") not in (None, "AFFINE"):
        raise RecipeError(
            f"torchao: intx_choose_qparams_algorithm '{_value(data, 'intx_choose_qparams_algorithm')}' has no equivalent"
        )
    if data.get(f"{prefix}scale_dtype") is not None:
        raise RecipeError(f"torchao: {prefix}scale_dtype rounds scales; leave it None")
    mapping = _value(data, f"{prefix}mapping_type")
    if mapping not in ("SYMMETRIC", "ASYMMETRIC"):
        raise RecipeError(f"torchao: {prefix}mapping_type '{mapping}' has no equivalent; known: SYMMETRIC, ASYMMETRIC")
    weight = _integers(_value(data, "weight_dtype"), _granularity(data, f"{prefix}granularity"), mapping == "SYMMETRIC")
    return weight, _integers("int8", "token", _value(data, "act_mapping_type") == "SYMMETRIC") if dynamic else None


def _floats(name: str, data: dict[str, Any]) -> tuple[str, str | None]:
    if data.get("activation_value_lb") is not None or data.get("activation_value_ub") is not None:
        raise RecipeError("torchao: activation_value_lb and _ub clip the range of inputs, which no scheme says")
    both = data.get("granularity")
    weight, inputs = both[-1:] + both[:1] if isinstance(both, list) else [both, None]
    where = _granularity({"granularity": weight})
    text = f"{_float8(_value(data, 'weight_dtype'))}/{where} sym dynamic"
    if name == "Float8WeightOnlyConfig":
        return text, None
    tokens = "token" if _granularity({"granularity": inputs or weight}) == "channel" else "tensor"
    return text, f"{_float8(_value(data, 'activation_dtype'))}/{tokens} sym dynamic"


def _float8(name: str) -> str:
    known = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
    if name not in known:
        raise RecipeError(f"torchao: dtype {name} has no equivalent; known: {', '.join(known)}")
    return known[name]


def _integers(name: str, granularity: str, symmetric: bool) -> str:
    return f"{name}/{granularity} {'sym' if symmetric else 'asym'} dynamic rule=torchao"


def _value(data: dict[str, Any], key: str) -> Any:
    """An enum or a dtype by its name."""
    found = data.get(key)
    return found.get("_data") if isinstance(found, dict) else found


def _granularity(data: dict[str, Any], key: str = "granularity") -> str:
    if data.get("group_size"):
        return f"group{data['group_size']}"
    found = data.get(key) or {}
    kind, about = str(found.get("_type", "PerRow")), found.get("_data") or {}
    if kind == "PerTensor":
        return "tensor"
    if kind == "PerGroup":
        return f"group{about['group_size']}"
    if kind in ("PerRow", "PerAxis") and about.get("axis", 0) == 0:
        return "channel"
    raise RecipeError(
        f"torchao: granularity {kind} {about} has no equivalent; known: PerTensor, PerRow, PerAxis(0), PerGroup"
    )


def compressed_tensors_scheme(args: Any, role: str) -> str:
    """A scheme from QuantizationArgs (or its dictionary). Raises: RecipeError for what none says."""
    data: dict[str, Any] = args if isinstance(args, dict) else args.model_dump()
    kind, bits = str(_text(data.get("type", "int"))), int(data.get("num_bits", 8))
    dynamic = _text(data.get("dynamic", False))
    if str(_text(data.get("actorder"))) in ("group", "dynamic"):
        raise RecipeError("compressed-tensors: actorder='group' reorders columns; use actorder=None or 'weight'")
    if dynamic == "local" and kind != "float":
        raise RecipeError("compressed-tensors: dynamic='local' belongs to fp4 inputs")
    where = _strategy(data, role)
    symmetric = data.get("symmetric", True)
    calibrated = role != "weight" and not dynamic
    mode = "static" if calibrated else "dynamic"
    if kind == "float":
        text = _float_scheme(data, bits, where, mode, role)
    else:
        text = f"int{bits}/{where} {'sym' if symmetric else 'asym'} {mode} rule=compressed-tensors"
    try:
        return str(Scheme.parse(text))
    except SchemeError as error:
        raise RecipeError(f"compressed-tensors: {role} '{text}': {error}") from error


def _float_scheme(data: dict[str, Any], bits: int, where: str, mode: str, role: str) -> str:
    if bits == 8:
        scales = " e8m0:rceil" if where == "group32" and data.get("scale_dtype") else ""
        return f"e4m3/{where} sym {mode}{scales}"
    if bits == 4 and where == "group16":
        if role != "weight":
            raise RecipeError(
                f"compressed-tensors: NVFP4 {role}s have a calibrated scale per tensor; a scheme takes the tensor's own"
            )
        return f"e2m1/group16 sym {mode} e4m3:compressed-tensors"
    if bits == 4 and where == "group32":
        return f"e2m1/group32 sym {mode} e8m0:even"
    raise RecipeError(
        f"compressed-tensors: {bits}-bit floats per {where} have no equivalent; known: 8 bits, 4 bits in groups of 16 or 32"
    )


def _strategy(data: dict[str, Any], role: str) -> str:
    strategy = str(_text(data.get("strategy") or ("group" if data.get("group_size") else "tensor")))
    if strategy in ("group", "tensor_group"):
        return f"group{data['group_size']}"
    if strategy == "block":
        rows, columns = data["block_structure"]
        return f"block{rows}x{columns}"
    if strategy in ("tensor", "channel", "token"):
        return strategy
    raise RecipeError(f"compressed-tensors: strategy '{strategy}' of the {role} has no equivalent")


def _text(value: Any) -> Any:
    """An enum by its value."""
    return getattr(value, "value", value)
