"""Partial results of one call, merged on their way to the base wherever they are of the same queries and heads.

What this rank computed is added, then what came over links, and the sum goes on. Knows tiles and tensors; not who sends
what to whom.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fapool_plugin.kernels.forward import merge_
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

    def add(self, tile: Tile, out_1SHE: Tensor, lse_1HS: Tensor) -> None:
        """Merges one tile's result; the tensors are changed or kept."""
        for known, out, lse in self._merged:
            first, last = max(known.head_start, tile.head_start), min(known.head_stop, tile.head_stop)
            if (known.row, known.q_start, known.q_stop) == (tile.row, tile.q_start, tile.q_stop) and first < last:
                here, there = self._heads(known, first, last), self._heads(tile, first, last)
                merge_(out[:, :, here], lse[:, here], out_1SHE[:, :, there], lse_1HS[:, there])
                for start, stop in ((tile.head_start, first), (last, tile.head_stop)):
                    if start < stop:
                        rest = self._heads(tile, start, stop)
                        self.add(
                            tile._replace(head_start=start, head_stop=stop), out_1SHE[:, :, rest], lse_1HS[:, rest]
                        )
                return
        self._merged.append((tile, out_1SHE.to(lse_1HS.dtype), lse_1HS))

    def add_flat(self, table: Sequence[Sequence[int]], out: Tensor, lse: Tensor) -> None:
        """Merges flat results, of the tiles in a tile table."""
        for tile, outs, lses in layout([Tile(*row[:7]) for row in table], self.group, self.head_dim):
            heads = (tile.head_stop - tile.head_start) * self.group
            part = out[outs].view(1, -1, heads, self.head_dim), lse[lses].view(1, heads, -1)
            device = self._merged[0][1].device if self._merged else out.device
            self.add(tile, part[0].to(device), part[1].to(device))

    def result(self) -> tuple[list[list[int]], list[list[Tensor]]]:
        """(tile table, [outs, lses]). Not rounded to the queries' dtype: it may be merged several times more."""
        table = [[*tile, 0, 0] for tile, _, _ in self._merged]
        return table, [[out for _, out, _ in self._merged], [lse for _, _, lse in self._merged]]

    def _heads(self, tile: Tile, start: int, stop: int) -> slice:
        return slice((start - tile.head_start) * self.group, (stop - tile.head_start) * self.group)
