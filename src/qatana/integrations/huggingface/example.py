"""A small batch that a model accepts, made from its configuration: what planning runs when the user gives none."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

import qatana as qt

BATCH, LENGTH = 2, 8


def example_inputs(model: Any) -> dict[str, Any]:
    """Keyword arguments for one forward pass of a Hugging Face model, on its device.

    Token ids (2, 8) with their mask, pixel values (2, channels, size, size), a second of sound, or log-mel features, by the model's
    `main_input_name`; with decoder ids for encoder-decoders.   Raises: ModelError for a model that takes something else."""
    parameters = inspect.signature(model.forward).parameters
    main, config = getattr(model, "main_input_name", ""), model.config
    maker = _MAKERS.get(main)
    made = None if maker is None or main not in parameters else maker(config)
    if made is None:
        raise qt.ModelError(
            f"no example can be made for {type(model).__name__}, whose main input is '{main}'; load the float model, then "
            f"qatana.plan(model, recipe, batch), qatana.prepare(model, plan) and qatana.integrations.huggingface.attach(model)"
        )
    found: dict[str, Any] = {main: made}
    if main == "input_ids" and "attention_mask" in parameters:
        found["attention_mask"] = torch.ones_like(made)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        found["decoder_input_ids"] = _ids(config)
    if "use_cache" in parameters:
        found["use_cache"] = False
    return {key: value.to(model.device) if isinstance(value, Tensor) else value for key, value in found.items()}


def _ids(config: Any) -> Tensor:
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 8)
    return (torch.arange(BATCH * LENGTH) % min(vocabulary, 1000)).reshape(BATCH, LENGTH)


def _pixels(config: Any) -> Tensor | None:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or 224
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return _noise(BATCH, getattr(vision, "num_channels", 3), height, width)


def _sound(config: Any) -> Tensor:
    return _noise(BATCH, 16000)


def _features(config: Any) -> Tensor | None:
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    return None if bins is None or positions is None else _noise(BATCH, bins, 2 * positions)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


_MAKERS = {"input_ids": _ids, "pixel_values": _pixels, "input_values": _sound, "input_features": _features}
