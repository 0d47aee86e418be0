"""What a pool rank keeps: prefixes of lanes' keys and values, and whole training calls, under one limit of bytes.

Knows tensors and lanes, but no model, no link and no plan.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fapool_plugin.plan.box import Box
from fapool_plugin.plan.line import Tile, round_up


@dataclass(frozen=True, eq=False)
class Prefixes:
    """Resident keys of a box of lanes: ``k`` (rows, heads, capacity, D), ``v`` (rows, heads, capacity, E), and how many
    positions of each lane there are, ``lengths`` (rows, heads)."""

    box: Box
    k: Tensor
    v: Tensor
    lengths: np.ndarray[Any, Any]

    @property
    def nbytes(self) -> int:
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()


_Rows = dict[int, list[Prefixes]]


class PrefixStore:
    """The prefixes a pool rank holds, by sequence; when memory runs short the least recently used sequence goes.

    Lanes that were sent together lie together in one box. One that is sent or used together with lanes of several
    boxes brings these into one, so what a rank holds lies as its share is cut. All lanes of a box have the same room,
    which grows with the first that needs more.

    Args:
        limit_bytes: what all storage together may take.
        block: positions by which storage grows.
    """

    def __init__(self, limit_bytes: int, block: int = 256) -> None:
        self.limit_bytes, self.block, self.nbytes, self.evictions = limit_bytes, block, 0, 0
        self.reserved = 0
        """Bytes of the limit that something else than prefixes takes."""
        self._sequences: OrderedDict[int, dict[int, _Rows]] = OrderedDict()
        """By sequence, layer and row; a box stands with each of its rows."""

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def put(
        self,
        sequence: int,
        layer: int,
        tile: Tile,
        k_RHTD: Tensor,
        v_RHTE: Tensor,
        start: int,
        capacity: int = 0,
    ) -> bool:
        """Writes keys from position ``start`` on for a tile's lanes; what lay there is overwritten.

        Returns False, and keeps nothing new, if the prefix before ``start`` is not here or memory does not suffice.
        """
        box, stop = tile.box, start + k_RHTD.shape[2]
        for old in self._meeting(sequence, layer, box):
            if (old.k.dtype, old.v.dtype) != (k_RHTD.dtype, v_RHTE.dtype):
                # Never converted in silence: what is here was sent for another kind of call.
                self._drop(sequence, layer, old)
        if start and self.length(sequence, layer, tile) < start:
            return False
        prefixes = self._room(sequence, layer, box, k_RHTD, v_RHTE, stop, capacity)
        if prefixes is None:
            return False
        lanes = box.inside(prefixes.box)
        prefixes.k[(*lanes, slice(start, stop))] = k_RHTD
        prefixes.v[(*lanes, slice(start, stop))] = v_RHTE
        prefixes.lengths[lanes] = stop
        return True

    def length(self, sequence: int, layer: int, tile: Tile) -> int:
        """The prefix that all lanes of a tile have here; 0 if any is missing. Marks the sequence as used, and brings
        the lanes into one box, for which other sequences may have to go; 0 if memory does not suffice for that."""
        if sequence not in self._sequences:
            return 0
        self._sequences.move_to_end(sequence)
        box = tile.box
        found = self._meeting(sequence, layer, box)
        if sum(box.common(one.box).lanes for one in found) < box.lanes:
            return 0
        prefixes = self._room(sequence, layer, box, found[0].k, found[0].v, 0, 0)
        return int(prefixes.lengths[box.inside(prefixes.box)].min()) if prefixes is not None else 0

    def get(self, sequence: int, layer: int, tile: Tile) -> tuple[Tensor, Tensor]:
        """Views (rows, heads, keys, D) and (rows, heads, keys, E) of a tile's keys; :meth:`length` says if they are
        here, and brings them together."""
        box = tile.box
        (prefixes,) = self._meeting(sequence, layer, box)
        at = *box.inside(prefixes.box), slice(tile.k_start, tile.k_stop)
        return prefixes.k[at], prefixes.v[at]

    def free(self, sequence: int) -> None:
        """Forgets one sequence."""
        for rows in self._sequences.pop(sequence, {}).values():
            self.nbytes -= sum(one.nbytes for one in dict.fromkeys(one for row in rows.values() for one in row))

    def clear(self) -> None:
        """Forgets everything."""
        self._sequences.clear()
        self.nbytes = 0

    def _meeting(self, sequence: int, layer: int, box: Box) -> list[Prefixes]:
        rows = self._sequences.get(sequence, {}).get(layer, {})
        for one in rows.get(box.row_start, ()):
            if one.box.covers(box):
                return [one]  # boxes share no lane
        near = (one for row in range(box.row_start, box.row_stop) for one in rows.get(row, ()))
        return [one for one in dict.fromkeys(near) if one.box.common(box).lanes]

    def _drop(self, sequence: int, layer: int, prefixes: Prefixes) -> None:
        self.nbytes -= prefixes.nbytes
        for row in range(*prefixes.box[:2]):
            self._sequences[sequence][layer][row].remove(prefixes)

    def _room(
        self, sequence: int, layer: int, box: Box, k: Tensor, v: Tensor, stop: int, capacity: int
    ) -> Prefixes | None:
        """Storage that covers a box and positions up to ``stop``, for keys and values like these, with what was there
        before; None if too large."""
        olds = self._meeting(sequence, layer, box)
        if len(olds) == 1 and olds[0].box.covers(box) and stop <= olds[0].k.shape[2]:
            return olds[0]
        # What meets the larger box goes into it, too.
        while (larger := box.around(old.box for old in olds)) != box:
            box, olds = larger, self._meeting(sequence, layer, larger)
        for old in [one for one in olds if (one.k.dtype, one.v.dtype) != (k.dtype, v.dtype)]:
            self._drop(sequence, layer, old)
            olds.remove(old)
        size = max((old.k.shape[2] for old in olds), default=0)
        size = max(size, capacity if capacity >= stop else round_up(stop, self.block))
        lanes = box.row_stop - box.row_start, box.head_stop - box.head_start
        wanted = lanes[0] * lanes[1] * size * (k.shape[3] * k.element_size() + v.shape[3] * v.element_size())
        freed, limit = sum(old.nbytes for old in olds), self.limit_bytes - self.reserved
        if wanted > limit:
            return None
        while self.nbytes - freed + wanted > limit:
            victim = next((s for s in self._sequences if s != sequence), None)
            if victim is None:
                return None
            self.free(victim)
            self.evictions += 1
        new = Prefixes(
            box,
            k.new_empty(*lanes, size, k.shape[3]),
            v.new_empty(*lanes, size, v.shape[3]),
            np.zeros(lanes, dtype=np.int64),
        )
        for old in olds:
            at, used = old.box.inside(box), slice(int(old.lengths.max()))
            new.k[(*at, used)], new.v[(*at, used)], new.lengths[at] = old.k[:, :, used], old.v[:, :, used], old.lengths
            self._drop(sequence, layer, old)
        rows = self._sequences.setdefault(sequence, {}).setdefault(layer, {})
        for row in range(*box[:2]):
            rows.setdefault(row, []).append(new)
        self._sequences.move_to_end(sequence)
        self.nbytes += wanted
        return new


class KeptTile(NamedTuple):
    """What a tile's gradients are made of beside dout, as kernels take it: (rows, S, H, D) and so on."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


class CallStore:
    """The training calls a pool rank keeps whole, by sequence and number, until their gradients are asked for.

    Nothing is copied, so nobody may write to what is kept. Where there is no room left nothing makes way.

    Args:
        prefixes: with which they share one limit.
    """

    def __init__(self, prefixes: PrefixStore) -> None:
        self.prefixes = prefixes
        self._sequences: dict[int, dict[int, tuple[list[KeptTile], int]]] = {}

    def put(self, sequence: int, call: int, tiles: list[KeptTile]) -> bool:
        """Keeps one call, if memory suffices; whether it did."""
        # What is kept is all of a message, table and padding included.
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for tile in tiles for x in tile}
        size, held = sum(storages.values()), self.prefixes.nbytes + self.prefixes.reserved
        if held + size > self.prefixes.limit_bytes:
            return False
        self._sequences.setdefault(sequence, {})[call] = tiles, size
        self.prefixes.reserved += size
        return True

    def get(self, sequence: int, call: int) -> list[KeptTile] | None:
        """A kept call; None if it is not here."""
        return self._sequences.get(sequence, {}).get(call, (None, 0))[0]

    def pop(self, sequence: int, call: int) -> list[KeptTile] | None:
        """A kept call, for the last time; None if it is not here."""
        tiles, size = self._sequences.get(sequence, {}).pop(call, (None, 0))
        self.prefixes.reserved -= size
        return tiles

    def free(self, sequence: int) -> None:
        """Forgets one sequence."""
        for call in list(self._sequences.get(sequence, {})):
            self.pop(sequence, call)
        self._sequences.pop(sequence, None)

    def clear(self) -> None:
        """Forgets everything."""
        for sequence in list(self._sequences):
            self.free(sequence)
