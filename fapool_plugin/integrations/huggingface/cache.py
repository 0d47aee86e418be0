"""Hugging Face: the cache that generate() fills, kept so that pool ranks can hold prefixes of it, or own its keys.

Knows transformers' cache contract; does not know who computes attention.
"""

from __future__ import annotations

import copy
import secrets
import weakref
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from fapool_plugin.base.forward import StaysHome
from fapool_plugin.base.record import Record
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.integrations.huggingface.layer import PartOfLayer, PooledHybridLayer, PooledLayer
from fapool_plugin.plan.shares import Geometry


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
    def manager(self) -> ResourceManager:
        """Whose ranks hold what there is of it."""
        return self._manager

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
        # What its inputs do not tell: no layer that has keys was left out.
        self.state.edited = self.state.edited or any(layer.get_seq_length() for layer in self.uneven())

    def uneven(self) -> list[PooledLayer]:
        """Layers whose keys may have owners, and are not as many as the cache says: some were evicted by hand, or the
        layer was skipped."""
        columns = self.get_seq_length()
        return [layer for layer in self.pooled_layers if layer.ownable and layer.get_seq_length() != columns]

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

    def move_to(self, manager: ResourceManager) -> None:
        """Another model, or a copy of its model, goes on with it. Raises KeysLost."""
        self.come_home()
        self.start_anew(manager)

    def leave_blank(self, geometry: Geometry, *, left: bool) -> None:
        """A pooled forward of these columns is complete: attention was 0 where there is no token. With ``left`` the
        model's own is not, before a row's first token."""
        past, columns = geometry.q_column, geometry.columns
        old = self.state.blank_BT[:, :past] if self.state.blank_BT is not None else None
        starts, stops = (torch.tensor(x, device="cpu")[:, None] for x in (geometry.starts, geometry.stops))
        starts = starts if left else torch.zeros_like(starts)
        if int(starts.max()) > past or int(stops.min()) < columns:
            at = torch.arange(columns, device="cpu")[None]
            new = ((at < starts) | (at >= stops)) & (at >= past)
            if old is not None:
                new[:, : old.shape[1]] |= old
            old = new
        self.state.blank_BT = old

    def refuse_blank(self, mask: Any, past: int) -> None:
        """Raises ValueError for a mask that shows what was padding when its keys were made."""
        if self.state.blank_BT is None or not past:
            return
        shown = self.state.blank_BT[:, :past]
        if isinstance(mask, Tensor) and mask.ndim in (2, 4):
            # Of a mask of pairs: True, or next to 0, is what is seen.
            seen = mask != 0 if mask.dtype == torch.bool or mask.ndim == 2 else mask > -1
            seen = seen if mask.ndim == 2 else seen.flatten(1, 2).any(1)
            if len(seen) not in (1, len(shown)):
                return  # other rows are refused where keys are
            shown = shown & seen[:, : shown.shape[1]].to("cpu")
        if bool(shown.any()):
            row, column = shown.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask shows column {column} of row {row}, which was padding when its keys were made, and "
                "fa_pool attends to nothing there. Give the prompt's mask, with a column more for each new token"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows_change(lambda rows: rows[beam_idx.to(rows.device)])
        if self.record is not None:
            self.record.select(beam_idx)
        owned, rows = self.state.owned, beam_idx.tolist()
        if owned is not None and owned.owners.stay_together(rows):
            owned.select(rows)
        else:
            self._home_for("reorder_cache")
        with self._as_a_whole():
            super().reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        with self._as_a_whole():
            super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._home_for("batch_repeat_interleave")
        if self.record is not None:
            self.record.repeat(repeats)
        self._rows_change(lambda rows: rows.repeat_interleave(repeats, dim=0))
        with self._as_a_whole():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._home_for("batch_select_indices")
        if self.record is not None:
            self.record.select(indices)
        self._rows_change(lambda rows: rows[indices.to(rows.device)])
        with self._as_a_whole():
            super().batch_select_indices(indices)

    def _rows_change(self, chosen: Callable[[Tensor], Tensor]) -> None:
        if self.state.blank_BT is not None:
            self.state.blank_BT = chosen(self.state.blank_BT)

    @contextmanager
    def _as_a_whole(self) -> Iterator[None]:
        """Within it layers are changed by us, in a way that is recorded."""
        before, self.state.under_way = self.state.under_way, True
        try:
            yield
        finally:
            self.state.under_way = before

    def rewinder(self, *, recurrent: bool = True) -> Callable[[], None]:
        """What makes all layers forget what a forward from here on appends, should it be interrupted; unless
        ``recurrent`` states, of which it needs copies, nothing where a layer has any."""
        if not recurrent and any(isinstance(layer, LinearAttentionLayer) for layer in self.layers):
            return lambda: None
        lengths = [(layer, layer.get_seq_length()) for layer in self.pooled_layers]
        # Other layers put new tensors in the place of old ones and change none: their attributes are their state.
        others = [(layer, dict(vars(layer))) for layer in self.layers if not isinstance(layer, PooledLayer)]
        # But for states of linear attention, in dicts, of which a pooled layer may have some, too.
        states = [
            (value, dict(value), {key: x.clone() for key, x in value.items() if isinstance(x, Tensor)})
            for layer in self.layers
            if isinstance(layer, LinearAttentionLayer)
            for value in vars(layer).values()
            if isinstance(value, dict)
        ]

        def rewind() -> None:
            for layer, length in lengths:
                layer.rewind(length)
            for layer, before in others:
                vars(layer).update(before)
            for value, items, copies in states:
                value.clear()
                value.update(items)
                for key, x in copies.items():
                    items[key].copy_(x)
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
        twin.state.blank_BT = self.state.blank_BT
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

    def start_anew(self, manager: ResourceManager | None = None) -> None:
        """What ranks hold of the sequence goes; it is another one for them from now on, or for those of ``manager``."""
        if self._ends is not None:
            self._ends()
        self._manager = manager or self._manager
        self.state.owned, self.state.id, self._ends = None, secrets.randbits(62), None
        self.state.residency.forget()
        self.watch()
