"""Hugging Face: masks and attention of one forward, as it was decided.

A mask function and an attention function, registered with transformers, find the forward they belong to in a context
variable. Knows transformers' contracts, not how a forward is decided, nor how work is shared out.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.forward import Forward
from fapool_plugin.integrations.huggingface_cache import PooledCache, PooledLayer
from fapool_plugin.resource_manager import ResourceManager

NAME = "fapool"
"""How the attention and the mask function are registered; transformers looks for "flash" in such names."""

_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "num_items_in_batch"}
"""Tensors that models hand to attention and that are accounted for; with any other a call is refused."""


@dataclass(frozen=True)
class Scope:
    """One forward of one model, or one block of it."""

    manager: ResourceManager
    decided: Forward
    cache: Cache | None
    local: str
    """The attention implementation of calls that are not pooled, by its name in transformers."""
    documents: tuple[int, ...] = ()
    """Lengths of the documents that are packed into the one row, if they are."""
    recomputed: bool = False
    """Layers run once more in backward (gradient checkpointing), when no forward is open."""


SCOPE: ContextVar[Scope | None] = ContextVar("fapool_scope", default=None)
"""transformers hands masks and attention only its own arguments: the forward they belong to travels beside them."""


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Mask function: the local implementation's own, except for full attention of a pooled forward, whose padding
    is known already. Raises ValueError for a pattern that is not plain causal."""
    scope = SCOPE.get()
    if scope is None or not scope.decided.pooled or kwargs.get("local_size") is not None:
        if scope is not None and scope.decided.hand_over is not None:
            kwargs |= _block_sizes(scope.decided, kwargs.get("local_size"))
        return ALL_MASK_ATTENTION_FUNCTIONS[scope.local if scope else "sdpa"](*args, **kwargs)
    causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if not scope.documents and (not causal or not kwargs.get("allow_is_causal_skip", True)):
        raise ValueError(
            "fa_pool cannot pool bidirectional or custom mask patterns, nor documents packed into rows of a batch or "
            "beside a mask: put each sequence in a padded row of its own, or raise threshold"
        )
    if scope.documents and causal and kwargs.get("allow_is_causal_skip", True):
        raise ValueError(
            "position_ids begin anew, but transformers' own masks of this model let documents that are packed into one "
            "row see each other: put each in a padded row of its own, or give position_ids that go on by one"
        )
    if not scope.recomputed:
        return None
    # Layers keep their arguments for the second time: the mask, empty as it is, says which forward it is of.
    ticket = torch.empty(0)
    ticket.fapool_scope = scope  # type: ignore[attr-defined]
    return ticket


def _block_sizes(decided: Forward, window: int | None) -> dict[str, int]:
    """Where a block's queries and keys lie. The cache cannot say: other blocks are at other layers."""
    assert decided.geometry is not None
    start, stop = decided.geometry.q_column, decided.geometry.columns
    kept = start if window is None else min(start, window - 1)
    return {"q_length": stop - start, "q_offset": start, "kv_length": kept + stop - start, "kv_offset": start - kept}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function: transformers' own for local calls and sliding-window layers, the pool for the others.

    query (B, H, S, D), key (B, K, T, D) and value (B, K, T, E) with the past; returns (B, S, H, E) and no weights.
    """
    scope, core = SCOPE.get(), getattr(module, "fa_pool", None)
    if (ticket := getattr(attention_mask, "fapool_scope", None)) is not None:
        scope, attention_mask = scope or ticket, None

    def local() -> Any:
        name = scope.local if scope else core.stands_for if core else "sdpa"
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(name, own)
        return function(module, query, key, value, attention_mask, **kwargs)

    if scope is None and core is not None and core.manager.in_pooled_forward:
        raise RuntimeError(
            f"{type(module).__name__} was called outside its model's forward while that is pooled, in another thread "
            "perhaps: the masks of a pooled forward do not hold there. Call the whole model, from one thread"
        )
    if scope is None or core is None:
        return local()
    slides = attention_mask is not None or kwargs.get("sliding_window") is not None
    if not scope.decided.pooled or slides:
        return core(query, key, value, decided=scope.decided, local=local)
    lengths = scope.documents
    if lengths:
        query, key, value = (_unpacked(x, lengths) for x in (query, key, value))
    _refuse_extras(module, query, key, scope.decided, kwargs)
    scaling, device = kwargs.get("scaling"), query.device.type
    if torch.is_autocast_enabled(device):
        # As transformers' sdpa attention is cast.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    out = core(
        query,
        key,
        value,
        decided=scope.decided,
        resident=_is_resident(scope.cache, module, key, value),
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks_H=kwargs.get("s_aux"),
    )
    if lengths:
        out = torch.cat([row[:length] for row, length in zip(out, lengths, strict=True)])[None]
    return out, None


def _unpacked(x_1HSD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """One row of documents as a padded batch, (documents, H, longest, D)."""
    documents = x_1HSD[0].transpose(0, 1).split(lengths)
    return pad_sequence(documents, batch_first=True).transpose(1, 2)


def _refuse_extras(module: nn.Module, query: Tensor, key: Tensor, decided: Forward, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    unknown = [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _KNOWN_TENSORS]
    if not causal:
        unknown.append("is_causal=False")
    if kwargs.get("dropout"):
        unknown.append("dropout")
    if unknown:
        raise ValueError(f"fa_pool cannot pool {name} with {', '.join(unknown)}: raise threshold to compute it locally")
    geometry = decided.geometry
    shape = (key.shape[0], key.shape[2], query.shape[2])
    if geometry is None or (len(geometry.starts), geometry.columns, geometry.columns - geometry.q_column) != shape:
        raise ValueError(
            f"{name} has {shape[2]} queries for {shape[0]} rows of {shape[1]} keys, its forward was decided for "
            f"{geometry}: raise threshold to compute it locally"
        )


def _is_resident(cache: Cache | None, module: nn.Module, key: Tensor, value: Tensor) -> bool:
    """Whether these are what our cache layer stores, or a pure function of it, position by position."""
    index = getattr(module, "layer_idx", None)
    if not isinstance(cache, PooledCache) or index is None or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    if not isinstance(layer, PooledLayer) or not layer.is_initialized:
        return False
    # Multi-head latent attention caches latents and expands them anew in every call.
    expands = hasattr(module, "expand_kv")
    return expands or all(
        given.data_ptr() == stored.data_ptr() and given.shape == stored.shape
        for given, stored in ((key, layer.keys), (value, layer.values))
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
