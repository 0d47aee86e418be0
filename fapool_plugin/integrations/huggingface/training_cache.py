"""Hugging Face: the caches of a training step: they carry keys, and their gradients, from piece to piece.

Knows transformers' cache contract; nothing is kept for another step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from fapool_plugin.base.graph_kv import GraphKV


class GraphLayer(DynamicLayer):
    """A full-attention layer's keys and values, with gradients to every block of a training row."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.keys: Any
        self.values: Any
        self._kv = GraphKV(positions)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._kv.append(key_states, value_states)
        return self.keys, self.values


class GraphCache(DynamicCache):
    """Carries keys and values from block to block of one training row of ``positions``, and their gradients back."""

    def __init__(self, config: Any, positions: int) -> None:
        super().__init__(config=config)
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = GraphLayer(positions)

    def plain(self) -> DynamicCache:
        """The same keys and values as transformers' own cache, which grows without bound."""
        made = DynamicCache()
        made.layers, made.layer_class_to_replicate = [_plain(layer) for layer in self.layers], None
        return made


def _plain(layer: Any) -> Any:
    if not isinstance(layer, GraphLayer):
        return layer
    made = DynamicLayer()
    if layer.is_initialized:
        made.lazy_initialization(layer.keys, layer.values)
        made.keys, made.values = layer.keys, layer.values
    return made


class JoinedLayer(DynamicLayer):
    """A layer's keys and values of a batch whose rows are in several layers: joined if anybody asks, since a step of
    training does not."""

    def __init__(self, parts: list[DynamicLayer]) -> None:
        super().__init__()
        self.dtype, self.device, self.is_initialized = parts[0].dtype, parts[0].device, True
        del self.keys, self.values
        self._parts = parts

    def __getattr__(self, name: str) -> Any:
        if name not in ("keys", "values") or "_parts" not in vars(self):
            raise AttributeError(name)
        joined = torch.cat([getattr(part, name) for part in self._parts])
        setattr(self, name, joined)
        return joined
