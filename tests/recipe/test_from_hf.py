"""Configs of other libraries as recipes: the weights of a layer are theirs, bit for bit, and what has no equivalent says so."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qatana as qt
from qatana.errors import QatanaError, RecipeError
from qatana.numerics import fake_quantize_by, quantize_by

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


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES])
def test_bitsandbytes_8bit(dtype: torch.dtype) -> None:
    """Codes and scales. (There, a code is read back as code * largest * f32(1 / 127), which rounds twice.)"""
    config = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    x = weight(dtype)
    codes, largest, _ = bnb.int8_vectorwise_quant(x.clone())
    plan = qt.plan(Block(dtype), qt.recipe.from_hf(config))
    chosen = {row.role: row.scheme for row in plan.quantized}
    assert chosen["weight"].text == "int8n/channel sym dynamic rule=bitsandbytes"
    found, parameters = quantize_by(x, chosen["weight"])
    assert torch.equal(found.view_as(codes), codes)
    assert torch.equal(parameters.scale.flatten(), largest / torch.full_like(largest, 127))
    assert torch.equal(quantize_by(x, chosen["input"])[0].view_as(codes), codes)  # inputs by the same function
    same(ours(config, dtype), (codes.float() * parameters.scale).to(dtype))


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", ["float", "ue8m0"])
@pytest.mark.parametrize("block", [(64, 64), None])
def test_fine_grained_fp8(block: tuple[int, int] | None, scales: str, dtype: torch.dtype) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    class Holder:
        quantization_config = transformers.FineGrainedFP8Config(weight_block_size=block, scale_fmt=scales)

    out = Fp8Quantize(Holder())._quantize_one("layer.weight", weight(dtype))
    rows, columns = block or (128, 256)
    scale = out["layer.weight_scale_inv"].float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    same(ours(Holder.quantization_config, dtype), (out["layer.weight"].float() * scale).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES])
def test_bitnet(dtype: torch.dtype) -> None:
    """AutoBitLinear's own function, which torch.compile would compile: run as it is written."""
    from transformers.integrations.bitnet import WeightQuant

    config = transformers.BitNetQuantConfig(linear_class="autobitlinear", quantization_mode="online")
    torch.compiler.set_stance("force_eager")
    try:
        theirs = WeightQuant.apply(weight(dtype))
    finally:
        torch.compiler.set_stance("default")
    same(ours(config, dtype), theirs)


def test_fbgemm_by_its_equation() -> None:
    """`dynamicQuantizeMatrixRowwise` of fbgemm_gpu, which runs on GPUs alone: scale = max(largest / 448, 1 / (448 * 512)), then
    x / scale to E4M3. No row here is as small as 2^-9, where its lower bound would begin."""
    x = weight()
    scale = x.abs().amax(1, keepdim=True) / torch.full((128, 1), 448.0)
    assert float(scale.min()) > 1 / (448 * 512)
    config = transformers.FbgemmFp8Config(activation_scale_ub=None)
    same(ours(config), (x / scale).to(torch.float8_e4m3fn).float() * scale)


QUANTO = [
    ({"quant_method": "quanto", "weights": name}, f"quanto.{name}") for name in ("int8", "int4", "int2", "float8")
]
GPTQ = [
    ({"quant_method": "gptq", "bits": bits, "group_size": 64, "sym": name == "sym"}, f"gptq.{bits}.{name}")
    for bits in (4, 8)
    for name in ("sym", "asym")
]
AWQ = [
    ({"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": name == "asym"}, f"awq.{name}")
    for name in ("sym", "asym")
]


@pytest.mark.parametrize(("config", "key"), QUANTO + GPTQ + AWQ, ids=lambda c: c if isinstance(c, str) else "")
def test_libraries_that_are_not_installed(config: dict[str, Any], key: str) -> None:
    """What they computed is recorded by support/record_other_libraries.py."""
    recorded = load_file(Path(__file__).with_name("other_libraries.safetensors"))
    x, theirs = recorded["x"], recorded[key]
    model = nn.Sequential(nn.Linear(256, 16, bias=False))
    plan = qt.plan(model, qt.recipe.from_hf(config))
    found = fake_quantize_by(x, next(row.scheme for row in plan.quantized if row.role == "weight"))
    if key.endswith(".sym") and key.startswith("gptq"):
        # GPTQ halves the scale of a group without a negative number and clips all but the lower half of it, by an oversight: last row.
        found, theirs = found[:15], theirs[:15]
    same(found, theirs)


@pytest.mark.parametrize(
    ("config", "schemes"),
    [
        (transformers.QuantoConfig(), ["int8/channel sym dynamic"]),
        (transformers.QuantoConfig(weights="float8"), ["e4m3/channel sym dynamic"]),
        (transformers.QuantoConfig(weights="int4"), ["uint4/group128 asym dynamic rule=quanto"]),
        (transformers.BitNetQuantConfig(), ["int2n/tensor sym dynamic rule=absmean", "int8/token sym dynamic"]),
        (transformers.FineGrainedFP8Config(), ["e4m3/block128x128 sym dynamic float32:reciprocal", "e4m3/group128 sym dynamic"]),
        (transformers.FbgemmFp8Config(activation_scale_ub=None), ["e4m3/channel sym dynamic", "e4m3/token sym dynamic"]),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False},
         ["int4/group64 sym dynamic rule=gptq"]),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
         ["int4/group128 asym dynamic rule=awq"]),
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
        "gate_up_proj.weight": "e2m1/group32 sym dynamic e8m0:rceil",
        "down_proj.weight": "e2m1/group32 sym dynamic e8m0:rceil",
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
        ({"quant_method": "quanto", "weights": "int3"}, "weights='int3' have no equivalent"),
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
