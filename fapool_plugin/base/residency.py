"""How long a prefix of each lane each pool rank holds, as far as the base knows: it sent the keys.

An array (rows, heads) of lengths for each rank and layer. Arrays are never written to: layers that were sent the same
share one, and what follows from it is worked out once for all of them. Positions are lane-relative.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np

from fapool_plugin.plan.line import Tile

Held = np.ndarray[Any, Any]


class Residency:
    """What each rank holds of each layer; ranks are named by their key, so that nothing outlives a lease."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Held] = {}
        self._cropped: dict[int, Held] = {}
        """By rank, the last array that came of a crop: the next layer's is likely to be the same."""

    def of(self, rank: int, layer: int) -> Held | None:
        """None: nothing."""
        return self._held.get((rank, layer))

    def hold(self, rank: int, layer: int, held: Held) -> None:
        """``rank`` now holds exactly that of ``layer``."""
        self._held[rank, layer] = held

    def total(self, rank: int) -> int:
        """Positions that ``rank`` holds, of all lanes together, in a layer of which it holds any."""
        return next((int(held.sum()) for (key, _), held in self._held.items() if key == rank), 0)

    def crop(self, layer: int, lengths: Held) -> None:
        """``layer``'s rows were cut to these lengths; rows beyond them to 0."""
        for key, held in self._held.items():
            if key[1] == layer:
                rows = np.zeros(len(held), dtype=np.int64)
                rows[: len(lengths)] = lengths[: len(held)]
                self._held[key] = self._known(key[0], np.minimum(held, rows[:, None]), held)

    def forget(self, rank: int | None = None) -> None:
        """``rank``, or every rank, holds nothing any more."""
        self._held = {} if rank is None else {key: v for key, v in self._held.items() if key[0] != rank}
        self._cropped.clear()

    def _known(self, rank: int, cropped: Held, before: Held) -> Held:
        """An array in use that has these lengths, if one of the two likely ones has; else this one."""
        for known in (before, self._cropped.get(rank)):
            if known is not None and np.array_equal(known, cropped):
                return known
        self._cropped[rank] = cropped
        return cropped


def alike_rows(held: Held | None, tile: Tile) -> list[tuple[Tile, int]]:
    """The tile cut into runs of rows whose held prefixes are equally long, with that length: what all lanes have."""
    if held is None or held.shape[0] < tile.row_stop or held.shape[1] < tile.head_stop:
        return [(tile, 0)]
    shortest = held[tile.row_start : tile.row_stop, tile.head_start : tile.head_stop].min(axis=1)
    edges = [0, *(np.flatnonzero(np.diff(shortest)) + 1).tolist(), len(shortest)]
    first = tile.row_start
    return [
        (tile._replace(row_start=first + start, row_stop=first + stop), int(shortest[start]))
        for start, stop in pairwise(edges)
    ]


def grown(held: Held | None, sent: Iterable[tuple[Tile, int]]) -> Held:
    """What is held once the tiles' lanes have exactly these lengths."""
    changes = list(sent)
    shape = [0, 0] if held is None else list(held.shape)
    for tile, _ in changes:
        shape = [max(shape[0], tile.row_stop), max(shape[1], tile.head_stop)]
    new = np.zeros(shape, dtype=np.int64)
    if held is not None:
        new[: held.shape[0], : held.shape[1]] = held
    for tile, length in changes:
        new[tile.row_start : tile.row_stop, tile.head_start : tile.head_stop] = length
    return new
