"""Tiny random models of the architectures of transformers: a model type, what it is, and how small it can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = TEXT | {"num_key_value_heads": 4, "type_vocab_size": 2}
SEQ = {
    "vocab_size": 96, "d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {
    "vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {
    "image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_channels": 3,
}  # fmt: skip
STAGES = {"image_size": 32, "num_channels": 3, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
STAGED = {"image_size": 32, "num_channels": 3}
AUDIO = {
    "vocab_size": 32, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
    "conv_dim": [32, 32], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0, "apply_spec_augment": False,
}  # fmt: skip
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
CLIP = {"text_config": ENCODER | {"eos_token_id": 2}, "vision_config": VISION, "projection_dim": 32}


@dataclass(frozen=True)
class Architecture:
    """model_type as transformers names it; family for the table; the auto class; the config; the inputs."""

    model_type: str
    family: str
    auto: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]

    def make(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model, random, and a batch."""
        import transformers

        config = transformers.CONFIG_MAPPING[self.model_type](**self.config)
        quiet(config)
        auto = getattr(transformers, self.auto)
        model = auto.from_config(config) if self.auto.startswith("Auto") else auto(config)
        return model, self.inputs()


def quiet(config: Any) -> None:
    """No dropout of any kind and no cache: two steps have the same gradients, and outputs are tensors."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            quiet(value)
        elif isinstance(value, float) and ("drop" in name or name == "mask_time_prob"):
            setattr(config, name, 0.0)
        elif name == "use_cache":
            config.use_cache = False


def ids(length: int = 12, low: int = 3, high: int = 90) -> Tensor:
    return torch.randint(low, high, (2, length), generator=torch.Generator().manual_seed(3))


def text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 12, dtype=torch.int64)}


def decoder() -> dict[str, Any]:
    return text() | {"use_cache": False}


def pair() -> dict[str, Any]:
    return text() | {"decoder_input_ids": ids(8), "use_cache": False}


def pixels(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(4))


def image() -> dict[str, Any]:
    return {"pixel_values": pixels()}


def image_text() -> dict[str, Any]:
    return text() | image()


def wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 800, generator=torch.Generator().manual_seed(5))}


def mel(bins: int, frames: int) -> Tensor:
    return torch.randn(2, bins, frames, generator=torch.Generator().manual_seed(6))


LM, MASKED, SEQ2SEQ, BASE = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModel"
IMAGES = "AutoModelForImageClassification"


def _encoder(name: str, **more: Any) -> Architecture:
    return Architecture(name, "encoder", MASKED, ENCODER | more, text)


def _decoder(name: str, **more: Any) -> Architecture:
    return Architecture(name, "decoder", LM, TEXT | more, decoder)


def _moe(name: str, **more: Any) -> Architecture:
    return Architecture(name, "mixture of experts", LM, TEXT | MOE | more, decoder)


def _vision(name: str, base: dict[str, Any] = VISION, **more: Any) -> Architecture:
    return Architecture(name, "vision", IMAGES, base | more, image)


# Layers of two kinds ask for two layers.
_MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip

FALCON = Architecture("falcon", "decoder", LM, {k: v for k, v in TEXT.items() if k != "head_dim"}, decoder)

ARCHITECTURES: tuple[Architecture, ...] = (
    _encoder("bert"),
    _encoder("roberta"),
    _encoder("xlm-roberta"),
    _encoder("electra", embedding_size=64),
    _encoder("albert", embedding_size=32),
    _encoder("mpnet"),
    _encoder("eurobert"),
    _encoder("distilbert", dim=64, n_layers=2, n_heads=4, hidden_dim=96),
    _encoder("deberta-v2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]),
    _encoder("modernbert", num_hidden_layers=2, local_attention=8, global_attn_every_n_layers=2),
    _decoder("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64),
    _decoder("gpt_neox"),
    _decoder("gptj", n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    _decoder("opt", ffn_dim=96, word_embed_proj_dim=64),
    _decoder("bloom", n_layer=2, n_head=4),
    _decoder("llama"),
    _decoder("mistral"),
    _decoder("ministral3"),
    _decoder("qwen2"),
    _decoder("qwen3"),
    _decoder("gemma"),
    _decoder("gemma2", num_hidden_layers=2),
    _decoder("gemma3_text", num_hidden_layers=2),
    _decoder("phi"),
    _decoder("phi3"),
    _decoder("olmo3", num_hidden_layers=2),
    FALCON,
    _decoder("smollm3", num_hidden_layers=2),
    _decoder("starcoder2"),
    _decoder("stablelm"),
    _decoder("cohere2", num_hidden_layers=2),
    _decoder("granite"),
    _decoder("glm4"),
    _decoder("exaone4", num_hidden_layers=2),
    _decoder("nemotron"),
    _decoder("seed_oss"),
    _decoder("nanochat"),
    _decoder("mamba", state_size=8),
    _decoder("gemma4_text", num_hidden_layers=2, num_kv_shared_layers=0, hidden_size_per_layer_input=0),
    _decoder("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
    _moe("mixtral"),
    _moe("qwen2_moe", shared_expert_intermediate_size=48),
    _moe("qwen3_moe"),
    _moe("olmoe"),
    _moe("gpt_oss"),
    _moe("granitemoe"),
    _moe("glm4_moe", num_hidden_layers=2, **_MLA | {"num_key_value_heads": 2}),
    _moe("ernie4_5_moe", moe_num_experts=4, moe_k=2),
    _moe("phimoe"),
    _moe("llama4_text", num_hidden_layers=2, intermediate_size_mlp=96, num_experts_per_tok=1),
    _moe("deepseek_v3", num_hidden_layers=2, **_MLA),
    _moe("deepseek_v2", num_hidden_layers=2, **_MLA),
    _moe("minimax_m2"),
    Architecture("t5", "encoder-decoder", SEQ2SEQ, T5, pair),
    Architecture("mt5", "encoder-decoder", SEQ2SEQ, T5 | {"feed_forward_proj": "gated-gelu"}, pair),
    Architecture("bart", "encoder-decoder", SEQ2SEQ, SEQ, pair),
    Architecture("mbart", "encoder-decoder", SEQ2SEQ, SEQ, pair),
    Architecture("pegasus", "encoder-decoder", SEQ2SEQ, SEQ, pair),
    Architecture("marian", "encoder-decoder", SEQ2SEQ, SEQ | {"decoder_vocab_size": 96}, pair),
    Architecture("m2m_100", "encoder-decoder", SEQ2SEQ, SEQ, pair),
    Architecture("t5gemma", "encoder-decoder", SEQ2SEQ, {"encoder": TEXT, "decoder": TEXT, "vocab_size": 96}, pair),
    Architecture("switch_transformers", "mixture of experts", SEQ2SEQ, T5 | {"num_experts": 4, "num_sparse_encoder_layers": 1,
                 "num_sparse_decoder_layers": 1, "expert_capacity": 24}, pair),
    _vision("vit"), Architecture("deit", "vision", "DeiTForImageClassification", VISION, image), _vision("beit"),
    _vision("dinov2"), _vision("dinov2_with_registers"), _vision("ijepa"),
    Architecture("dinov3_vit", "vision", BASE, VISION, image),
    Architecture("siglip", "vision", IMAGES, {"text_config": ENCODER, "vision_config": VISION}, image),
    _vision("convnext", STAGES), _vision("convnextv2", STAGES), _vision("resnet", STAGES, embedding_size=16, layer_type="basic"),
    _vision("regnet", STAGES, embedding_size=16, groups_width=8),
    _vision("swin", STAGED, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, patch_size=4),
    _vision("swinv2", STAGED, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=2, patch_size=4),
    Architecture("segformer", "vision", IMAGES, STAGES | {"image_size": 64, "hidden_sizes": [16, 32, 32, 64],
                 "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 1, 1]}, lambda: {"pixel_values": pixels(64)}),
    _vision("mobilevit", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[16, 16, 16, 24, 24, 32, 64], patch_size=2,
            num_attention_heads=4, last_hidden_size=64, initializer_range=0.2),
    _vision("mobilenet_v2", depth_multiplier=0.35, finegrained_output=True, initializer_range=0.2),
    Architecture("hiera", "vision", IMAGES, {"image_size": [32, 32], "patch_size": [7, 7], "embed_dim": 16, "depths": [1, 1],
                 "num_heads": [1, 2], "query_stride": [2, 2], "masked_unit_size": [4, 4], "num_query_pool": 1}, image),
    Architecture("detr", "vision", "AutoModelForObjectDetection", SEQ | {"num_queries": 6, "use_timm_backbone": False,
                 "use_pretrained_backbone": False, "backbone_config": {"model_type": "resnet", **STAGES, "embedding_size": 16,
                 "layer_type": "basic", "out_features": ["stage4"]}}, image),
    Architecture("wav2vec2", "audio", "AutoModelForCTC", AUDIO, wave),
    Architecture("hubert", "audio", "AutoModelForCTC", AUDIO, wave),
    Architecture("wavlm", "audio", "AutoModelForCTC", AUDIO, wave),
    Architecture("data2vec-audio", "audio", "AutoModelForCTC", AUDIO | {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}, wave),
    Architecture("whisper", "audio", "AutoModelForSpeechSeq2Seq", SEQ | {"num_mel_bins": 16, "max_source_positions": 24,
                 "max_target_positions": 24}, lambda: {"input_features": mel(16, 48), "decoder_input_ids": ids(8), "use_cache": False}),
    Architecture("speech_to_text", "audio", "AutoModelForSpeechSeq2Seq", SEQ | {"input_feat_per_channel": 16, "conv_channels": 32,
                 "num_conv_layers": 2, "conv_kernel_sizes": [3, 3], "max_source_positions": 64, "max_target_positions": 24},
                 lambda: {"input_features": mel(48, 16), "decoder_input_ids": ids(8), "use_cache": False}),
    Architecture("audio-spectrogram-transformer", "audio", "AutoModelForAudioClassification", VISION | {"max_length": 48,
                 "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8}, lambda: {"input_values": mel(48, 16)}),
    Architecture("moonshine", "audio", "AutoModelForSpeechSeq2Seq", TEXT | {"encoder_num_hidden_layers": 2,
                 "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4,
                 "encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
                 lambda: {"input_values": torch.randn(2, 4000), "decoder_input_ids": ids(8), "use_cache": False}),
    Architecture("clip", "multimodal", BASE, CLIP, image_text),
    Architecture("siglip2", "multimodal", BASE, {"text_config": ENCODER, "vision_config": VISION | {"num_patches": 16}},
                 lambda: {"input_ids": ids(), "pixel_values": torch.randn(2, 16, 192),
                          "pixel_attention_mask": torch.ones(2, 16, dtype=torch.int64),
                          "spatial_shapes": torch.tensor([[4, 4], [4, 4]])}),
    Architecture("blip", "multimodal", "BlipForImageTextRetrieval", CLIP | {"image_text_hidden_size": 32,
                 "text_config": ENCODER | {"encoder_hidden_size": 64}}, image_text),
    Architecture("vilt", "multimodal", BASE, VISION | ENCODER,
                 lambda: image_text() | {"pixel_mask": torch.ones(2, 32, 32, dtype=torch.int64)}),
    Architecture("layoutlmv3", "multimodal", "AutoModelForTokenClassification", ENCODER | {"coordinate_size": 8, "shape_size": 16,
                 "max_2d_position_embeddings": 64, "input_size": 32, "patch_size": 8, "visual_embed": False},
                 lambda: text() | {"bbox": torch.randint(0, 60, (2, 12, 4)).sort(-1).values}),
    Architecture("llava", "multimodal", "AutoModelForImageTextToText", {
        "text_config": TEXT | {"model_type": "llama"}, "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 95, "image_token_id": 95, "vision_feature_layer": -1},
        lambda: _with_images(16)),
    Architecture("paligemma", "multimodal", "AutoModelForImageTextToText", {
        "text_config": TEXT | {"model_type": "gemma"}, "vision_config": VISION | {"model_type": "siglip_vision_model"},
        "image_token_index": 95, "image_token_id": 95, "projection_dim": 64},
        lambda: _with_prefix(_with_images(16))),
    Architecture("qwen2_5_vl", "multimodal", "AutoModelForImageTextToText", {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 4]}},
        "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64,
                          "patch_size": 8, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "window_size": 32},
        "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92},
        lambda: _qwen_images()),
    Architecture("qwen3_vl", "multimodal", "AutoModelForImageTextToText", {
        "text_config": TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}},
        "vision_config": {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "out_hidden_size": 64,
                          "patch_size": 8, "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92},
        lambda: _qwen_images()),
    _decoder("mamba2", state_size=8, num_heads=8, head_dim=16, n_groups=2, chunk_size=8),
    _decoder("qwen3_5_text", num_hidden_layers=2, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
             linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"]),
    _moe("qwen3_next", num_hidden_layers=2, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
         linear_value_head_dim=16,
         layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=48),
)  # fmt: skip


def _with_images(tokens: int) -> dict[str, Any]:
    """Text behind the tokens that an image's features replace."""
    found = torch.cat([torch.full((2, tokens), 95), ids()], 1)
    return {"input_ids": found, "attention_mask": torch.ones_like(found), "pixel_values": pixels(), "use_cache": False}


def _with_prefix(batch: dict[str, Any]) -> dict[str, Any]:
    """The image is a prefix, the text behind it causal: the model's processor always says so. Where nothing does, transformers' own
    eager attention is causal and its fused one is not (outputs 4 % apart in 5.23)."""
    return batch | {"token_type_ids": (batch["input_ids"] != 95).long()}


def _qwen_images() -> dict[str, Any]:
    """Two images of 4 x 4 patches (2 frames of 8 x 8 pixels each), merged to 4 tokens."""
    found = torch.cat([torch.full((2, 1), 93), torch.full((2, 4), 95), torch.full((2, 1), 92), ids()], 1)
    patches = torch.randn(32, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(7))
    grid = torch.tensor([[1, 4, 4], [1, 4, 4]])
    return {
        "input_ids": found, "attention_mask": torch.ones_like(found), "pixel_values": patches, "image_grid_thw": grid,
        "mm_token_type_ids": (found == 95).long(), "use_cache": False,
    }  # fmt: skip
