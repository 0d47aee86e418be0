"""Megatron-core: its own GPT models with pooled attention, and parallel layers for models of Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fapool_plugin.integrations.megatron.model import FAPoolGPTModel, get_fapool_layer_spec

__all__ = ["FAPoolGPTModel", "get_fapool_layer_spec"]


def __getattr__(name: str) -> Any:
    # A process that needs parallel layers only does not load Megatron's models.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fapool_plugin.integrations.megatron import model

    return getattr(model, name)
