"""The prefixes of lanes' keys and values that a rank holds, under one limit of bytes.

Kernels read them where they lie. Pool ranks keep them of what they are sent; the base those that it owns itself. Knows
tensors and lanes, but no model, no link and no plan.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
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
        self._owned = set[int]()
        """Sequences of which there is no other copy: they go for no others."""

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
        *,
        owned: bool = False,
    ) -> bool:
        """Writes keys from position ``start`` on for a tile's lanes; what lay there is overwritten. ``owned``: there
        is no other copy; what lies behind them stays.

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
        if owned:
            # Blocks in flight may come once more, in any order; what is cut off is overwritten, and not asked for.
            prefixes.lengths[lanes] = np.maximum(prefixes.lengths[lanes], stop)
            self._owned.add(sequence)
        else:
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
        prefixes = found[0] if len(found) == 1 and found[0].box.covers(box) else None
        if prefixes is None:
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

    def select(self, sequence: int, layer: int, rows: Sequence[int]) -> None:
        """Row i of a layer becomes a copy of row ``rows[i]``, if both are here. For that they are brought into one box;
        if memory does not suffice, the sequence is forgotten."""
        by_row = self._sequences.get(sequence, {}).get(layer, {})
        boxes = list(dict.fromkeys(prefixes for mine in by_row.values() for prefixes in mine))
        moves = [(at, row) for at, row in enumerate(rows) if at != row and by_row.get(at) and by_row.get(row)]
        if any(one not in by_row[row] for at, row in moves for one in by_row[at]):
            first = boxes[0]
            around = first.box.around(one.box for one in boxes)
            together = self._room(sequence, layer, around, first.k, first.v, 0, 0)
            if together is None:
                self.free(sequence)
                return
            boxes = [together]
        for one in boxes:
            start, stop = one.box.row_start, min(one.box.row_stop, len(rows))
            inside = [(row if start <= row < stop else at) - start for at, row in enumerate(rows[start:stop], start)]
            if inside != list(range(stop - start)):
                index, used = torch.tensor(inside, device=one.k.device), slice(int(one.lengths.max()))
                try:
                    for x in (one.k, one.v):
                        x[: len(inside), :, used] = x[index, :, used]
                except torch.OutOfMemoryError:  # some may have moved
                    self.free(sequence)
                    return
                one.lengths[: len(inside)] = one.lengths[inside]

    def free(self, sequence: int) -> None:
        """Forgets one sequence."""
        self._owned.discard(sequence)
        for rows in self._sequences.pop(sequence, {}).values():
            self.nbytes -= sum(one.nbytes for one in dict.fromkeys(one for row in rows.values() for one in row))

    def clear(self) -> None:
        """Forgets everything."""
        self._sequences.clear()
        self._owned.clear()
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
            victim = next((s for s in self._sequences if s != sequence and s not in self._owned), None)
            if victim is None:
                return None
            self.free(victim)
            self.evictions += 1
        try:
            # Tensors made in inference mode can be written in no other.
            with torch.inference_mode(False), torch.no_grad():
                k_RHTD, v_RHTE = (torch.empty(*lanes, size, x.shape[3], dtype=x.dtype, device=x.device) for x in (k, v))
        except RuntimeError as error:  # less memory than the limit is there; of the CPU that has no class of its own
            if k.device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
                raise
            return None
        new = Prefixes(box, k_RHTD, v_RHTE, np.zeros(lanes, dtype=np.int64))
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
