"""Hugging Face: what happens inside one forward of a pooled model.

Hooks decide pooled or local before any mask is built; a mask function and an attention function, registered with
transformers, follow that decision. Knows transformers' contracts, not how work is shared out.
"""

from __future__ import annotations

import inspect
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.integrations.huggingface_cache import PooledCache, PooledLayer
from fapool_plugin.kv_cache import SequenceState
from fapool_plugin.metrics import Phase
from fapool_plugin.plan import Geometry
from fapool_plugin.resource_manager import Forward, ResourceManager

NAME = "fapool"
"""How the attention and the mask function are registered; transformers looks for "flash" in such names."""


_KNOWN_TENSORS = {"s_aux", "position_ids", "cache_position"}
"""Tensors that models hand to attention and that are accounted for; with any other a call is refused."""


@dataclass
class _Scope:
    """One forward of one model, from its outermost module's hook to its end."""

    manager: ResourceManager
    owner: Any
    decided: Forward
    cache: Cache | None
    local: str
    outside: _Scope | None
    """The scope around this one: another model's."""


_SCOPE: ContextVar[_Scope | None] = ContextVar("fapool_scope", default=None)
"""transformers hands masks and attention only its own arguments: the forward they belong to travels beside them."""


def _padding(mask: Tensor | None, batch: int, past: int, columns: int) -> Geometry:
    """Where the real tokens lie. Raises ValueError for masks that are more than padding on either side."""
    if mask is None:
        return Geometry((0,) * batch, (columns,) * batch, past, columns)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        kind = f"{mask.ndim}-dimensional" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"fa_pool cannot pool a call with a custom attention mask ({kind}): pass the 2-D padding mask, or raise "
            f"threshold above {columns} to compute it without the pool"
        )
    if mask.shape[1] < columns:
        raise ValueError(f"attention_mask has {mask.shape[1]} columns, the sequences have {columns} with their past")
    real = mask[:, :columns] != 0
    counts = real.sum(1)
    starts = torch.where(counts > 0, real.int().argmax(1), columns)
    stops = torch.where(counts > 0, columns - real.flip(1).int().argmax(1), columns)
    holes = ((stops - starts) != counts).nonzero()
    if holes.numel():
        row = int(holes[0])
        raise ValueError(
            f"attention_mask has a hole: row {row} has {int(counts[row])} tokens between columns {int(starts[row])} "
            f"and {int(stops[row])}. Pad on one side only, or raise threshold above {columns}"
        )
    return Geometry(tuple(starts.tolist()), tuple(stops.tolist()), past, columns)


@dataclass
class Hooks:
    """What a model's forwards pass through. Holds no model, so that models die as they would without it.

    Args:
        manager: decides.
        local: the attention implementation of calls that are not pooled, by its name in transformers.
        full_layers: how many layers attend to everything before them; only those are pooled.
        makes_cache: whether the model takes a cache of ours, rather than one of its own kind.
    """

    manager: ResourceManager
    local: str
    full_layers: int
    makes_cache: bool

    def enter(
        self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: decides pooled or local for everything inside, and hands the model our cache."""
        outer = _SCOPE.get()
        if outer is not None and outer.manager is self.manager:
            if owner.fapool_depth > outer.owner.fapool_depth:
                return None
            # Nothing calls the outermost module again from inside: that forward was interrupted and never ended.
            leave(outer.owner)
            outer = _SCOPE.get()
        given = _by_name(owner, args, kwargs)
        tokens = given.get("input_ids")
        tokens = given.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            return None
        cache, mask, changed = given.get("past_key_values"), given.get("attention_mask"), None
        grads = torch.is_grad_enabled() and (tokens.requires_grad or any(p.requires_grad for p in owner.parameters()))
        use_cache = _asked(owner, given, "use_cache")
        if cache is None and use_cache and self.makes_cache and not grads and not owner.training:
            cache = PooledCache(owner.config.get_text_config(decoder=True), self.manager, SequenceState())
            changed = (), given | {"past_key_values": cache}
        state = cache.state if isinstance(cache, PooledCache) else SequenceState()
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        batch, new = tokens.shape[:2]
        columns = past + new
        reason = None
        if grads or owner.training:
            reason = "training does not use the pool yet; for inference call model.eval() under torch.no_grad()"
        elif torch.is_autocast_enabled(tokens.device.type):
            reason = "autocast: q, k and v have dtypes of their own"
        elif _asked(owner, given, "output_attentions"):
            reason = "output_attentions: pool ranks return no attention weights"
        elif cache is not None and not isinstance(cache, PooledCache):
            reason = f"a cache of type {type(cache).__name__} is not pooled"
        elif not self.full_layers:
            reason = "no layer has full attention"
        in_prompt = columns <= state.prompt_columns
        phase: Phase = "prefill" if past == 0 or in_prompt or new > self.manager.config.kv_block else "decode"
        decided = self.manager.begin(
            phase,
            state.prompt_columns if in_prompt else columns,
            lambda: _padding(mask, batch, past, columns),
            state,
            must_be_local=reason,
            lasting=cache is not None,
        )
        _SCOPE.set(_Scope(self.manager, owner, decided, cache, self.local, outer))
        return changed


def leave(owner: nn.Module, *hook_arguments: object) -> None:
    """Ends what ``enter`` began for ``owner``, if it did. A forward hook, called after errors too; torch does not
    call it after an interrupt, so who may be interrupted calls it himself."""
    scope = _SCOPE.get()
    if scope is not None and scope.owner is owner:
        _SCOPE.set(scope.outside)
        scope.manager.end(scope.decided)


def _by_name(owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All of a forward's arguments under their names."""
    if not args:
        return kwargs
    return dict(zip(inspect.signature(owner.forward).parameters, args, strict=False)) | kwargs


def _asked(owner: PreTrainedModel, given: dict[str, Any], name: str) -> bool:
    """A switch as this call or, if it says nothing, the model's configuration has it."""
    value = given.get(name)
    return bool(getattr(owner.config, name, False) if value is None else value)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """Mask function: the local implementation's own, except for full attention of a pooled forward, whose padding
    is known already. Raises ValueError for a pattern that is not plain causal."""
    scope = _SCOPE.get()
    if scope is None or not scope.decided.pooled or kwargs.get("local_size") is not None:
        return ALL_MASK_ATTENTION_FUNCTIONS[scope.local if scope else "sdpa"](*args, **kwargs)
    causal = kwargs.get("mask_function", causal_mask_function) is causal_mask_function
    if not causal or not kwargs.get("allow_is_causal_skip", True):
        raise ValueError(
            "fa_pool cannot pool packed sequences, bidirectional or custom mask patterns: "
            "put each sequence in a padded row of its own, or raise threshold"
        )
    return None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function: transformers' own for local calls and sliding-window layers, the pool for the others.

    query (B, H, S, D), key (B, K, T, D) and value (B, K, T, E) with the past; returns (B, S, H, E) and no weights.
    """
    scope, core = _SCOPE.get(), getattr(module, "fa_pool", None)

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
    _refuse_extras(module, query, key, scope.decided, kwargs)
    scaling = kwargs.get("scaling")
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
    return out, None


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
    if not isinstance(layer, PooledLayer):
        return False
    # Multi-head latent attention caches latents and expands them anew in every call.
    expands = hasattr(module, "expand_kv")
    return expands or all(
        given.data_ptr() == stored.data_ptr() and given.shape == stored.shape
        for given, stored in ((key, layer.keys), (value, layer.values))
    )


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
