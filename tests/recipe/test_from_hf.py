"""Configs of other libraries as recipes: the weights of a layer are theirs, bit for bit, and what has no equivalent says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qatana as qt
from qatana.errors import QatanaError, RecipeError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # bitsandbytes, torchao: words about kernels for GPUs
    import bitsandbytes.functional as bnb
    import transformers
    from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from torchao.core.config import config_to_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerRow,
        PerTensor,
        quantize_,
    )

DTYPES = [torch.float32, torch.bfloat16]


class Block(nn.Module):
    """A layer to quantize, an embedding and a head to leave."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer, self.lm_head = nn.Embedding(16, 256), nn.Linear(256, 128), nn.Linear(128, 16)
        with torch.no_grad():
            self.layer.weight.mul_(torch.logspace(-1, 1, 128)[:, None])
        self.to(dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.layer(self.table(ids)))


def ours(config: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor:
    """The quantized weight of the layer by the config's recipe; whatever else there is stays float."""
    model = Block(dtype)
    recipe = qt.recipe.from_hf(config, **options)
    assert recipe == qt.Recipe.from_dict(recipe.to_dict())
    model = qt.prepare(model, qt.plan(model, recipe))
    assert [q.name for q in qt.quantizers(model).values() if q.is_weight] == ["layer.weight"]
    qt.calibrate(model, [torch.arange(16).view(2, 8)])
    return model.layer.weight_quantizer(model.layer.weight).detach()


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return Block(dtype).layer.weight.detach()


def same(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bitsandbytes_4bit(kind: str, double: bool, dtype: torch.dtype) -> None:
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    packed, state = bnb.quantize_4bit(weight(dtype), quant_type=kind, compress_statistics=double)
    same(ours(config, dtype, device="cpu"), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_bitsandbytes_8bit(dtype: torch.dtype) -> None:
    """x * (127 / largest) there, x / (largest / 127) here: two and two roundings, so an element within 2 ulp of k + 0.5 may go either
    way. Few do: of half-precision weights, which have exact ties, 4 of 32,768; of these float32 weights none."""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    x = weight(dtype).float()
    codes, largest, _ = bnb.int8_vectorwise_quant(x.to(dtype))
    model = Block()
    with torch.no_grad():
        model.layer.weight.copy_(x)
    model = qt.calibrate(qt.prepare(model, qt.plan(model, qt.recipe.from_hf(config, inputs=False))))
    quantizer: Any = model.layer.weight_quantizer
    levels, scale = quantizer.weight_levels(x)
    assert torch.equal(scale.flatten(), largest / torch.full_like(largest, 127))
    differs = levels != codes.float()
    exact = (x.double() * 127 / largest[:, None].double())[differs]
    assert int(differs.sum()) < 10
    assert bool(((exact.abs() % 1 - 0.5).abs() < 127 * 2**-22).all())


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_hqq(bits: int, size: int) -> None:
    from hqq.core.quantize import Quantizer

    config = transformers.HqqConfig(nbits=bits, group_size=size)
    about = config.to_dict()["quant_config"]["weight_quant_params"]
    codes, meta = Quantizer.quantize(weight(), **about, bitpack=False, device="cpu")
    same(ours(config), ((codes - meta["zero"]) * meta["scale"]).view(128, 256))


@pytest.mark.parametrize(
    "config",
    [
        Int8WeightOnlyConfig(),
        IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        IntxWeightOnlyConfig(torch.int3, PerAxis(0)),
        Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(64)),
        Float8WeightOnlyConfig(),
        Float8WeightOnlyConfig(granularity=PerTensor()),
        Float8WeightOnlyConfig(torch.float8_e5m2, granularity=PerRow()),
    ],
    ids=lambda c: type(c).__name__,
)
def test_torchao(config: Any) -> None:
    """Of float32 models. torchao computes in the weight's own dtype: a bfloat16 model's scales and quotients are rounded to 8 bits."""
    layer = nn.Sequential(nn.Linear(256, 128))
    with torch.no_grad():
        layer[0].weight.copy_(weight())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(layer, config)
    data = {"quant_method": "torchao", "quant_type": {"default": config_to_dict(config)}}
    same(ours(data), layer[0].weight.dequantize())


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "W4A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_compressed_tensors(name: str) -> None:
    group = preset_name_to_scheme(name, ["Linear"]).model_dump()
    config = transformers.CompressedTensorsConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    args, x = QuantizationArgs.model_validate(group["weights"]), weight()
    if args.block_structure:
        rows, columns = args.block_structure
        view = x.view(128 // rows, rows, 256 // columns, columns)
        low, high = view.amin((1, 3)), view.amax((1, 3))
    else:
        view = (
            x.unflatten(-1, (-1, args.group_size))
            if args.group_size
            else x
            if args.strategy == "channel"
            else x.view(1, -1)
        )
        low, high = (f(-1, keepdim=not args.group_size) for f in (view.amin, view.amax))
    scale, zero = calculate_qparams(low, high, args)
    codes = quantize(x, scale, zero, args)
    same(ours(config), dequantize(codes, scale, zero, args))


def test_compressed_tensors_nvfp4() -> None:
    group = preset_name_to_scheme("NVFP4A16", ["Linear"]).model_dump()
    config = transformers.CompressedTensorsConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    args, x = QuantizationArgs.model_validate(group["weights"]), weight()
    view = x.unflatten(-1, (-1, 16))
    whole = generate_gparam(x.amin(), x.amax())
    scale, zero = calculate_qparams(view.amin(-1), view.amax(-1), args, global_scale=whole)
    codes = quantize(x, scale, zero, args, global_scale=whole)
    same(ours(config), dequantize(codes, scale, zero, args, global_scale=whole))


def test_fine_grained_fp8() -> None:
    """transformers multiplies by 448 / largest and stores 1 / that; we divide by largest / 448: scales one ulp apart, at most, and codes
    equal but for near ties, of which 32,768 random weights have none or few."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Holder:
        quantization_config = transformers.FineGrainedFP8Config(weight_block_size=(64, 64))

    out = Fp8Quantize(Holder())._quantize_one("layer.weight", weight())
    found = ours(Holder.quantization_config)
    scale = out["layer.weight_scale_inv"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    theirs = out["layer.weight"].float() * scale
    assert float(((found - theirs).abs() > 2**-22 * theirs.abs()).float().mean()) < 1e-3


@pytest.mark.parametrize(
    ("config", "schemes"),
    [
        (transformers.QuantoConfig(), ["int8/channel sym dynamic"]),
        (transformers.QuantoConfig(weights="float8"), ["e4m3/channel sym dynamic"]),
        (transformers.BitNetQuantConfig(), ["int2n/tensor sym dynamic rule=absmean", "int8/token sym dynamic"]),
        (transformers.FineGrainedFP8Config(), ["e4m3/block128x128 sym dynamic", "e4m3/group128 sym dynamic"]),
        (transformers.FbgemmFp8Config(activation_scale_ub=None), ["e4m3/channel sym dynamic", "e4m3/token sym dynamic"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False},
         ["int4/group64 sym dynamic rule=compressed-tensors"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
         ["int4/group128 asym dynamic rule=compressed-tensors"]),
    ],
    ids=lambda c: c if isinstance(c, list) else getattr(c, "quant_method", "dict"),
)  # fmt: skip
def test_what_stands_in_the_plan(config: Any, schemes: list[str]) -> None:
    plan = qt.plan(Block(), qt.recipe.from_hf(config))
    assert [str(row.scheme) for row in plan.quantized if row.module == "layer"] == schemes
    assert {row.module for row in plan.quantized} == {"layer"}


def test_mxfp4_means_the_experts_alone() -> None:
    config = transformers.GptOssConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    plan = qt.plan(
        model, qt.recipe.from_hf(transformers.Mxfp4Config()), {"input_ids": torch.ones(1, 4, dtype=torch.int64)}
    )
    assert {row.name.rpartition("experts.")[2]: str(row.scheme) for row in plan.quantized} == {
        "gate_up_proj.weight": "e2m1/group32 sym dynamic e8m0:floor",
        "down_proj.weight": "e2m1/group32 sym dynamic e8m0:floor",
    }


def test_modules_that_the_config_leaves() -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["layer"])
    plan = qt.plan(Block(), qt.recipe.from_hf(config))
    assert {row.module for row in plan.quantized} == {"lm_head"}


def test_groups_of_compressed_tensors_and_its_cache() -> None:
    args = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    group = {"targets": ["re:.*layer$"], "weights": {"num_bits": 8, "strategy": "channel"}}
    data = {"quant_method": "compressed-tensors", "config_groups": {"a": group}, "kv_cache_scheme": args, "ignore": []}
    recipe = qt.recipe.from_hf(data)
    assert [rule.match for rule in recipe.rules] == ["*", "*layer", "*"]
    assert recipe.rules[-1].schemes == dict.fromkeys(("key", "value"), "e4m3/tensor sym static minmax")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"quant_method": "aqlm"}, "quant_method 'aqlm' has no equivalent"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm_int8_threshold=6.0 keeps outlier columns"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit"),
        ({"quant_method": "quanto", "weights": "int4"}, "weights='int4' have a float zero point"),
        ({"quant_method": "quanto", "weights": "int8", "activations": "int8"}, "activations='int8'"),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "axis": 0}}}, "axis=0"),
        ({"quant_method": "bitnet", "use_rms_norm": True}, "use_rms_norm"),
        ({"quant_method": "fp8", "activation_scheme": "static"}, "activation_scheme='static'"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "activation_scale_ub=1200.0"),
        ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "desc_act=True"),
        ({"quant_method": "torchao", "quant_type": {"default": config_to_dict(Int4WeightOnlyConfig())}}, "Int4WeightOnlyConfig"),
        ({"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["re:.*(q|k)_proj"]}}}, "more than a glob"),
        ({"quant_method": "compressed-tensors",
          "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32,
                                                                     "actorder": "group"}}}}, "actorder='group'"),
    ],
    ids=lambda c: "" if isinstance(c, str) else str(c.get("quant_method")),
)  # fmt: skip
def test_what_no_recipe_says(data: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says.replace("(", r"\(").replace("|", r"\|")) as caught:
        qt.recipe.from_hf(data)
    assert isinstance(caught.value, QatanaError)


def test_the_weights_alone() -> None:
    found = qt.recipe.from_hf({"quant_method": "bitsandbytes", "load_in_8bit": True}, inputs=False)
    assert {role for rule in found.rules for role in rule.schemes} == {"weight"}
    with pytest.raises(RecipeError, match="is an object of transformers or its dictionary, not int"):
        qt.recipe.from_hf(3)
