"""Partial results of one call, merged on their way to the base wherever they are of the same queries and heads.

What this rank computed is added, then what came over links, and the sum goes on. Knows tiles and tensors; not who sends
what to whom.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fapool_plugin.kernels.forward import merge_
from fapool_plugin.plan.box import Box
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import layout


class PartialResults:
    """Results of tiles.

    Args:
        group: query heads per KV head.
        head_dim: E, of outputs.
    """

    def __init__(self, group: int, head_dim: int) -> None:
        self.group, self.head_dim = group, head_dim
        self._merged: list[tuple[Tile, Tensor, Tensor]] = []

    def add(self, tile: Tile, out_RSHE: Tensor, lse_RHS: Tensor) -> None:
        """Merges one tile's result; the tensors are changed or kept."""
        for known, out, lse in self._merged:
            if known[4:6] == tile[4:6] and (both := known.box.common(tile.box)).lanes:
                here, there = self._at(both, known.box), self._at(both, tile.box)
                mine = out[here[0], :, here[1]], lse[here]
                merge_(*mine, out_RSHE[there[0], :, there[1]], lse_RHS[there])
                for rest in tile.box.without(both):
                    rows, heads = self._at(rest, tile.box)
                    self.add(Tile(*rest, *tile[4:]), out_RSHE[rows, :, heads], lse_RHS[rows, heads])
                return
        self._merged.append((tile, out_RSHE.to(lse_RHS.dtype), lse_RHS))

    def add_flat(self, table: Sequence[Sequence[int]], out: Tensor, lse: Tensor) -> None:
        """Merges flat results, of the tiles in a tile table."""
        for tile, outs, lses in layout([Tile(*row[:8]) for row in table], self.group, self.head_dim):
            rows, heads = tile.row_stop - tile.row_start, (tile.head_stop - tile.head_start) * self.group
            part = out[outs].view(rows, -1, heads, self.head_dim), lse[lses].view(rows, heads, -1)
            device = self._merged[0][1].device if self._merged else out.device
            self.add(tile, part[0].to(device), part[1].to(device))

    def result(self) -> tuple[list[list[int]], list[list[Tensor]]]:
        """(tile table, [outs, lses]). Not rounded to the queries' dtype: it may be merged several times more."""
        table = [[*tile, 0, 0, 0] for tile, _, _ in self._merged]
        return table, [[out for _, out, _ in self._merged], [lse for _, _, lse in self._merged]]

    def _at(self, part: Box, box: Box) -> tuple[slice, slice]:
        """Rows and query heads of a part of a box."""
        rows, heads = part.inside(box)
        return rows, slice(heads.start * self.group, heads.stop * self.group)
