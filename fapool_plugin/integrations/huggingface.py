"""Hugging Face: a real transformers model whose attention layers may borrow pool ranks.

One subclass of the loaded model's own class, one attention function, one mask function, one cache. Everything about
pooling itself is decided elsewhere.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fapool_plugin.attention import FAPoolAttention
from fapool_plugin.config import FAPoolConfig, check_machine
from fapool_plugin.integrations.huggingface_cache import PooledCache, PooledLayer
from fapool_plugin.kv_cache import SequenceState
from fapool_plugin.local_pool import LocalPool
from fapool_plugin.metrics import Phase
from fapool_plugin.plan import Geometry
from fapool_plugin.resource_manager import Forward, ResourceManager

NAME = "fapool"
"""How the attention and the mask function are registered; transformers looks for "flash" in such names."""

_REFUSED_LAYERS = {
    "chunked_attention",
    "indexed_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
}


@dataclass
class _Scope:
    """One forward of one model, from its outermost module's hook to its end."""

    manager: ResourceManager
    owner: nn.Module
    decided: Forward
    cache: Cache | None
    local: str
    token: Token[_Scope | None] | None = None


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
class _Hooks:
    """What a model's forwards pass through. Holds no model, so that models die as they would without it.

    Args:
        manager: decides.
        local: the attention implementation of calls that are not pooled, by its name in transformers.
    """

    manager: ResourceManager
    local: str

    def enter(
        self, owner: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: decides pooled or local for everything inside, and hands the model our cache."""
        outer = _SCOPE.get()
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or (outer is not None and outer.manager is self.manager):
            return None
        cache, mask, changed = kwargs.get("past_key_values"), kwargs.get("attention_mask"), None
        grads = torch.is_grad_enabled() and any(p.requires_grad for p in owner.parameters())
        use_cache = kwargs.get("use_cache")
        use_cache = getattr(owner.config, "use_cache", False) if use_cache is None else use_cache
        if cache is None and use_cache and len(args) < 2 and not grads and not owner.training:
            cache = PooledCache(owner.config.get_text_config(decoder=True), self.manager, SequenceState())
            changed = args, kwargs | {"past_key_values": cache}
        state = cache.state if isinstance(cache, PooledCache) else SequenceState()
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        batch, new = tokens.shape[:2]
        columns = past + new
        reason = None
        if grads or owner.training:
            reason = "training does not use the pool yet; for inference call model.eval() under torch.no_grad()"
        elif kwargs.get("output_attentions"):
            reason = "output_attentions: pool ranks return no attention weights"
        elif cache is not None and not isinstance(cache, PooledCache):
            reason = f"a cache of type {type(cache).__name__} is not pooled"
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
        scope = _Scope(self.manager, owner, decided, cache, self.local)
        scope.token = _SCOPE.set(scope)
        return changed

    def leave(self, owner: nn.Module, args: object, output: object) -> None:
        """Forward hook, called after errors too: ends what ``enter`` began."""
        scope = _SCOPE.get()
        if scope is not None and scope.owner is owner and scope.token is not None:
            _SCOPE.reset(scope.token)
            self.manager.end(scope.decided)


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

    if scope is None or core is None:
        return local()
    window = kwargs.get("sliding_window")
    slides = attention_mask is not None or (window is not None and window < key.shape[2])
    if not scope.decided.pooled or slides:
        return core(query, key, value, decided=scope.decided, local=local)
    _refuse_extras(module, query, key, scope.decided, kwargs)
    scaling = kwargs.get("scaling")
    out = core(
        query,
        key,
        value,
        decided=scope.decided,
        resident=_is_resident(scope.cache, module, key),
        softmax_scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks_H=kwargs.get("s_aux"),
    )
    return out, None


def _refuse_extras(module: nn.Module, query: Tensor, key: Tensor, decided: Forward, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    unknown = [k for k in ("position_bias", "indices", "cu_seq_lens_q", "cu_seq_lens_k") if kwargs.get(k) is not None]
    if not causal:
        unknown.append("is_causal=False")
    if kwargs.get("dropout"):
        unknown.append("dropout")
    if unknown:
        raise ValueError(f"fa_pool cannot pool {name} with {', '.join(unknown)}: raise threshold to compute it locally")
    geometry = decided.geometry
    if geometry is None or (len(geometry.starts), geometry.columns) != (key.shape[0], key.shape[2]):
        raise ValueError(
            f"{name} has {key.shape[0]} rows of {key.shape[2]} keys, the forward it belongs to was decided for "
            f"{geometry}: raise threshold to compute it locally"
        )


def _is_resident(cache: Cache | None, module: nn.Module, key: Tensor) -> bool:
    """Whether ``key`` is what our cache layer stores, or a pure function of it, position by position."""
    index = getattr(module, "layer_idx", None)
    if not isinstance(cache, PooledCache) or index is None or index >= len(cache.layers):
        return False
    layer = cache.layers[index]
    if not isinstance(layer, PooledLayer):
        return False
    # Multi-head latent attention caches latents and expands them anew in every call.
    expands = hasattr(module, "expand_kv")
    return expands or (layer.keys.data_ptr() == key.data_ptr() and layer.keys.shape == key.shape)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class FAPoolForCausalLM:
    """A causal language model that borrows attention ranks for long sequences.

    ``from_pretrained`` returns a real transformers model: an instance of the class that AutoModelForCausalLM would
    have chosen, and of this one. ``model.fa_pool`` is its :class:`ResourceManager`: ``stats()``, ``close()``.
    """

    fa_pool: ResourceManager
    _fapool_base: type[PreTrainedModel]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *args: Any,
        fa_pool: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
        **hf_kwargs: Any,
    ) -> Any:
        """Loads a model as ``AutoModelForCausalLM.from_pretrained(path, *args, **hf_kwargs)`` does, and pools it.

        Args:
            path: model folder or name.
            fa_pool: configuration (see :class:`FAPoolConfig`), or a JSON file's path. None: what the model was saved
                with, or the defaults.

        Raises:
            FAPoolConfigError: the configuration is not valid, or asks for more than this machine has.
            FileNotFoundError: ``path`` looks like a folder and there is none.
            ValueError: the model cannot be pooled exactly.
        """
        config = FAPoolConfig.load(fa_pool) if fa_pool is not None else None
        if config is not None:
            check_machine(config, psutil.virtual_memory().available)
        text = os.fspath(path)
        if not Path(text).exists() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
            raise FileNotFoundError(f"there is no model folder at {text}")
        return cls.wrap(AutoModelForCausalLM.from_pretrained(path, *args, **hf_kwargs), config)

    @staticmethod
    def wrap(model: Any, fa_pool: FAPoolConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> Any:
        """Pools a loaded model, in place: the same object, its weights untouched. Raises as ``from_pretrained``."""
        if isinstance(model, FAPoolForCausalLM):
            raise ValueError(f"{type(model).__name__} is pooled already")
        saved = getattr(model.config, "fapool", None)
        config = FAPoolConfig.load(saved if fa_pool is None else fa_pool)
        check_machine(config, psutil.virtual_memory().available)
        attentions = list(_attention_modules(model))
        refuse_model(model, attentions)
        manager = ResourceManager(config, LocalPool)
        local = model.config._attn_implementation
        hooks = _Hooks(manager, local)
        for module in attentions:
            module.fa_pool = FAPoolAttention(manager, module.layer_idx, len(attentions), stands_for=local)
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.register_forward_pre_hook(hooks.enter, with_kwargs=True)
                module.register_forward_hook(hooks.leave, always_call=True)
        kind: Any = type(model)
        model.__class__ = _subclass(kind)
        model.fa_pool = manager
        model.config.fapool = config.to_dict()
        model.set_attn_implementation(NAME)
        return model

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        mode: Any,
        batch_size: int,
        max_length: int,
    ) -> Any:
        plain = generation_config.use_cache is not False and generation_config.cache_implementation in (
            None,
            "dynamic",
        )
        if model_kwargs.get("past_key_values") is not None or not plain or not self.fa_pool.config.enabled:
            return super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, mode, batch_size, max_length
            )
        mask, embeds = model_kwargs.get("attention_mask"), model_kwargs.get("inputs_embeds")
        known = mask if isinstance(mask, Tensor) and mask.ndim == 2 else embeds
        new_tokens = generation_config.max_new_tokens
        prompt = (
            known.shape[1] if isinstance(known, Tensor) else max(0, max_length + 1 - new_tokens) if new_tokens else 0
        )
        state = SequenceState(prompt, max_length, max(1, generation_config.num_beams))
        config = self.config.get_text_config(decoder=True)  # type: ignore[attr-defined]
        cache = PooledCache(config, self.fa_pool, state)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
        return None

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: continuous batching would silently use another attention."""
        raise NotImplementedError(
            "generate_batch (continuous batching) has a paged cache and an attention of its own, which fa_pool does "
            "not pool: call generate(), or load the model without fa_pool"
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self._fapool_base,), self.__dict__


def _attention_modules(model: nn.Module) -> Iterator[Any]:
    """Every self-attention layer."""
    for module in model.modules():
        named = type(module).__name__.endswith("Attention") and getattr(module, "layer_idx", None) is not None
        if named and not getattr(module, "is_cross_attention", False):
            yield module


def refuse_model(model: Any, attentions: list[Any]) -> None:
    """Raises ValueError, before any weight is used, for a model that cannot be pooled exactly."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{name} is not a transformers model")
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; fa_pool pools causal decoders")
    if not model._can_set_attn_implementation() or not attentions:
        raise ValueError(
            f"{name} computes attention by itself, not through transformers' attention interface, so fa_pool cannot "
            "take it over. Load it without fa_pool"
        )
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) & _REFUSED_LAYERS)
    if getattr(config, "attention_chunk_size", None) and not kinds:
        kinds = ["chunked_attention"]
    if kinds:
        raise ValueError(
            f"{name} has layers of kind {', '.join(kinds)}, which fa_pool cannot compute exactly. "
            "Load it without fa_pool"
        )


@functools.cache
def _subclass(base: Any) -> Any:
    """A class that is both; under the base's own name, so that saving, pipelines and PEFT see what they know."""
    members = {"__module__": base.__module__, "__doc__": base.__doc__, "_fapool_base": base}
    return type(base.__name__, (FAPoolForCausalLM, base), members)


def _blank(base: Any) -> Any:
    """An empty instance for copies and pickles."""
    kind = _subclass(base)
    return object.__new__(kind)
