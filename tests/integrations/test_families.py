"""from_pretrained and save_pretrained across families: layers that are no Linear, experts, tables under several names, pixels, sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.pretrained import assert_same_state
from torch import Tensor

import qatana as qt
from qatana.integrations.huggingface import QatanaConfig, example_inputs, integer_model

RECIPE = qt.recipe("torch", weight="int8/channel sym dynamic", input="int8/token")
SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SPEECH: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
}  # fmt: skip


def wav2vec2() -> Any:
    config = hf.Wav2Vec2Config(
        vocab_size=60, conv_dim=(32, 32), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2, **SIZE,
    )  # fmt: skip
    return hf.Wav2Vec2ForCTC(config)


def whisper() -> Any:
    config = hf.WhisperConfig(
        vocab_size=60, max_source_positions=50, max_target_positions=50, num_mel_bins=16, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, **SPEECH,
    )  # fmt: skip
    return hf.WhisperForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2, n_positions=64)),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(vocab_size=60, num_key_value_heads=1, num_local_experts=4, **SIZE)
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=60, max_position_embeddings=64, **SPEECH)),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(image_size=32, patch_size=8, **SIZE)),
    "wav2vec2": wav2vec2,
    "whisper": whisper,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_kinds_come_back(family: str, tmp_path: Path) -> None:
    model = FAMILIES[family]()
    kind = type(model)
    model.save_pretrained(tmp_path / "float")
    model = kind.from_pretrained(tmp_path / "float", quantization_config=QatanaConfig(RECIPE))
    batch = example_inputs(model)

    @torch.no_grad()
    def output(each: Any) -> Tensor:
        return next(value for value in each(**batch).to_tuple() if isinstance(value, Tensor))

    expected = output(model)
    integer = integer_model(model)
    assert torch.equal(output(integer), expected)
    for name, each in (("qat", model), ("integer", integer)):
        each.save_pretrained(tmp_path / name)
        again = kind.from_pretrained(tmp_path / name)
        assert_same_state(again, each)
        assert torch.equal(output(again), expected), name
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("float", "integer")}
    assert sizes["integer"] < sizes["float"]
