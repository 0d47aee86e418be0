"""The result of one attention call as it comes together: tiles computed here, partial results merged in.

Exact whoever computed what: (out, lse) in fp32 (fp64 for fp64 inputs), parts of the same queries merged by their LSE.
Knows tensors and tiles; no ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fapool_plugin.kernels.forward import attend, fold_sinks, merge_
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import Geometry, in_batches, layout
from fapool_plugin.wire.messages import Message


class Result:
    """(out, lse) of the call of ``q_BHSD`` on ``k_BKTD`` and ``v_BKTE``; 0 and -inf where nothing is merged yet."""

    def __init__(
        self, q_BHSD: Tensor, k_BKTD: Tensor, v_BKTE: Tensor, geometry: Geometry, softmax_scale: float, softcap: float
    ) -> None:
        self.q, self.k, self.v, self.geometry = q_BHSD, k_BKTD, v_BKTE, geometry
        self.softmax_scale, self.softcap = softmax_scale, softcap
        batch, heads, queries, _ = q_BHSD.shape
        self.group = heads // k_BKTD.shape[1]
        exact = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
        self.out_BSHE = q_BHSD.new_zeros((batch, queries, heads, v_BKTE.shape[3]), dtype=exact)
        self.lse_BHS = q_BHSD.new_full((batch, heads, queries), -torch.inf, dtype=exact)
        self.disjoint = False
        """Whether no two parts are of the same queries: each is written, and none merged."""

    def compute(self, tiles: Iterable[Tile]) -> None:
        """Computes these tiles here."""
        for tile, rows in in_batches(tiles, self.geometry):
            batch, keys = slice(tile.row, tile.row + rows), self.geometry.k_slice(tile.row, tile.k_start, tile.k_stop)
            lanes = slice(tile.head_start, tile.head_stop)
            heads, queries = self.heads(tile), self.geometry.q_slice(tile)
            out, lse = attend(
                self.q[batch, heads, queries].transpose(1, 2),
                self.k[batch, lanes, keys].transpose(1, 2),
                self.v[batch, lanes, keys].transpose(1, 2),
                softmax_scale=self.softmax_scale,
                causal=True,
                q_offset=tile.q_start - tile.k_start,
                softcap=self.softcap,
            )
            self._merge(tile, out, lse)

    def add(self, answer: Message, tiles: Sequence[Tile]) -> None:
        """Merges an answer: of these tiles, or, if ranks have merged theirs on the way, of what its table says."""
        if answer.header.parts:
            tiles = [Tile(*row[:7]) for row in answer.tensors[2].tolist()]
        out, lse = (tensor.to(self.q.device) for tensor in answer.tensors[:2])
        for tile, outs, lses in layout(tiles, self.group, self.v.shape[3]):
            heads = (tile.head_stop - tile.head_start) * self.group
            self._merge(tile, out[outs].view(1, -1, heads, self.v.shape[3]), lse[lses].view(1, heads, -1))

    def final(self, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) with sinks; out contiguous, in q's dtype."""
        out, lse = self.out_BSHE, self.lse_BHS
        if sinks_H is not None:
            out, lse = fold_sinks(out, lse, sinks_H)
        return out.to(self.q.dtype).contiguous(), lse

    def heads(self, tile: Tile) -> slice:
        """A tile's query heads."""
        return slice(tile.head_start * self.group, tile.head_stop * self.group)

    def _merge(self, tile: Tile, out_BSHE: Tensor, lse_BHS: Tensor) -> None:
        """Takes a part of rows from the tile's on."""
        rows, queries = slice(tile.row, tile.row + out_BSHE.shape[0]), self.geometry.q_slice(tile)
        heads = self.heads(tile)
        if self.disjoint:
            self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries] = out_BSHE, lse_BHS
        else:
            merge_(self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries], out_BSHE, lse_BHS)
