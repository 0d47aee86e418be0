"""Hugging Face: which models can be pooled, by their attention layers, and why others cannot.

Knows classes and configurations; nothing of how a forward is pooled.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from fapool_plugin.base.unrecorded import modules_in
from fapool_plugin.integrations.huggingface.attention import local_function
from fapool_plugin.integrations.huggingface.attention_layer import AttentionLayer, bypass_reason
from fapool_plugin.integrations.huggingface.config_view import local_name

FULL_LAYERS = {"full_attention", "hybrid"}
_LEFT_ALONE = {"sliding_attention", "hybrid_sliding", "conv", "linear_attention", "dummy"}
"""Layers that are computed as without the plugin. Any kind in neither set is refused."""


def attention_modules(model: Any) -> Iterator[Any]:
    """Every self-attention layer of the decoder; those of a vision tower are not its."""
    text = model.config.get_text_config(decoder=True)
    kind = type(getattr(text, "fapool_viewed", text))
    for module in modules_in(model):
        if not type(module).__name__.endswith("Attention") or getattr(module, "layer_idx", None) is None:
            continue
        # Without a configuration a layer cannot ask for an attention function by its name.
        if isinstance(getattr(module, "config", None), kind) and not getattr(module, "is_cross_attention", False):
            yield module


def changed_reason(owner: Any, manager: Any) -> str | None:
    """Why layers are not those that were pooled; None: they are. What has no view of its configuration, or is a copy,
    would be left without the mask that pooled layers do without."""
    for module in attention_modules(owner):
        core, viewed = getattr(module, "fa_pool", None), getattr(module.config, "fapool_viewed", None)
        if (
            core is None
            or viewed is None
            or not issubclass(type(module), AttentionLayer)
            or core.manager is not manager
            or core.layer != module.layer_idx
        ):
            return f"{type(module).__name__} {module.layer_idx} was changed after pooling: pool the model once more"
        if core.bypassed:
            return bypass_reason(module)
        if (reason := foreign_reason(module)) is not None:
            return reason
    return None


def foreign_reason(module: Any) -> str | None:
    """Why what computes a layer's attention may be something else than softmax attention: its code is neither
    transformers', whatever name it is registered by, nor stands beside the layer's class. None if it is."""
    function = local_function(module)
    # Not __module__, which functools.wraps copies.
    home = getattr(function, "__globals__", {}).get("__name__", "")
    if function is None or home == type(module).__module__ or home.split(".")[0] == "transformers":
        return None
    name = local_name(module.config)
    return f'attention function "{name}" is not transformers\' own: it may compute something else than pool ranks do'


def ownable_layers(attentions: list[Any]) -> frozenset[int]:
    """Layers whose attention reads all of the very keys that are cached: no window, no latents that it expands."""
    users = Counter(module.layer_idx for module in attentions)
    others = {module.layer_idx for module in attentions if hasattr(module, "expand_kv")}
    others |= {module.layer_idx for module in attentions if getattr(module, "sliding_window", None) is not None}
    return frozenset(index for index, count in users.items() if count == 1 and index not in others)


def refuse_object(model: Any) -> None:
    """Raises ValueError for what is not a transformers model by itself."""
    name = type(model).__name__
    if isinstance(model, str | os.PathLike):
        raise ValueError(f"wrap() takes a loaded model, and {os.fspath(model)!r} is a path: use from_pretrained()")
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} holds the model that is to be pooled: wrap first, then PEFT (get_peft_model)")
    inside = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
    if isinstance(inside, nn.Module) and not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} holds the model that is to be pooled: wrap first, then {name}")
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is not a transformers model: give wrap() what AutoModelForCausalLM.from_pretrained() returns"
        )


def refuse_model(model: Any, attentions: list[Any]) -> None:
    """Raises ValueError, before any weight is used, for a model that cannot be pooled exactly."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; fa_pool pools causal decoders")
    if not model._can_set_attn_implementation() or not attentions:
        raise ValueError(
            f"{name} computes attention by itself, not through transformers' attention interface, so fa_pool cannot "
            "take it over. Load it without fa_pool"
        )
    if not getattr(config, "is_causal", True) or not any(getattr(m, "is_causal", True) for m in attentions):
        raise ValueError(f"{name} attends in both directions; fa_pool pools causal decoders. Load it without fa_pool")
    if "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ValueError(f"{name} shares keys between layers, which fa_pool does not pool. Load it without fa_pool")
    # Before transformers 5.23 such a model is loaded with "sdpa" unless told otherwise.
    if any(getattr(m, "attn_logit_softcapping", None) and local_name(m.config) == "sdpa" for m in attentions):
        raise ValueError(
            f'{name} caps its scores (attn_logit_softcapping), and its attention "sdpa" leaves that out: pooled and '
            'local layers would differ. Load it with attn_implementation="eager"'
        )
    kinds = sorted(set(get_layer_types_and_kwargs(config)[0]) - FULL_LAYERS - _LEFT_ALONE)
    if getattr(config, "attention_chunk_size", None) and not kinds:
        kinds = ["chunked_attention"]
    if kinds:
        raise ValueError(
            f"{name} has layers of kind {', '.join(kinds)}, which fa_pool cannot compute exactly. "
            "Load it without fa_pool"
        )
