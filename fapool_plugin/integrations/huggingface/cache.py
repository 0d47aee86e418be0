"""Hugging Face: the cache that generate() fills, kept so that pool ranks can hold prefixes of it, or own its keys.

Knows transformers' cache contract; does not know who computes attention.
"""

from __future__ import annotations

import copy
import secrets
import weakref
from collections.abc import Callable, Container
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionAndFullAttentionLayer

from fapool_plugin.base.forward import StaysHome
from fapool_plugin.base.record import Record
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.huggingface.layer import PartOfLayer, PooledHybridLayer, PooledLayer


class PooledCache(DynamicCache):
    """transformers' own dynamic cache, with pooled layers where attention is full. Sliding, linear and other layers
    stay what they are.

    Args:
        ownable: layers whose keys may have owners.
        record: the inputs of its forwards, if keys may be lost.
    """

    def __init__(
        self, config: Any, manager: ResourceManager, state: SequenceState, ownable: Container[int] = (),
        record: Record | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config)
        block = manager.config.kv_block
        self.state, self.record, self._manager = state, record, manager
        state.ownable = record is not None
        for index, layer in enumerate(self.layers):
            mine = index in ownable
            if type(layer) is DynamicLayer:
                self.layers[index] = PooledLayer(index, state, block, ownable=mine)
            elif type(layer) is LinearAttentionAndFullAttentionLayer:
                self.layers[index] = PooledHybridLayer(index, state, block, len(layer.conv_states), ownable=mine)
        self._ends: weakref.finalize[Any, Any] | None = None
        self.watch()

    @property
    def pooled_layers(self) -> list[PooledLayer]:
        """Those of full attention."""
        return [layer for layer in self.layers if isinstance(layer, PooledLayer)]

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions at once where nothing is stored yet."""
        for layer in self.pooled_layers:
            layer.reserve(positions)

    def come_home(self) -> None:
        """Has all keys fetched that are away. Raises KeysLost."""
        if self.state.owned is None:
            return
        for layer in self.pooled_layers:
            layer.come_home()
        self.start_anew()

    def settle(self) -> None:
        """A forward whose keys went to owners is complete. Raises StaysHome if not all of them were taken."""
        left = [layer.index for layer in self.pooled_layers if not layer.is_taken]
        if left:
            raise StaysHome(left[0])
        for layer in self.pooled_layers:
            layer.settle()

    @property
    def may_take_turns(self) -> bool:
        """Whether a step of some rows needs nothing of this cache but what their owners have."""
        return all(type(layer) is PooledLayer and layer.is_away for layer in self.layers)

    def part(self) -> PooledCache:
        """This cache for some rows, in a step that is taken in turns."""
        twin = copy.copy(self)
        twin.layers = [PartOfLayer(layer) for layer in self.pooled_layers]
        return twin

    def advance(self, columns: int) -> None:
        """All parts have taken a step of so many columns."""
        for layer in self.pooled_layers:
            layer.advance(columns)

    def keep_home(self, index: int) -> None:
        """A layer's keys live here from now on. Raises KeysLost."""
        for layer in self.pooled_layers:
            if layer.index == index:
                layer.ownable = False
                layer.come_home()

    def adopt(self, other: PooledCache) -> None:
        """Takes the keys of a cache that was filled with the same tokens, which ends; other states stay its own."""
        if other._ends is not None:
            other._ends.detach()
        if self._ends is not None:
            self._ends()
        self.state.id, self.state.owned = other.state.id, other.state.owned
        self.state.line, self.state.prompt = other.state.line, other.state.prompt
        self.state.residency, self._ends, other._ends = other.state.residency, None, None
        self.watch()
        for index, layer in enumerate(other.layers):
            if isinstance(layer, PooledLayer):
                self.layers[index].adopt(layer)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.record is not None:
            self.record.select(beam_idx)
        owned, rows = self.state.owned, beam_idx.tolist()
        if owned is not None and owned.owners.stay_together(rows):
            owned.select(rows)
        else:
            self._home_for("reorder_cache")
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._home_for("batch_repeat_interleave")
        if self.record is not None:
            self.record.repeat(repeats)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._home_for("batch_select_indices")
        if self.record is not None:
            self.record.select(indices)
        super().batch_select_indices(indices)

    def rewinder(self) -> Callable[[], None]:
        """What makes all layers forget what a forward from here on appends, should it be interrupted."""
        length = self.get_seq_length()
        # Windows put new tensors in the place of old ones and change none: their attributes are their state. States of
        # linear attention, in dicts by their numbers, are written to.
        others = [
            (layer, {name: _apart(value) for name, value in vars(layer).items() if not pooled or type(value) is dict})
            for layer in self.layers
            for pooled in [isinstance(layer, PooledLayer)]
        ]

        def rewind() -> None:
            for layer in self.pooled_layers:
                layer.rewind(length)
            for layer, before in others:
                vars(layer).update({name: _apart(value) for name, value in before.items()})
            if self.state.owned is not None and not any(self.state.owned.dealt.values()):
                self.start_anew()

        return rewind

    def __deepcopy__(self, memo: dict[int, Any]) -> PooledCache:
        twin = copy.copy(self)
        memo[id(self)] = twin
        memo[id(self._manager)] = self._manager
        # A copy goes its own way; pool ranks know nothing of it yet.
        twin.state = memo[id(self.state)] = SequenceState(self.state.prompt_columns, self.state.capacity)
        twin.record = self.record.copy() if self.record is not None else None
        twin.state.ownable, twin.state.edited = self.state.ownable, self.state.edited
        twin.layers = copy.deepcopy(self.layers, memo)
        twin.watch()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ends"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ends, self.state.ownable = None, self.record is not None

    def watch(self) -> None:
        """Its sequence ends with it."""
        if self._ends is None:
            self._ends = self._manager.watch(self, self.state)

    def _home_for(self, what: str) -> None:
        """Keys move between rows of different owners: by the base."""
        if self.state.owned is not None:
            self._manager.counters.log("home", f"keys were fetched from the pool for {what}")
            self.come_home()

    def start_anew(self) -> None:
        """What ranks hold of the sequence goes; it is another one for them from now on."""
        if self._ends is not None:
            self._ends()
        self.state.owned, self.state.id, self._ends = None, secrets.randbits(62), None
        self.state.residency.forget()
        self.watch()


def _apart(value: Any) -> Any:
    """A dict with copies of its tensors; anything else as it is."""
    if type(value) is not dict:
        return value
    return {key: state.clone() if isinstance(state, Tensor) else state for key, state in value.items()}
