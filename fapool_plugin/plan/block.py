"""One block in flight, or one step, on the line: what pieces of the line have of it, from sums over rows.

Whole rows are looked up in arrays, so a stretch of a thousand costs no more than a few. Lanes are cut where their work
reaches a fraction, and not at multiples. Knows numbers only; what they cost is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import sqrt
from typing import Any

import numpy as np

from fapool_plugin.plan.line import Piece, Runs

Array = np.ndarray[Any, Any]
Pieces = Sequence[Piece | Runs]


class Block:
    """One block in flight, or one step: sums over rows, for pieces of the line. Rows without queries have nothing.

    Args:
        first: position of each row's first query.
        last: position after its last.
        alike: how many sequences each row stands for.
        kv_heads: lanes of a sequence.
    """

    def __init__(self, first: Array, last: Array, alike: Array, kv_heads: int) -> None:
        self.first, self.last = first, last
        self.row_pairs = (last * (last + 1) - first * (first + 1)) // 2
        self.tokens = int(((last - first) * alike).sum())
        lanes = alike * kv_heads * (self.row_pairs > 0)
        self._sums = {
            "calls": _sums(self.row_pairs > 0),
            "lanes": _sums(lanes),
            "pairs": _sums(self.row_pairs * lanes),
            "queries": _sums((last - first) * lanes),
            "keys": _sums(last * lanes),
        }

    def calls(self, pieces: Pieces) -> float:
        """Tiles, each a call of a kernel."""
        return self._of("calls", pieces, lambda piece: float(self.row_pairs[piece.run] > 0))

    def lanes(self, pieces: Pieces) -> float:
        """How many."""
        return self._of("lanes", pieces, lambda piece: piece.lanes)

    def pairs(self, pieces: Pieces) -> float:
        """(query, key) pairs of all lanes."""
        part = self.row_pairs
        return self._of("pairs", pieces, lambda piece: piece.lanes * (piece.stop - piece.start) * int(part[piece.run]))

    def queries(self, pieces: Pieces) -> float:
        """New queries, of all lanes."""
        return self._of("queries", pieces, lambda p: p.lanes * (self._position(p, p.stop) - self._position(p, p.start)))

    def keys(self, pieces: Pieces) -> float:
        """Keys that the pieces' queries see, of all lanes."""
        return self._of("keys", pieces, lambda piece: piece.lanes * self._position(piece, piece.stop))

    def _of(self, name: str, pieces: Pieces, one: Callable[[Piece], float]) -> float:
        sums = self._sums[name]
        return sum(float(sums[p.stop] - sums[p.start]) if isinstance(p, Runs) else one(p) for p in pieces)

    def _position(self, piece: Piece, fraction: float) -> float:
        """Where a lane's work reaches this fraction."""
        first, last = int(self.first[piece.run]), int(self.last[piece.run])
        if fraction in (0.0, 1.0):
            return last if fraction else first
        return sqrt(first**2 + fraction * (last**2 - first**2))


def _sums(values: Array) -> Array:
    return np.concatenate([[0], np.cumsum(values)])
