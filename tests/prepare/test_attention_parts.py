"""The attention functions of Hugging Face models: which part gets which, and which tensors a fused projection shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from support.llama import tiny_llama
from torch import Tensor, nn

import qatana as qt

IDS = {"input_ids": torch.arange(18).reshape(2, 9) % 50, "use_cache": False}
WEIGHTS = qt.recipe("torch", weight="int4/group32")


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_float_attention_stays_the_users(own: str) -> None:
    """Nothing of attention is quantized: the model computes with the function that it had, to the bit."""
    model = tiny_llama().eval()
    model.set_attn_implementation(own)
    with torch.no_grad():
        expected = model(**IDS).logits
        prepared = qt.prepare(model, qt.plan(model, WEIGHTS, IDS))
        assert model.config._attn_implementation == own
        assert torch.equal(prepared(**IDS).logits, expected)


@pytest.mark.parametrize("recipe", ["ort:int8", "ort:int4", qt.recipe("torch", key="int8/token", value="int8/token")])
def test_quantized_attention_is_ours(recipe: Any) -> None:
    """And engines run the plain products that their kernels know."""
    model = tiny_llama().eval()
    qt.prepare(model, qt.plan(model, recipe, IDS))
    assert model.config._attn_implementation == "qatana"


def test_fused_attention_converts_to_the_same_numbers() -> None:
    """Run without a mask, captured with one: the kernel gives both alike."""
    model = tiny_llama().eval()
    assert model.config._attn_implementation == "sdpa"
    model = qt.calibrate(qt.prepare(model, qt.plan(model, WEIGHTS, IDS)), [IDS])
    with torch.no_grad():
        assert torch.equal(qt.convert(model)(IDS["input_ids"]), model(**IDS).logits)


def detr() -> Any:
    backbone = {
        "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16], "depths": [1], "layer_type": "basic",
        "out_features": ["stage1"],
    }  # fmt: skip
    config = hf.DetrConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=4, use_timm_backbone=False, use_pretrained_backbone=False, backbone_config=backbone,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config).eval()


def implementations(model: Any) -> list[Any]:
    return [m.config._attn_implementation for m in model.modules() if isinstance(m, hf.PreTrainedModel)]


def test_every_part_gets_its_own_function_back() -> None:
    """A backbone of convolutions refuses the name that the transformer around it has."""
    model = detr()
    before = implementations(model)
    assert "sdpa" in before
    plan = qt.plan(model, "ort:int8", {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert implementations(model) == before
    assert {row.module.partition(".")[0] for row in plan.rows if row.kind == "attention" and row.scheme} == {"model"}


def test_a_model_inside_the_users_module() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = tiny_llama().model, nn.Linear(256, 3)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.head(self.body(input_ids).last_hidden_state)

    model: Any = Wrapped().eval()
    ids = {"input_ids": IDS["input_ids"]}
    plan = qt.plan(model, "ort:int8", ids)
    attended = {row.role for row in plan.rows if row.kind == "attention" and row.scheme is not None}
    assert attended == {"query", "key", "value", "probability", "context"}
    model = qt.calibrate(qt.prepare(model, plan), [ids])
    assert model.body.config._attn_implementation == "qatana"
    assert model.body.layers[0].self_attn.attention_products.query_quantizer.enabled


def test_a_fused_projection_has_no_range_of_one_part() -> None:
    """q, k and v are views of one output: rounding that by the range of v would round q and k by it too."""
    config = hf.Phi3Config(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    plan = qt.plan(hf.Phi3ForCausalLM(config).eval(), "ort:int8", IDS)
    assert plan.row("model.layers.0.self_attn.qkv_proj.output") is None
    assert plan.row("model.layers.0.self_attn.qkv_proj.weight").scheme is not None  # type: ignore[union-attr]
    output = plan.row("model.layers.0.self_attn.o_proj.input")
    assert output is not None
    assert output.shares == "model.layers.0.self_attn.attention_products.context"


def test_attention_that_is_written_out_is_listed() -> None:
    """Bloom computes its products itself: an engine's plan says that they stay float."""
    config = hf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=2)
    plan = qt.plan(hf.BloomForCausalLM(config).eval(), "ort:int8", IDS)
    rows = [row for row in plan.rows if row.kind == "attention"]
    assert {row.module for row in rows} == {"transformer.h.0.self_attention.attention_products"}
    assert {row.role for row in rows} == {"query", "key", "value", "probability", "context"}
    assert all(row.scheme is None and "its own code" in row.reason for row in rows)
