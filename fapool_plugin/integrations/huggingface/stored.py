"""Hugging Face: what a call's keys are to our cache: what it stores, what is made of that, or what goes to owners.

Knows layers of caches; neither masks nor who computes.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache

from fapool_plugin.base.forward import CannotPool, Forward, StaysHome
from fapool_plugin.base.unrecorded import made_by
from fapool_plugin.integrations.huggingface.cache import PooledCache
from fapool_plugin.integrations.huggingface.layer import PooledLayer


def is_resident(cache: Cache | None, decided: Forward, module: nn.Module, key: Tensor, value: Tensor) -> bool:
    """Whether these are what our cache layer stores, or a known function of it, position by position."""
    layer = _layer_of(cache, module)
    if layer is None or not layer.is_initialized:
        return False
    if hasattr(module, "expand_kv"):
        # Multi-head latent attention caches latents and expands them anew in every call.
        geometry, expanded_by = decided.geometry, _expanded_by(module)
        layer.state.make_by(layer.index, expanded_by)
        if expanded_by is None:
            reason = (
                f"{type(module).__name__} expands keys by what may change unseen (hooks, training): ranks keep none"
            )
            decided.note(reason, geometry is not None and geometry.q_column > 0)
        return expanded_by is not None
    return all(
        given.data_ptr() == stored.data_ptr() and given.shape == stored.shape
        for given, stored in zip((key, value), layer.stored, strict=True)
    )


def _expanded_by(module: nn.Module) -> Any:
    """What is another value once a layer expands its latents otherwise; None: that is not known."""
    if "expand_kv" in vars(module):
        return None
    kind: Any = type(module)
    function = kind.expand_kv
    code = getattr(inspect.unwrap(function), "__code__", None)
    named = [module._modules[name] for name in getattr(code, "co_names", ()) if name in module._modules]
    found = made_by([inside for inside in named if inside is not None] or [module])
    return None if found is None else (function, found)


def _layer_of(cache: Cache | None, module: nn.Module) -> PooledLayer | None:
    index = getattr(module, "layer_idx", None)
    if not isinstance(cache, PooledCache) or index is None or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    return layer if isinstance(layer, PooledLayer) else None


def is_given_away(cache: Cache | None, module: nn.Module, key: Tensor) -> bool:
    """Whether these are keys that go to owners, perhaps without those that are there."""
    layer = _layer_of(cache, module)
    return layer is not None and layer.gives(key)


def refuse_partial(cache: Cache | None, decided: Forward, module: nn.Module, key: Tensor, reason: str) -> None:
    """Of a call that needs all keys here, and was given new ones: raises StaysHome, or CannotPool if they are another
    layer's."""
    geometry, index = decided.geometry, getattr(module, "layer_idx", None)
    if geometry is None or index is None or not isinstance(cache, PooledCache):
        return
    if is_given_away(cache, module, key):
        raise StaysHome(index)
    windowed = index < len(cache.layers) and getattr(cache.layers[index], "is_sliding", False)
    layer = _layer_of(cache, module)
    if layer is not None and not layer.ownable and layer.get_seq_length() == key.shape[2]:
        return  # all that there are: some were evicted by hand, or the layer was skipped
    if key.shape[2] != geometry.columns and not windowed:
        raise CannotPool(reason)


def is_taken(cache: Cache | None, module: nn.Module, key: Tensor, value: Tensor) -> bool:
    """Whether these go to owners now. Raises StaysHome if others of their layer should."""
    layer = _layer_of(cache, module)
    if layer is None or not layer.ownable:
        return False
    if not layer.take(key, value):
        raise StaysHome(layer.index)
    return True
