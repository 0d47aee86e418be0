"""Hugging Face: the keys of one full-attention layer, here or away with their owners.

Knows transformers' contract for a cache's layer; not the forwards that fill it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from fapool_plugin.base.forward import StaysHome
from fapool_plugin.base.kept_calls import fingerprint
from fapool_plugin.base.sequence import GrowingKV, SequenceState


def owned_dtype(k_BKSD: Tensor, v_BKSE: Tensor) -> torch.dtype:
    """The dtype in which keys and values travel to their owners: as exact as either."""
    return torch.promote_types(k_BKSD.dtype, v_BKSE.dtype)


class PooledLayer(DynamicLayer):
    """A full-attention layer's keys and values, in storage that grows by blocks; or, while they are away with their
    owners, none: then a call is given the new ones only. To read all of them brings them home.

    What was read by hand is the reader's own from then on, as where caches are concatenated: the next write goes to
    storage of its own, and what the reader has changed counts.

    Args:
        ownable: whether its keys may have owners: what is stored is what its attention is given.
    """

    def __init__(self, index: int, state: SequenceState, block: int, *, ownable: bool = False) -> None:
        self._away = False
        """Whether its keys are with their owners."""
        self._columns = 0
        """How many columns it has, if so."""
        self._new: tuple[Tensor, Tensor] | None = None
        """Keys that were given away and have not been taken."""
        self._before: GrowingKV | None = None
        """What was here before a forward that gave it away, until that is complete."""
        self._shown = b""
        """A fingerprint of what was read by hand, since the last write."""
        self.state = state
        super().__init__()
        self.index, self.state, self.ownable = index, state, ownable
        self._kv = GrowingKV(block, state.capacity)
        self._sealed: tuple[object, ...] = ()

    @property
    def keys(self) -> Any:
        """(B, K, T, D); they come home, if they are away: they might be written to."""
        self._are_read()
        return self._keys

    @keys.setter
    def keys(self, value: Any) -> None:
        self._are_put()
        self._keys = value

    @property
    def values(self) -> Any:
        """(B, K, T, E), as :attr:`keys`."""
        self._are_read()
        return self._values

    @values.setter
    def values(self, value: Any) -> None:
        self._are_put()
        self._values = value

    @property
    def stored(self) -> tuple[Tensor, Tensor]:
        """Keys and values, to be looked at by us; they come home, if they are away."""
        if self._away:
            self._are_read()
        return self._keys, self._values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._is_changed()
        if self.ownable and self.state.owning:
            return self._give_away(key_states, value_states)
        if self._away:
            self.come_home()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self._keys is not None:
            self._take_over_edited()
        self._keys, self._values = self._kv.append(key_states, value_states, saved=self.state.recorded)
        self._sealed = self._seal()
        return self._keys, self._values

    def gives(self, k_BKSD: Tensor) -> bool:
        """Whether these keys were given away last."""
        new = self._new
        return new is not None and k_BKSD.data_ptr() == new[0].data_ptr() and k_BKSD.shape == new[0].shape

    def take(self, k_BKSD: Tensor, v_BKSE: Tensor) -> bool:
        """Whether these are what was given away last; they are their owners' from now on."""
        new = self._new
        if new is None or not self.gives(k_BKSD) or v_BKSE.data_ptr() != new[1].data_ptr():
            return False
        if not self._away:
            self._before, self._kv = self._kv, GrowingKV(self._kv.block)
            self._keys = self._values = None
        self._new, self._away = None, True
        return True

    def adopt(self, other: PooledLayer) -> None:
        """Takes the keys of a layer that was filled with the same tokens."""
        own = {"state": self.state, "ownable": self.ownable}
        self.__dict__.update(vars(other) | own)

    @property
    def is_taken(self) -> bool:
        """Whether all that was given away was taken."""
        return self._new is None

    @property
    def is_away(self) -> bool:
        """Whether its keys are with their owners."""
        return self._away

    def advance(self, columns: int) -> None:
        """So many columns have come to the owners of its keys, part by part."""
        self._columns += columns

    def settle(self) -> None:
        """A forward is complete."""
        self._before = None

    def come_home(self) -> None:
        """Has its keys fetched, if they are away. Raises KeysLost."""
        if self._away:
            keys = self._fetched()
            self._stay()
            self._put(*keys)

    def get_seq_length(self) -> int:
        if self._away or self._new is not None:
            return self._columns
        return int(self._keys.shape[2]) if self.is_initialized and self._keys is not None else 0

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions at once, if nothing is stored yet."""
        if not self.is_initialized and not (self.ownable and self.state.owning):
            self._kv.capacity = max(self._kv.capacity, positions)

    def rewind(self, length: int) -> None:
        """Forgets what an interrupted forward has appended."""
        self._new = None
        if self._before is not None:
            self._kv, self._before, self._away = self._before, None, False
            if self.state.owned is not None:
                self.state.owned.crop(self.index, 0)
            if self._kv.length:
                self._show_stored()
            else:
                self.is_initialized = False
        if self._away:
            self._crop_away(min(self._columns, length))
        elif self._keys is None:
            self.is_initialized = False
        elif self.is_initialized and max(self._kv.length, self.get_seq_length()) > length:
            self._kv.crop(length)
            self._show_stored()
            self.state.crop(self.index, length)

    def reset(self) -> None:
        self._stay()
        super().reset()
        self._kv = GrowingKV(self._kv.block, self.state.capacity)
        self.state.crop(self.index, 0)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            self.come_home()
            super().crop(tokens_to_remove)  # raises, but for an old transformers, to whom it is a length
            return
        columns = max(0, self.get_seq_length() + tokens_to_remove)
        if self._away:
            self._crop_away(columns)
        elif self.is_initialized:
            self._take_over_edited()
            self._kv.crop(columns)
            self._show_stored()
            self.state.crop(self.index, columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._is_changed()
        if self._away and not self.state.under_way:
            self.come_home()
        if not self._away and self.get_seq_length() > 0:
            self._select(beam_idx)
            self.state.reorder(self.index, beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows_change(lambda rows: rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows_change(lambda rows: rows[indices])

    def _rows_change(self, chosen: Callable[[Tensor], Tensor]) -> None:
        self._is_changed()
        self.come_home()
        if self.get_seq_length() > 0:
            self._select(chosen(torch.arange(self._keys.shape[0], device=self._keys.device)))
            self.state.rows_changed()

    def offload(self) -> None:
        if not self._away:
            super().offload()

    def prefetch(self) -> None:
        if not self._away:
            super().prefetch()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have their keys themselves."""
        state = dict(vars(self))
        if self._away:
            home = PooledLayer(self.index, self.state, self._kv.block)
            home._put(*self._fetched())
            state |= {name: vars(home)[name] for name in ("_away", "_columns", "_kv", "_keys", "_values", "_sealed")}
        edited = not self._away and self._keys is not None and self._is_edited()
        return state | {"_new": None, "_before": None, "_shown": b"", "_edited": edited}

    def __setstate__(self, state: dict[str, Any]) -> None:
        edited = state.pop("_edited")
        self.__dict__.update(state | ({"_sealed": ()} if edited else {}))
        if self._keys is not None and not edited:
            self._put(self._keys, self._values)  # storage and seal of its own

    def _give_away(self, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer's attention is to hand to the keys' owners: all that have none."""
        if self._new is not None:
            raise StaysHome(self.index)
        if not self.is_initialized:
            self.lazy_initialization(k_BKSD, v_BKSE)
        owned = self.state.owned
        if self._away and owned is not None and owned.kinds[self.index][0] != owned_dtype(k_BKSD, v_BKSE):
            self.come_home()  # the wider dtype counts, as where caches are concatenated
        columns = self.get_seq_length() + k_BKSD.shape[2]
        if not self._away and columns > k_BKSD.shape[2]:
            self._take_over_edited()
            k_BKSD, v_BKSE = self._kv.append(k_BKSD, v_BKSE)
        self._new, self._columns = (k_BKSD, v_BKSE), columns
        return self._new

    def _take_over_edited(self) -> None:
        """If other keys were put here, or ours written to, those count now, and are held nowhere."""
        edited = self._is_edited()
        if edited or self._shown:
            self._kv = GrowingKV(self._kv.block, self._kv.capacity)
            self._keys, self._values = self._kv.append(self._keys, self._values)
            self._sealed, self._shown = self._seal(), b""
        if edited:
            self.state.residency.forget()
            self.state.edited, self.state.copies = True, 1

    def _is_edited(self) -> bool:
        return self._seal() != self._sealed or self._shown not in (b"", self._bits())

    def _is_changed(self) -> None:
        """Something is about to be written; by hand, no record of forwards knows of it."""
        self.state.edited = self.state.edited or not self.state.under_way

    def _bits(self) -> bytes:
        return fingerprint(self._keys, self._values) if self._keys.numel() else b"none"

    def _are_read(self) -> None:
        if self._away and self.state.owning:
            raise StaysHome(self.index)  # a model that reads them once does so in every forward
        if self._away:
            warnings.warn(
                "fa_pool: keys that live on the pool (kv_home) are read as a tensor: they are fetched, and go back "
                "with the next forward",
                RuntimeWarning, stacklevel=3,
            )  # fmt: skip
            self.come_home()
        if not (self._shown or self.state.under_way) and self._keys is not None and self._values is not None:
            self._shown = self._bits()

    def _fetched(self) -> tuple[Tensor, Tensor]:
        owned = self.state.owned
        assert owned is not None
        return owned.fetch(self.index)

    def _put(self, k_BKTD: Tensor, v_BKTE: Tensor) -> None:
        self._kv = GrowingKV(self._kv.block, self.state.capacity)
        self._keys, self._values = self._kv.append(k_BKTD, v_BKTE)
        self._sealed = self._seal()

    def _are_put(self) -> None:
        self._stay()
        if not self.state.under_way:
            self.state.blank_BT = None

    def _stay(self) -> None:
        """What is put here counts, and what was away does no more."""
        if self._away:
            self._away, self._columns = False, 0
            if self.state.owned is not None:
                self.state.owned.crop(self.index, 0)

    def _crop_away(self, columns: int) -> None:
        self._columns = columns
        self.state.crop(self.index, columns)
        if self.state.owned is not None:
            self.state.owned.crop(self.index, columns)

    def _select(self, rows: Tensor) -> None:
        self._take_over_edited()
        self._kv.select_rows(rows.to(self._keys.device))
        self._show_stored()

    def _show_stored(self) -> None:
        self._keys, self._values = self._kv.views()
        self._sealed = self._seal()

    def _seal(self) -> tuple[object, ...]:
        """What changes when keys or values are assigned or written by hand. (Storage of ours counts its writes, in
        inference mode, too; another's that was made in inference mode does not, and is taken as changed.)"""
        both: tuple[torch.Tensor, ...] = (self._keys, self._values)
        return tuple((x.data_ptr(), x.shape, object() if x.is_inference() else x._version) for x in both)


class PartOfLayer(PooledLayer):
    """Some rows of a layer whose keys are away, in a step that is taken in turns with others: what comes is theirs."""

    def __init__(self, whole: PooledLayer) -> None:
        super().__init__(whole.index, whole.state, 1, ownable=True)
        self.dtype, self.device, self.is_initialized = whole.dtype, whole.device, True
        self._away, self._columns = True, whole.get_seq_length()


class PooledHybridLayer(LinearAttentionAndFullAttentionLayer, PooledLayer):
    """A layer of both kinds of attention, whose full attention is a pooled layer's; as transformers' own of both."""

    def __init__(
        self, index: int, state: SequenceState, block: int, number_of_states: int, *, ownable: bool = False
    ) -> None:
        PooledLayer.__init__(self, index, state, block, ownable=ownable)
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
