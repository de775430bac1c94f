"""Recipes from the quantization configs of other libraries: `qatana.recipe.from_hf(config)`.

A config is read as its dictionary (what stands under quantization_config in a config.json), so none of those libraries needs to be
installed. What has no equivalent is an error that names the part: the recipe that comes back means what the config means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qatana.errors import RecipeError, SchemeError, nearest
from qatana.numerics import scheme
from qatana.recipe.foreign_schemes import compressed_tensors_scheme, torchao_schemes
from qatana.recipe.recipe import Recipe

HEAD = "lm_head"
"""What transformers leaves float where a config names nothing: the output embeddings, under their usual name."""


def from_hf(config: Any, *, inputs: bool = True, device: str = "cuda") -> Recipe:
    """The recipe for the free target "torch" that a quantization config of transformers means.

    config  BitsAndBytesConfig, QuantoConfig, HqqConfig, BitNetQuantConfig, FineGrainedFP8Config, FbgemmFp8Config, Mxfp4Config,
            TorchAoConfig, CompressedTensorsConfig, GPTQConfig, AwqConfig, or the dictionary of one
    inputs  False: the weights alone, what the config says of activations left out
    device  whose kernels to equal where a library has two kinds: bitsandbytes finds the nearest code of a scale on "cuda", not on "cpu"
    Linear layers are quantized as there; embeddings and convolutions stay float, and so does "lm_head", unless the config has its own
    list of modules to leave.
    Raises: RecipeError naming the part of the config that no recipe can say."""
    data = config if isinstance(config, dict) else config.to_dict() if hasattr(config, "to_dict") else None
    if not isinstance(data, dict):
        raise RecipeError(
            f"a quantization config is an object of transformers or its dictionary, not {type(config).__name__}"
        )
    method = data.get("quant_method")
    name = str(getattr(method, "value", method))
    if name not in METHODS:
        raise RecipeError(f"quant_method '{name}' has no equivalent here{nearest(name, METHODS)}")
    found = METHODS[name](data, device)
    if not inputs:
        rules = [
            r.model_copy(update={"schemes": {"weight": r.schemes["weight"]}})
            for r in found.rules
            if "weight" in r.schemes
        ]
        found = found.model_copy(update={"rules": (*rules, *(rule for rule in found.rules if rule.skip))})
    elif missing := _without_equivalent(name, data):
        raise RecipeError(f"{name}: {missing}; from_hf(config, inputs=False) takes the weights alone")
    return found


def _without_equivalent(name: str, data: dict[str, Any]) -> str:
    """The part about activations that no scheme says, or ""."""
    if name == "bitsandbytes" and data.get("load_in_8bit") and data.get("llm_int8_threshold", 6.0):
        value = data.get("llm_int8_threshold", 6.0)
        return f"llm_int8_threshold={value} keeps outlier columns of the inputs in half precision, which no scheme says (0.0 does not)"
    if name == "quanto" and data.get("activations"):
        return f"activations='{data['activations']}' are calibrated outside transformers, which loads weights alone"
    if name == "fbgemm_fp8" and data.get("activation_scale_ub"):
        return f"activation_scale_ub={data['activation_scale_ub']} caps the largest input of a token, which no scheme says (None does not)"
    return ""


def _recipe(weight: str, inputs: str | None = None, types: tuple[str, ...] = ("Linear",)) -> Recipe:
    """Layers of those types; everything else float."""
    schemes: dict[str, Any] = {"weight": weight} | ({"input": inputs} if inputs else {})
    found = Recipe(target="torch").rule(weight=None)
    for type_name in types:
        found = found.rule(type=type_name, **schemes)
    return found


def _leaving(found: Recipe, names: Any) -> Recipe:
    """Modules of those names, wherever they stand, and what is below them."""
    for name in [HEAD] if names is None else list(names):
        found = found.skip(name, f"*.{name}.*", reason="the config leaves it")
    return found


def _bitsandbytes(data: dict[str, Any], device: str) -> Recipe:
    layers = ("Linear", "Conv1D")
    if data.get("load_in_8bit"):
        rule = "sym dynamic rule=bitsandbytes"
        found = _recipe(f"int8n/channel {rule}", f"int8n/token {rule}", layers)
    elif data.get("load_in_4bit"):
        kind = data.get("bnb_4bit_quant_type", "fp4")
        double = bool(data.get("bnb_4bit_use_double_quant"))
        found = _recipe(
            str(_scheme(f"{kind}+double" if double else str(kind), double and device == "cpu")), None, layers
        )
    else:
        raise RecipeError("bitsandbytes: the config sets neither load_in_4bit nor load_in_8bit")
    return _leaving(found, data.get("llm_int8_skip_modules"))


def _scheme(name: str, cpu: bool) -> Any:
    try:
        return scheme(name, rule="cpu" if cpu else None)
    except SchemeError as error:
        raise RecipeError(f"bitsandbytes: {error}") from error


def _quanto(data: dict[str, Any], _: str) -> Recipe:
    """Fewer than 8 bits: in groups of 128, as QLinear has them where 128 divides its inputs."""
    known = {"int8": "int8/channel sym dynamic", "float8": "e4m3/channel sym dynamic"}
    known |= {name: f"u{name}/group128 asym dynamic rule=quanto" for name in ("int4", "int2")}
    weights = str(data.get("weights", "int8"))
    if weights not in known:
        raise RecipeError(f"quanto: weights='{weights}' have no equivalent; known: {', '.join(known)}")
    return _leaving(_recipe(known[weights]), data.get("modules_to_not_convert"))


def _hqq(data: dict[str, Any], _: str) -> Recipe:
    about = data.get("quant_config") or {}
    if "weight_quant_params" in about:
        found = _recipe(_hqq_scheme(about))
    else:
        found = Recipe(target="torch").rule(weight=None)
        for tag, each in about.items():  # "self_attn.q_proj", in every layer of the model
            found = found.rule(f"*.{tag}", "Linear", weight=_hqq_scheme(each))
    return _leaving(found, data.get("skip_modules"))


def _hqq_scheme(about: dict[str, Any]) -> str:
    weight = about.get("weight_quant_params") or {}
    if about.get("scale_quant_params") or about.get("zero_quant_params"):
        raise RecipeError(
            "hqq: scale_quant_params and zero_quant_params quantize the scales and zero points, which no scheme says"
        )
    if weight.get("axis", 1) != 1:
        raise RecipeError(
            "hqq: axis=0 groups down the columns of a weight; a scheme's groups lie along the inputs: use axis=1"
        )
    if not weight.get("optimize", True):
        raise RecipeError(
            "hqq: optimize=False rounds without the half-quadratic search; use a scheme with symmetric=False"
        )
    bits, size = int(weight.get("nbits", 4)), weight.get("group_size")
    rule = "hqq:round" if weight.get("round_zero") else "hqq"
    try:
        return str(
            scheme(f"uint{bits}", f"group{size}" if size else "channel", symmetric=False, scale="static", rule=rule)
        )
    except SchemeError as error:
        raise RecipeError(f"hqq: nbits={bits}, group_size={size}: {error}") from error


def _bitnet(data: dict[str, Any], _: str) -> Recipe:
    if data.get("use_rms_norm"):
        raise RecipeError(
            "bitnet: use_rms_norm=True normalizes the inputs of every layer; put the norms into the model"
        )
    online = data.get("quantization_mode") == "online"
    weight = "int2n/tensor sym dynamic rule=absmean:reciprocal" if online else "bitnet"
    return _leaving(_recipe(weight, "int8/token"), data.get("modules_to_not_convert"))


def _fp8(data: dict[str, Any], _: str) -> Recipe:
    if data.get("activation_scheme", "dynamic") != "dynamic":
        raise RecipeError(
            "fp8: activation_scheme='static' reads its scales from a checkpoint; calibrate: input='fp8:e4m3'"
        )
    if data.get("expert_dtype", "fp8") != "fp8":
        raise RecipeError(
            f"fp8: expert_dtype='{data['expert_dtype']}' has scales of its own; write a rule for '*Experts'"
        )
    block = data.get("weight_block_size")
    powers = data.get("scale_fmt") == "ue8m0"
    where = f"block{block[0]}x{block[1]}" if block else "tensor"
    weight = f"e4m3/{where} sym dynamic {'e8m0' if powers else 'float32'}:reciprocal"
    tokens = f"e4m3/group{block[1]} sym dynamic" + " e8m0:rceil" * powers if block else "e4m3/token sym dynamic"
    return _leaving(_recipe(weight, tokens, ("Linear", "*Experts")), data.get("modules_to_not_convert"))


def _fbgemm(data: dict[str, Any], _: str) -> Recipe:
    found = _recipe("e4m3/channel sym dynamic", "e4m3/token sym dynamic")
    return _leaving(found, data.get("modules_to_not_convert"))


def _mxfp4(data: dict[str, Any], _: str) -> Recipe:
    """triton_kernels rounds scales up, so that no element is clipped: the rule rceil."""
    return _leaving(
        _recipe(str(scheme("mxfp4", rule="rceil")), None, ("*Experts",)), data.get("modules_to_not_convert")
    )


def _torchao(data: dict[str, Any], _: str) -> Recipe:
    if data.get("include_input_output_embeddings"):
        raise RecipeError(
            "torchao: include_input_output_embeddings quantizes other layers too; add .rule(type='Embedding', weight=...)"
        )
    about = data.get("quant_type") or {}
    weight, tokens = torchao_schemes(about.get("default", about))
    return _leaving(_recipe(weight, tokens), data.get("modules_to_not_convert"))


def _compressed_tensors(data: dict[str, Any], _: str) -> Recipe:
    found = Recipe(target="torch").rule(weight=None)
    for group in (data.get("config_groups") or {}).values():
        roles: dict[str, Any] = {}
        for key, role in (("weights", "weight"), ("input_activations", "input"), ("output_activations", "output")):
            if group.get(key):
                roles[role] = compressed_tensors_scheme(group[key], role)
        for target in group.get("targets") or ["Linear"]:
            found = found.rule(**_target(str(target)), **roles)
    if cache := data.get("kv_cache_scheme"):
        both = compressed_tensors_scheme(cache, "key")
        found = found.rule(type="AttentionProducts", key=both, value=both)
    names = [_target(str(name)).get("match", str(name)) for name in data.get("ignore") or []]
    return _leaving(found, names)


def _target(text: str) -> dict[str, str]:
    """A class ("Linear"), a module, or "re:" and a regular expression of which ".*" alone is more than text."""
    if not text.startswith("re:"):
        return {"type": text} if text.isidentifier() and text[0].isupper() else {"match": text}
    glob = text.removeprefix("re:").replace(".*", "*").replace("\\.", ".").removesuffix("$").removeprefix("^")
    if any(c in glob for c in "\\()[]|+?^$"):
        raise RecipeError(
            f"compressed-tensors: '{text}' is more than a glob can say; write rules with match='*.q_proj'"
        )
    return {"match": glob}


def _gptq(data: dict[str, Any], _: str) -> Recipe:
    if data.get("desc_act"):
        raise RecipeError(
            "gptq: desc_act=True groups the columns in another order than they are stored; use desc_act=False"
        )
    symmetric = bool(data.get("sym", True))
    return _leaving(_recipe(_grouped(data, symmetric, "gptq")), data.get("modules_to_not_convert"))


def _awq(data: dict[str, Any], _: str) -> Recipe:
    weight = _grouped(data, not data.get("zero_point", True), "awq")
    return _leaving(_recipe(weight), data.get("modules_to_not_convert"))


def _grouped(data: dict[str, Any], symmetric: bool, rule: str) -> str:
    """Their grid: scale = range / (2^bits - 1), an integer zero point; x / scale is rounded first, then the zero point added. (awq without
    zero points: scale = max |x| / (2^(bits-1) - 1).)"""
    bits, size = int(data.get("bits", 4)), int(data.get("group_size", 128))
    where = "channel" if size == -1 else f"group{size}"
    return f"int{bits}/{where} {'sym' if symmetric else 'asym'} dynamic rule={rule}"


METHODS: dict[str, Callable[[dict[str, Any], str], Recipe]] = {
    "bitsandbytes": _bitsandbytes, "quanto": _quanto, "hqq": _hqq, "bitnet": _bitnet, "fp8": _fp8, "fbgemm_fp8": _fbgemm,
    "mxfp4": _mxfp4, "torchao": _torchao, "compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq,
}  # fmt: skip
