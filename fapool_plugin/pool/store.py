"""What a pool rank keeps: prefixes of lanes' keys and values, and whole training calls, under one limit of bytes.

Knows tensors and lanes, but no model, no link and no plan.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

from torch import Tensor

from fapool_plugin.plan.line import round_up


class Prefix(NamedTuple):
    """A run of lanes' resident keys: ``k`` (heads, capacity, D), ``v`` (heads, capacity, E), a length per head."""

    head_start: int
    k: Tensor
    v: Tensor
    lengths: list[int]

    @property
    def nbytes(self) -> int:
        return self.k.numel() * self.k.element_size() + self.v.numel() * self.v.element_size()


class PrefixStore:
    """The prefixes a pool rank holds, by sequence; when memory runs short the least recently used sequence goes.

    Args:
        limit_bytes: what all storage together may take.
        block: positions by which storage grows.
    """

    def __init__(self, limit_bytes: int, block: int = 256) -> None:
        self.limit_bytes, self.block, self.nbytes, self.evictions = limit_bytes, block, 0, 0
        self.reserved = 0
        """Bytes of the limit that something else than prefixes takes."""
        self._sequences: OrderedDict[int, dict[tuple[int, int], Prefix]] = OrderedDict()

    def __contains__(self, sequence: int) -> bool:
        return sequence in self._sequences

    def put(
        self,
        sequence: int,
        layer: int,
        row: int,
        head_start: int,
        k_HTD: Tensor,
        v_HTE: Tensor,
        start: int,
        capacity: int = 0,
    ) -> bool:
        """Writes keys from position ``start`` on for heads from ``head_start``; what lay there is overwritten.

        Returns False, and keeps nothing new, if the prefix before ``start`` is not here or memory does not suffice.
        """
        heads, count_new, _ = k_HTD.shape
        old = self._sequences.get(sequence, {}).get((layer, row))
        if old is not None and (old.k.dtype, old.v.dtype) != (k_HTD.dtype, v_HTE.dtype):
            # Never converted in silence: what is here was sent for another kind of call.
            self.nbytes -= old.nbytes
            del self._sequences[sequence][(layer, row)]
        if start and self.length(sequence, layer, row, head_start, head_start + heads) < start:
            return False
        prefix = self._room(sequence, layer, row, head_start, k_HTD, v_HTE, start + count_new, capacity)
        if prefix is None:
            return False
        at = head_start - prefix.head_start
        prefix.k[at : at + heads, start : start + count_new] = k_HTD
        prefix.v[at : at + heads, start : start + count_new] = v_HTE
        prefix.lengths[at : at + heads] = [start + count_new] * heads
        return True

    def length(self, sequence: int, layer: int, row: int, head_start: int, head_stop: int) -> int:
        """The prefix that all these lanes have here; 0 if any is missing. Marks the sequence as used."""
        rows = self._sequences.get(sequence)
        prefix = rows.get((layer, row)) if rows is not None else None
        if prefix is None:
            return 0
        self._sequences.move_to_end(sequence)
        at, stop = head_start - prefix.head_start, head_stop - prefix.head_start
        return min(prefix.lengths[at:stop]) if 0 <= at < stop <= len(prefix.lengths) else 0

    def get(self, sequence: int, layer: int, row: int, heads: slice, keys: slice) -> tuple[Tensor, Tensor]:
        """Views (heads, keys, D) and (heads, keys, E) of a resident range; see :meth:`length` for what is here."""
        prefix = self._sequences[sequence][(layer, row)]
        lanes = slice(heads.start - prefix.head_start, heads.stop - prefix.head_start)
        return prefix.k[lanes, keys], prefix.v[lanes, keys]

    def free(self, sequence: int) -> None:
        """Forgets one sequence."""
        for prefix in self._sequences.pop(sequence, {}).values():
            self.nbytes -= prefix.nbytes

    def clear(self) -> None:
        """Forgets everything."""
        self._sequences.clear()
        self.nbytes = 0

    def _room(
        self,
        sequence: int,
        layer: int,
        row: int,
        head_start: int,
        k: Tensor,
        v: Tensor,
        stop: int,
        capacity: int,
    ) -> Prefix | None:
        """Storage that covers the heads and positions asked for, with what was there before; None if too large."""
        old = self._sequences.get(sequence, {}).get((layer, row))
        first, last, size = head_start, head_start + k.shape[0], 0
        if old is not None:
            first, last, size = (
                min(first, old.head_start),
                max(last, old.head_start + len(old.lengths)),
                old.k.shape[1],
            )
            if first == old.head_start and last - first == len(old.lengths) and stop <= size:
                return old
        size = max(size, capacity if capacity >= stop else round_up(stop, self.block))
        wanted = (last - first) * size * (k.shape[2] * k.element_size() + v.shape[2] * v.element_size())
        freed, limit = old.nbytes if old is not None else 0, self.limit_bytes - self.reserved
        if wanted > limit:
            return None
        while self.nbytes - freed + wanted > limit:
            victim = next((s for s in self._sequences if s != sequence), None)
            if victim is None:
                return None
            self.free(victim)
            self.evictions += 1
        new = Prefix(
            first,
            k.new_empty(last - first, size, k.shape[2]),
            v.new_empty(last - first, size, v.shape[2]),
            [0] * (last - first),
        )
        if old is not None:
            at, used = old.head_start - first, max(old.lengths)
            new.k[at : at + len(old.lengths), :used] = old.k[:, :used]
            new.v[at : at + len(old.lengths), :used] = old.v[:, :used]
            new.lengths[at : at + len(old.lengths)] = old.lengths
        self._sequences.setdefault(sequence, {})[(layer, row)] = new
        self._sequences.move_to_end(sequence)
        self.nbytes += wanted - freed
        return new


class KeptTile(NamedTuple):
    """What a tile's gradients are made of beside dout, as kernels take it: one row, (1, S, H, D) and so on."""

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
