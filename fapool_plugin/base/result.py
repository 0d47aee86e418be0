"""The result of one attention call as it comes together: tiles computed here, partial results merged in.

Exact, whatever rank computes what: (out, lse) in fp32 (fp64 for fp64 inputs), parts of one query merged by their LSE.
Where each sequence has one query, lanes of all rows lie side by side in memory, and a rank's share of them is a run, or
a few. Knows tensors and tiles; no ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from fapool_plugin.devices.copies import Copies, brought
from fapool_plugin.kernels.forward import fold_sinks, merge_
from fapool_plugin.kernels.lanes import Rectangle, attend_all
from fapool_plugin.plan.line import Tile, joined
from fapool_plugin.plan.shares import Geometry, lane_runs, layout
from fapool_plugin.wire.messages import LinkLost, Message


class Result:
    """(out, lse) of the call of ``q_BHSD`` on ``k_BKTD`` and ``v_BKTE``; 0 and -inf where nothing is merged yet."""

    def __init__(
        self, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, geometry: Geometry, softmax_scale: float, softcap: float
    ) -> None:
        self.q, self.k, self.v, self.geometry = q_BHSD, k_BKTD, v_BKTE, geometry
        self.softmax_scale, self.softcap = softmax_scale, softcap
        self.group = q_BHSD.shape[1] // k_BKTD.shape[1]
        self.exact = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
        self.k_column = geometry.columns - k_BKTD.shape[2]
        """The column of the first key that is given."""
        self.disjoint = False
        """Whether no two parts are of the same queries: each is written, and none merged."""
        self._side_by_side = q_BHSD.shape[2] == 1
        self._own: list[tuple[Tile, Tensor, Tensor]] = []
        self._parts: list[tuple[int, int, Tensor, Tensor]] = []
        """Of ranks: lanes [start, stop), flat outputs and LSEs."""

    @cached_property
    def out_BSHE(self) -> Tensor:
        """Where parts are written and not merged it is in q's dtype, which they have been rounded to."""
        batch, heads, queries, _ = self.q.shape
        dtype = self.q.dtype if self.disjoint else self.exact
        return self.q.new_zeros((batch, queries, heads, self.v.shape[3]), dtype=dtype)

    @cached_property
    def lse_BHS(self) -> Tensor:
        return self.q.new_full(self.q.shape[:3], -torch.inf, dtype=self.exact)

    def places(self, tiles: Sequence[Tile]) -> list[Tile]:
        """Where tiles' queries and results are, for :meth:`queries` and :meth:`add`. With one query a sequence these
        are tiles of a single made-up row, whose heads are the numbers of lanes."""
        if not self._side_by_side:
            return list(tiles)
        return [Tile(0, 1, *run, 0, 1, 0, 0) for run in lane_runs(tiles, self.k.shape[1])]

    def queries(self, places: Iterable[Tile]) -> list[Tensor]:
        """The queries at these places, each (rows, heads, S, D), or flat."""
        if not self._side_by_side:
            return [self.q[slice(*at[:2]), self.heads(at), self.geometry.q_slice(at)] for at in places]
        lane = self.group * self.q.shape[3]
        return [self._flat_q[at.head_start * lane : at.head_stop * lane] for at in places]

    def keys(self, tile: Tile, start: int, stop: int) -> tuple[slice, slice, slice]:
        """Where the keys at these positions of a tile's lanes are: rows, heads and columns."""
        return slice(*tile[:2]), slice(*tile[2:4]), self.geometry.k_slice(tile, start, stop)

    def new_keys(self, tile: Tile, runs: Sequence[tuple[int, int]]) -> tuple[slice, slice, slice | Tensor]:
        """Where the keys at some runs of positions of a tile's lanes are, in what is given: rows, heads and columns."""
        shift = self.geometry.starts[tile.row_start] - self.k_column
        columns = [slice(start + shift, stop + shift) for start, stop in runs]
        if len(columns) == 1:
            return slice(*tile[:2]), slice(*tile[2:4]), columns[0]
        index = torch.cat([torch.arange(c.start, c.stop, device="cpu") for c in columns])
        # Where an index of the host is used on a device, it is waited for at each use.
        return slice(*tile[:2]), slice(*tile[2:4]), index.to(self.k.device, non_blocking=True)

    def compute(self, tiles: Iterable[Tile]) -> None:
        """Computes these tiles here."""
        self.compute_in_columns(self.in_columns(tiles))

    def in_columns(self, tiles: Iterable[Tile]) -> list[Tile]:
        """The same tiles with columns for positions. There rows of unequal lengths may be one rectangle, and are
        computed in one call: the newest keys of padded rows end together."""
        moved = sorted(map(self._moved, tiles), key=lambda tile: (tile[4:], tile))
        return joined((None, tile) for tile in moved)

    def compute_in_columns(self, tiles: Sequence[Tile]) -> None:
        """Computes what :meth:`in_columns` has made of tiles."""
        parts = list[Rectangle]()
        for tile in tiles:
            rows, heads, keys = slice(*tile[:2]), slice(*tile[2:4]), slice(tile.k_start, tile.k_stop)
            q, k, v = (
                self.q[rows, self.heads(tile), self._queries(tile)],
                self.k[rows, heads, keys],
                self.v[rows, heads, keys],
            )
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            parts.append(Rectangle(q, k, v, tile.q_start - tile.k_start))
        found = attend_all(parts, softmax_scale=self.softmax_scale, softcap=self.softcap)
        self._own += [(tile, *one) for tile, one in zip(tiles, found, strict=True)]
        if not self._side_by_side:
            self._take_own()

    def take_own(self, tile: Tile, out_RSHE: Tensor, lse_RHS: Tensor) -> None:
        """Takes what was computed here of keys that are not given."""
        self._own.append((self._moved(tile), out_RSHE, lse_RHS))
        if not self._side_by_side:
            self._take_own()

    def check(self, answer: Message) -> None:
        """Raises LinkLost if an answer's numbers are not finite though the call's are. An LSE may be -inf: of a query
        that sees no key."""
        out, lse = answer.tensors[:2]
        if not out.numel():
            return
        # A sum is the quickest look; one that is infinite may have overflowed.
        if lse.max().item() < torch.inf and (isfinite(out.sum(dtype=self.exact).item()) or _bound(out) < torch.inf):
            return
        if all(_bound(x) < torch.inf for x in (self.q, self.k, self.v)):
            raise LinkLost("answered with numbers that are not finite")

    def add(self, answer: Message, places: Sequence[Tile], copies: Copies | None = None) -> None:
        """Takes an answer: of these places, or, if ranks have merged theirs on the way, of what its table says."""
        if answer.header.parts:
            places = self.places([Tile(*row[:8]) for row in answer.tensors[2].tolist()])
        out, lse = brought(copies, answer.tensors[:2], self.q.device)
        if self._side_by_side and len(places) == 1:
            self._parts.append((*places[0][2:4], out, lse))
            return
        for at, outs, lses in layout(places, self.group, self.v.shape[3]):
            if self._side_by_side:
                self._parts.append((*at[2:4], out[outs], lse[lses]))
            else:
                rows, heads = at.row_stop - at.row_start, (at.head_stop - at.head_start) * self.group
                self._take(
                    self._moved(at), out[outs].view(rows, -1, heads, self.v.shape[3]), lse[lses].view(rows, heads, -1)
                )

    def final(self, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) with sinks; out contiguous, in q's dtype."""
        if self._side_by_side:
            self._lay_out()
            self._take_own()
        out, lse = self.out_BSHE, self.lse_BHS
        if sinks_H is not None:
            out, lse = fold_sinks(out, lse, sinks_H)
        return out.to(self.q.dtype).contiguous(), lse

    def heads(self, tile: Tile) -> slice:
        """A tile's query heads."""
        return slice(tile.head_start * self.group, tile.head_stop * self.group)

    @cached_property
    def _flat_q(self) -> Tensor:
        return self.q.reshape(-1)

    def _lay_out(self) -> None:
        """Ranks' parts, lane behind lane; what a second rank computed of a lane is merged."""
        (batch, heads, _, _), group, dim = self.q.shape, self.group, self.v.shape[3]
        outs, lses, overlapping, at = list[Tensor](), list[Tensor](), [], 0
        for start, stop, out, lse in sorted(self._parts, key=lambda part: part[:2]):
            if start > at:
                self._room_for(start - at, outs, lses)
                at = start
            if known := max(0, min(at, stop) - start):
                overlapping.append((start, start + known, out, lse))
            if stop > at:
                outs.append(out[known * group * dim :] if known else out)
                lses.append(lse[known * group :] if known else lse)
                at = stop
        self._room_for(batch * heads // group - at, outs, lses)
        dtype = self.q.dtype if self.disjoint and not overlapping else self.exact
        out, lse = torch.cat(outs).to(dtype), torch.cat(lses)
        for start, stop, *part in overlapping:
            lanes = slice(start * group, stop * group)
            out_LE, lse_L = out.view(-1, dim)[lanes], lse[lanes]
            merge_(
                out_LE[None, None],
                lse_L[None, :, None],
                part[0][: out_LE.numel()].view(1, 1, -1, dim),
                part[1][: lse_L.numel()].view(1, -1, 1),
            )
        self.out_BSHE, self.lse_BHS = out.view(batch, 1, heads, dim), lse.view(batch, heads, 1)
        self._parts.clear()

    def _room_for(self, lanes: int, outs: list[Tensor], lses: list[Tensor]) -> None:
        """Room for lanes that no part came of."""
        if lanes:
            outs.append(self.q.new_zeros(lanes * self.group * self.v.shape[3]))
            lses.append(self.q.new_full((lanes * self.group,), -torch.inf, dtype=self.exact))

    def _take_own(self) -> None:
        """Merges, or writes, what was computed here."""
        for part in self._own:
            self._take(*part)
        self._own.clear()

    def _take(self, tile: Tile, out_RSHE: Tensor, lse_RHS: Tensor) -> None:
        """Of a tile in columns."""
        rows, heads, queries = slice(*tile[:2]), self.heads(tile), self._queries(tile)
        out, lse = self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries]
        if self.disjoint:
            out[:], lse[:] = out_RSHE, lse_RHS
        else:
            merge_(out, lse, out_RSHE, lse_RHS)

    def _queries(self, tile: Tile) -> slice:
        return slice(tile.q_start - self.geometry.q_column, tile.q_stop - self.geometry.q_column)

    def _moved(self, tile: Tile) -> Tile:
        """The tile with columns in place of positions."""
        start = self.geometry.starts[tile.row_start]
        return Tile(*tile[:4], *(at + start for at in tile[4:]))


def _bound(x: Tensor) -> float:
    """No less than the largest magnitude; NaN if any is, inf if any is infinite."""
    low, high = (end.item() for end in torch.aminmax(x.detach()))
    return abs(low) + abs(high)  # NaN + anything is NaN
