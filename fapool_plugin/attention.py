"""The base's half of one attention call: share out the tiles, compute its own, gather the rest, merge.

Whatever a pool rank does not deliver is computed here, so a call always returns the exact result. Knows no model
framework; how a forward was decided is given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fapool_plugin.cost import share_s
from fapool_plugin.forward import Forward
from fapool_plugin.kernels import attend, fold_sinks, merge_
from fapool_plugin.lease import PoolRank
from fapool_plugin.partition import Tile
from fapool_plugin.plan import Request, within_residency
from fapool_plugin.resource_manager import ResourceManager
from fapool_plugin.timeline import ATTENTION, LINEAR, MERGE, SEND, WAIT
from fapool_plugin.transport import Header, Op, Status, dtype_code, float_bits


class FAPoolAttention(nn.Module):
    """Stands in for standard attention in one layer; has no parameters.

    Args:
        manager: decides and counts; shared by all layers of a model.
        layer: the layer's number.
        layers: attention layers in the model.
        stands_for: the host's name for the attention of calls that are not pooled.
    """

    def __init__(self, manager: ResourceManager, layer: int, layers: int, stands_for: str) -> None:
        super().__init__()
        self.manager, self.layer, self.layers, self.stands_for = manager, layer, layers, stands_for

    def extra_repr(self) -> str:
        config = self.manager.config
        return f"pool_ranks={config.pool_ranks}, threshold={config.threshold}, stands_for={self.stands_for!r}"

    def forward(
        self,
        q_BHSD: Tensor,
        k_BKTD: Tensor,
        v_BKTE: Tensor,
        *,
        decided: Forward,
        local: Callable[[], Any] | None = None,
        resident: bool = False,
        softmax_scale: float = 1.0,
        softcap: float = 0.0,
        sinks_H: Tensor | None = None,
    ) -> Any:
        """Causal attention of the new queries against all keys.

        Args:
            q_BHSD: new queries, heads first as models hand them over; any strides.
            k_BKTD: keys, the past included.
            v_BKTE: values, the past included.
            decided: this forward's decision.
            local: what the model would do without the plugin; its result is returned as it is when the forward is
                local. None: the layer takes part in a pooled forward.
            resident: whether the keys live in the sequence's storage, so that pool ranks may keep them.
            softmax_scale: factor of the scores.
            softcap: tanh cap of the scores, 0 for none.
            sinks_H: attention sinks' logits, one per query head.

        Returns:
            (B, S, H, E) contiguous, in q's dtype; 0 at padded queries.
        """
        counters = self.manager.counters.phase(decided.phase)
        if local is not None:
            counters.local_calls += 1
            return local()
        call = _Call(self, decided, q_BHSD, k_BKTD, v_BKTE, resident, softmax_scale, softcap)
        call.post()
        if decided.hand_over is not None:
            decided.hand_over()
        pooled = call.wait()
        self.manager.timeline.switch(LINEAR)
        counters.pooled_calls += pooled
        counters.local_calls += not pooled
        out = call.out_BSHE
        if sinks_H is not None:
            out, _ = fold_sinks(out, call.lse_BHS, sinks_H)
        return out.to(q_BHSD.dtype).contiguous()


@dataclass
class _Outstanding:
    """A request under way, and all that is needed to compute it here should the rank be lost."""

    rank: PoolRank
    call: int
    requests: list[Request]


class _Call:
    """One attention call of one layer."""

    def __init__(
        self,
        module: FAPoolAttention,
        decided: Forward,
        q_BHSD: Tensor,
        k_BKTD: Tensor,
        v_BKTE: Tensor,
        resident: bool,
        softmax_scale: float,
        softcap: float,
    ) -> None:
        if decided.geometry is None or decided.sequence is None:
            raise ValueError("a pooled forward needs a geometry and a sequence")
        self.manager, self.layer, self.layers = module.manager, module.layer, module.layers
        self.decided, self.geometry, self.sequence = decided, decided.geometry, decided.sequence
        self.q, self.k, self.v = q_BHSD, k_BKTD, v_BKTE
        self.keep = resident and decided.lasting
        self.scale, self.softcap = softmax_scale, softcap
        batch, heads, queries, _ = q_BHSD.shape
        self.group = heads // k_BKTD.shape[1]
        exact = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
        self.out_BSHE = q_BHSD.new_zeros((batch, queries, heads, v_BKTE.shape[3]), dtype=exact)
        self.lse_BHS = q_BHSD.new_full((batch, heads, queries), -torch.inf, dtype=exact)
        self._outstanding: list[_Outstanding] = []
        self._timeline = module.manager.timeline

    def post(self) -> None:
        """Asks the pool ranks for their shares, and computes the base's."""
        self._timeline.switch(SEND)
        position = (self.k.shape[3] + self.v.shape[3]) * self.k.element_size()
        plan = self.decided.plan(self.k.shape[1], position, self.layers)
        self._disjoint = plan.axis == "queries"
        mine = list(plan.base)
        for rank, share in zip(plan.ranks, plan.shares, strict=True):
            if rank.lost or (not self.keep and plan.axis == "keys"):
                mine.extend(share)
                continue
            requests, left = within_residency(share, self._held(rank), plan.axis, self.manager.config.kv_block)
            mine.extend(left)
            call = self._ask(rank, requests) if requests else None
            if call is None:
                mine.extend(request.tile for request in requests)
            else:
                self._outstanding.append(_Outstanding(rank, call, requests))
        self._compute(mine)
        self._timeline.switch(LINEAR)

    def wait(self) -> bool:
        """Completes ``out_BSHE`` and ``lse_BHS``; True if a pool rank computed any of it."""
        pooled = [self._gather(sent) for sent in self._outstanding]
        return any(pooled)

    def _held(self, rank: PoolRank) -> Callable[[Tile], int]:
        def held(tile: Tile) -> int:
            if not self.keep:
                return 0
            lanes = (tile.row, tile.head_start, tile.head_stop)
            return self.sequence.residency.held(rank.key, self.layer, *lanes)

        return held

    def _ask(self, rank: PoolRank, requests: list[Request]) -> int | None:
        """Sends one rank its tiles with the keys it lacks; the call number, or None if the rank is lost."""
        table = [(*request.tile, request.key_start, request.key_stop) for request in requests]
        q = [self._queries(request.tile) for request in requests]
        k = [self._keys(self.k, request.tile, request.key_start, request.key_stop) for request in requests]
        v = [self._keys(self.v, request.tile, request.key_start, request.key_stop) for request in requests]
        header = Header(
            op=Op.ATTEND,
            sequence=self.sequence.id,
            layer=self.layer,
            keep=int(self.keep),
            dtype=dtype_code(self.q.dtype),
            tiles=len(table),
            q_elements=_elements(q),
            k_elements=_elements(k),
            v_elements=_elements(v),
            head_dim=self.k.shape[3],
            v_head_dim=self.v.shape[3],
            group=self.group,
            capacity=self.sequence.capacity,
            scale_bits=float_bits(self.scale),
            softcap_bits=float_bits(self.softcap),
        )
        call = None
        with self.manager.guard(rank):
            call = rank.ask(header, (torch.tensor(table, dtype=torch.int64), q, k, v))
            if self.keep:
                for request in requests:
                    if request.key_stop > request.key_start:
                        lanes = (request.tile.row, request.tile.head_start, request.tile.head_stop)
                        self.sequence.residency.advance(rank.key, self.layer, *lanes, request.key_stop)
        return call

    def _gather(self, sent: _Outstanding) -> bool:
        """Merges one rank's part, or computes it here if the rank is lost or no longer holds the keys."""
        answer = None
        self._timeline.switch(WAIT)
        with self.manager.guard(sent.rank):
            answer = sent.rank.answer(sent.call)
        self._timeline.switch(MERGE)
        tiles = [request.tile for request in sent.requests]
        if answer is None or answer.header.status != Status.OK:
            if answer is not None:
                sent.rank.counters.stale += 1
                if all(request.key_start == 0 for request in sent.requests):
                    self.sequence.full.add(sent.rank.key)
                self.sequence.residency.forget(sent.rank.key)
            self._compute(tiles)
            return False
        sent.rank.counters.calls += 1
        took_ns = answer.header.extra
        sent.rank.counters.compute_s += took_ns / 1e9
        details: dict[str, float] = {"layer": self.layer, "queries": self.q.shape[2], "tiles": len(tiles)}
        if self.decided.rank_cost is not None:
            predicted_s = share_s(self.decided.rank_cost, self.k.shape[1], tiles)
            sent.rank.counters.predicted_s += predicted_s
            details["predicted_ms"] = predicted_s * 1e3
        self._timeline.rank(sent.rank.number, answer.header.clock + sent.rank.clock_offset, took_ns, **details)
        out, lse = (tensor.to(self.q.device) for tensor in answer.tensors)
        out_at = lse_at = 0
        for tile in tiles:
            queries, heads = tile.q_stop - tile.q_start, (tile.head_stop - tile.head_start) * self.group
            size = queries * heads
            part = out[out_at : out_at + size * self.v.shape[3]].view(1, queries, heads, -1)
            self._merge(tile, part, lse[lse_at : lse_at + size].view(1, heads, queries))
            out_at, lse_at = out_at + size * self.v.shape[3], lse_at + size
        return True

    def _compute(self, tiles: Iterable[Tile]) -> None:
        self._timeline.switch(ATTENTION)
        for tile in tiles:
            k = self._keys(self.k, tile, tile.k_start, tile.k_stop)[None].transpose(1, 2)
            v = self._keys(self.v, tile, tile.k_start, tile.k_stop)[None].transpose(1, 2)
            out, lse = attend(
                self._queries(tile)[None].transpose(1, 2),
                k,
                v,
                softmax_scale=self.scale,
                causal=True,
                q_offset=tile.q_start - tile.k_start,
                softcap=self.softcap,
            )
            self._merge(tile, out, lse)

    def _merge(self, tile: Tile, out_1SHE: Tensor, lse_1HS: Tensor) -> None:
        rows, queries = slice(tile.row, tile.row + 1), self.geometry.q_slice(tile)
        heads = slice(tile.head_start * self.group, tile.head_stop * self.group)
        if self._disjoint:
            self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries] = out_1SHE, lse_1HS
        else:
            merge_(self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries], out_1SHE, lse_1HS)

    def _queries(self, tile: Tile) -> Tensor:
        heads = slice(tile.head_start * self.group, tile.head_stop * self.group)
        return self.q[tile.row, heads, self.geometry.q_slice(tile)]

    def _keys(self, kv_BKTD: Tensor, tile: Tile, start: int, stop: int) -> Tensor:
        return kv_BKTD[tile.row, tile.head_start : tile.head_stop, self.geometry.k_slice(tile.row, start, stop)]


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
