"""Hugging Face attention through its own registry: one attention function, "qatana", that uses a module's AttentionProducts.

Where a model's attention has none (its target leaves attention float) the function computes plain attention, so training, conversion
and export of a model all run the same code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qatana.errors import ModelError
from qatana.nn.attention import AttentionProducts
from qatana.nn.cache import from_codes

NAME = "qatana"
SLOT = "attention_products"

SPECIAL = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Arguments that change what stands between the two products: capped scores, sinks, biases, chosen keys."""

Listener = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, str], None]
_listener: list[Listener] = []


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function of the registry.   query (B, H, Q, D), key and value (B, H or H/groups, T, D) -> (B, Q, H, D).

    Attention with SPECIAL arguments is the model's own (eager) one, and stays float.   Raises: ModelError where it was to be quantized."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    special = next((name for name in SPECIAL if rest.get(name) is not None), "")
    if special:
        context = _own(module, special)(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout if module.training else 0.0,
            **rest,
        )[0]
        for listen in _listener:
            listen(module, query, key, value, context, special)
        return context, None
    held, groups = from_codes(key), query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    products = getattr(module, SLOT, None)
    if products is None:
        products = _FLOAT
    dropout = dropout if module.training else 0.0
    context = products(query, key, value, attention_mask, scaling, dropout, **({"held": True} if held else {}))
    context = context.transpose(1, 2).contiguous()
    for listen in _listener:
        listen(module, query, key, value, context, "")
    return context, None


def _own(module: nn.Module, special: str) -> Callable[..., tuple[Tensor, Any]]:
    """The eager attention function of the file that defines a model."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if own is None or getattr(module, SLOT, None) is not None:
        raise ModelError(
            f"the attention of {type(module).__name__} takes '{special}', which its quantized form does not know; leave it float: "
            f"recipe.rule(type='AttentionProducts', query=None, key=None, value=None, probability=None, context=None)"
        )
    return own


_FLOAT = AttentionProducts("onnxruntime")


def has_registry(model: nn.Module) -> bool:
    """Whether a model takes its attention function from the Hugging Face registry."""
    return hasattr(model, "set_attn_implementation") and getattr(model, "_supports_attention_backend", False)


def hosts(module: nn.Module) -> list[nn.Module]:
    """The models that take their attention function from the registry: the model itself, or those in a module of the user's own."""
    if hasattr(module, "set_attn_implementation"):
        return [module] if has_registry(module) else []
    return [host for child in module.children() for host in hosts(child)]


def use_attention(model: Any) -> None:
    """Register "qatana" (its mask is the additive one of eager attention) and select it for this model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    model.set_attn_implementation(NAME)


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model and of its parts, each once."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    while waiting:
        config = waiting.pop()
        if id(config) not in found and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    return list(found.values())


@contextmanager
def listening(listen: Listener) -> Iterator[None]:
    """Call `listen(module, query, key, value, context, special)` at every attention inside the block; special: the argument that makes it
    the model's own, or ""."""
    _listener.append(listen)
    try:
        yield
    finally:
        _listener.remove(listen)


@contextmanager
def probing_attention(model: nn.Module) -> Iterator[None]:
    """Let Hugging Face models run with the registered function, and give every part its own back afterwards: parts differ, and
    `set_attn_implementation` refuses a name that one of them (a convolutional backbone) does not know."""
    found = hosts(model) if "transformers" in sys.modules else []
    before = [(config, config._attn_implementation) for host in found for config in _configs(host)]
    for host in found:
        use_attention(host)
    try:
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


@torch.no_grad()
def run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass in eval mode, gradients off; the training flags come back as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return model(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
