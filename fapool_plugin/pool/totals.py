"""What pool ranks' answers become when they are merged on their way: results lane by lane, gradients summed.

Two totals with the same manners: what this rank computed is added, then what came over links, and the result goes on.
Knows tiles and tensors; not who sends what to whom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fapool_plugin.kernels.forward import merge_
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.trees import gradient_layout, layout

Payload = Sequence[Tensor | Sequence[Tensor]]
Table = Sequence[Sequence[int]]
"""Rows of a tile table."""


class Total(Protocol):
    """Answers of several ranks, merged into one. What is added may be changed and is kept."""

    def add_own(self, table: Table, results: Payload) -> None:
        """Merges what this rank computed, a list of tensors for each part of an answer, tile by tile."""

    def add_part(self, table: Table, results: Sequence[Tensor]) -> None:
        """Merges what came over a link, flat."""

    def result(self) -> tuple[list[list[int]], list[list[Tensor]]]:
        """The table of what there is, and the parts of the answer."""


class ResultTotal:
    """Results of tiles, merged wherever they are of the same queries and heads."""

    def __init__(self, group: int, head_dim: int) -> None:
        self.group, self.head_dim = group, head_dim
        self._merged: list[tuple[Tile, Tensor, Tensor]] = []

    def add_own(self, table: Table, results: Payload) -> None:
        """Merges what this rank computed."""
        for row, out, lse in zip(table, *results, strict=True):
            self.add(Tile(*row[:7]), out, lse)

    def add_part(self, table: Table, results: Sequence[Tensor]) -> None:
        """Merges what came over a link."""
        self.add_flat([Tile(*row[:7]) for row in table], *results)

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

    def add_flat(self, tiles: Sequence[Tile], out: Tensor, lse: Tensor) -> None:
        """Merges flat results of tiles."""
        for tile, outs, lses in layout(tiles, self.group, self.head_dim):
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


@dataclass
class _Lane:
    """The sum of dk and dv of one lane's positions from ``start`` on."""

    start: int
    dk_TD: Tensor
    dv_TE: Tensor

    @property
    def stop(self) -> int:
        return self.start + self.dk_TD.shape[0]

    def covers(self, other: _Lane) -> bool:
        return self.start <= other.start and other.stop <= self.stop

    def add_(self, other: _Lane) -> None:
        at = slice(other.start - self.start, other.stop - self.start)
        self.dk_TD[at] += other.dk_TD
        self.dv_TE[at] += other.dv_TE


class GradientTotal:
    """Gradients of tiles: dq of disjoint queries side by side, dk and dv of the same lane summed.

    Args:
        group: query heads per KV head.
        head_dim: D, of queries and keys.
        v_head_dim: E, of values.
    """

    def __init__(self, group: int, head_dim: int, v_head_dim: int) -> None:
        self.group, self.head_dim, self.v_head_dim = group, head_dim, v_head_dim
        self._queries: list[tuple[Tile, Tensor]] = []
        self._lanes: dict[tuple[int, int], _Lane] = {}

    def add_own(self, table: Table, results: Payload) -> None:
        """Adds (dq, dk, dv) of tiles, with one row and heads first."""
        for row, dq, dk, dv in zip(table, *results, strict=True):
            self._add(Tile(*row[:7]), dq[0], dk[0], dv[0])

    def add_part(self, table: Table, results: Sequence[Tensor]) -> None:
        """Adds flat gradients as they come over a link."""
        dq, dk, dv = results
        for tile, dq_at, dk_at, dv_at in gradient_layout(table, self.group, self.head_dim, self.v_head_dim):
            heads, keys = tile.head_stop - tile.head_start, tile.k_stop - tile.k_start
            self._add(
                tile,
                dq[dq_at].view(heads * self.group, tile.q_stop - tile.q_start, self.head_dim),
                dk[dk_at].view(heads, keys, self.head_dim),
                dv[dv_at].view(heads, keys, self.v_head_dim),
            )

    def result(self) -> tuple[list[list[int]], list[list[Tensor]]]:
        """(table, [dqs, dks, dvs]): rows with queries and no keys, then rows with keys and no queries."""
        table = [[*tile[:5], 0, 0, 0, 0] for tile, _ in self._queries]
        lanes = sorted(self._lanes.items())
        # Neighbouring heads whose keys are the same go into one row.
        for (row, head), lane in lanes:
            if table and table[-1][0] == row and table[-1][2:] == [head, 0, 0, 0, 0, lane.start, lane.stop]:
                table[-1][2] = head + 1
            else:
                table.append([row, head, head + 1, 0, 0, 0, 0, lane.start, lane.stop])
        dks, dvs = [lane.dk_TD for _, lane in lanes], [lane.dv_TE for _, lane in lanes]
        return table, [[dq for _, dq in self._queries], dks, dvs]

    def _add(self, tile: Tile, dq_HSD: Tensor, dk_KTD: Tensor, dv_KTE: Tensor) -> None:
        device = self._queries[0][1].device if self._queries else dq_HSD.device
        if tile.q_start < tile.q_stop:
            self._queries.append((tile, dq_HSD.to(device)))
        for head in range(tile.head_start, tile.head_stop if tile.k_start < tile.k_stop else tile.head_start):
            at, key = head - tile.head_start, (tile.row, head)
            new = _Lane(tile.k_start, dk_KTD[at].to(device), dv_KTE[at].to(device))
            old = self._lanes.get(key)
            if old is None:
                self._lanes[key] = new
            elif old.covers(new):
                old.add_(new)
            else:
                self._lanes[key] = self._sum(old, new)

    def _sum(self, old: _Lane, new: _Lane) -> _Lane:
        """Of two of which the first does not cover the second."""
        if not new.covers(old):
            start, length = min(old.start, new.start), max(old.stop, new.stop) - min(old.start, new.start)
            both = (x.new_zeros(length, x.shape[1]) for x in (new.dk_TD, new.dv_TE))
            whole = _Lane(start, *both)
            whole.add_(new)
            new = whole
        new.add_(old)
        return new
