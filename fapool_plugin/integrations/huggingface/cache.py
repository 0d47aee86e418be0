"""Hugging Face: the cache that generate() fills, kept so that pool ranks can hold prefixes of it.

Knows transformers' cache contract; does not know who computes attention.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from fapool_plugin.base.graph_kv import GraphKV
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import GrowingKV, SequenceState


class PooledLayer(DynamicLayer):
    """A full-attention layer's keys and values, in storage that grows by blocks."""

    def __init__(self, index: int, state: SequenceState, block: int) -> None:
        super().__init__()
        self.keys: Any
        self.values: Any
        self.index, self.state = index, state
        self._kv = GrowingKV(block, state.capacity)
        self._sealed: tuple[object, ...] = ()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self._seal() != self._sealed:
            # Somebody put other keys here, or wrote into ours: those count now, and nobody holds them.
            self._kv = GrowingKV(self._kv.block, self._kv.capacity)
            self._kv.append(self.keys, self.values)
            self.state.residency.forget()
        self.keys, self.values = self._kv.append(key_states, value_states)
        self._sealed = self._seal()
        return self.keys, self.values

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions at once, if nothing is stored yet."""
        if not self.is_initialized:
            self._kv.capacity = max(self._kv.capacity, positions)

    def rewind(self, length: int) -> None:
        """Forgets what an interrupted forward has appended."""
        if self.is_initialized and self.get_seq_length() > length:
            self._kv.crop(length)
            self.keys, self.values = self._kv.views()
            self._sealed = self._seal()
            self.state.crop(self.index, length)

    def reset(self) -> None:
        super().reset()
        self._kv = GrowingKV(self._kv.block, self.state.capacity)
        self.state.crop(self.index, 0)

    def crop(self, tokens_to_remove: int) -> None:
        ours = self.is_initialized and self._seal() == self._sealed
        super().crop(tokens_to_remove)
        if ours:
            self._kv.crop(self.get_seq_length())
            self._sealed = self._seal()
        if self.is_initialized:
            self.state.crop(self.index, self.get_seq_length())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.get_seq_length() > 0:
            self._select(beam_idx)
            self.state.reorder(self.index, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length() > 0:
            self._select(torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats))
            self.state.rows_changed()

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length() > 0:
            self._select(torch.arange(self.keys.shape[0], device=self.keys.device)[indices])
            self.state.rows_changed()

    def _select(self, rows: Tensor) -> None:
        self._kv.select_rows(rows.to(self.keys.device))
        self.keys, self.values = self._kv.views()
        self._sealed = self._seal()

    def _seal(self) -> tuple[object, ...]:
        """What changes when somebody else assigns or writes keys or values. (Storage of ours counts its writes, in
        inference mode, too; another's that was made in inference mode does not, and is taken as changed.)"""
        both: tuple[torch.Tensor, ...] = (self.keys, self.values)
        return tuple((x.data_ptr(), x.shape, object() if x.is_inference() else x._version) for x in both)


class PooledHybridLayer(LinearAttentionAndFullAttentionLayer, PooledLayer):
    """A layer of both kinds of attention, whose full attention is a pooled layer's; as transformers' own of both."""

    def __init__(self, index: int, state: SequenceState, block: int, number_of_states: int) -> None:
        PooledLayer.__init__(self, index, state, block)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        (PooledLayer if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def offload(self) -> None:
        PooledLayer.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        PooledLayer.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        PooledLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        PooledLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        PooledLayer.crop(self, tokens_to_remove)


class PooledCache(DynamicCache):
    """transformers' own dynamic cache, with pooled layers where attention is full. Sliding, linear and other layers
    stay what they are."""

    def __init__(self, config: Any, manager: ResourceManager, state: SequenceState) -> None:
        super().__init__(config=config)
        block = manager.config.kv_block
        self.state, self._manager = state, manager
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[index] = PooledLayer(index, state, block)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                self.layers[index] = PooledHybridLayer(index, state, block, len(layer.conv_states))
        manager.watch(self, state)

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions at once where nothing is stored yet."""
        for layer in self.layers:
            if isinstance(layer, PooledLayer):
                layer.reserve(positions)

    def rewinder(self) -> Callable[[], None]:
        """What makes all layers forget what a forward from here on appends, should it be interrupted."""
        length = self.get_seq_length()
        # Other layers put new tensors in the place of old ones and change none: their attributes are their state.
        others = [(layer, dict(vars(layer))) for layer in self.layers if not isinstance(layer, PooledLayer)]

        def rewind() -> None:
            for layer in self.layers:
                if isinstance(layer, PooledLayer):
                    layer.rewind(length)
            for layer, before in others:
                vars(layer).update(before)

        return rewind

    def __deepcopy__(self, memo: dict[int, Any]) -> PooledCache:
        twin = copy.copy(self)
        memo[id(self)] = twin
        memo[id(self._manager)] = self._manager
        # A copy goes its own way; pool ranks know nothing of it yet.
        twin.state = memo[id(self.state)] = SequenceState(self.state.prompt_columns, self.state.capacity)
        twin.layers = copy.deepcopy(self.layers, memo)
        self._manager.watch(twin, twin.state)
        return twin


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
