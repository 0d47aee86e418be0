"""What one attention call asks of pool ranks: its tiles, with the keys that each rank lacks.

Keeps the base's record of what ranks hold in step with what was sent and with what came back. Knows the call's tensors
and the sequence; nothing of how answers are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fapool_plugin.base.forward import Forward
from fapool_plugin.base.kept_calls import KeepingStep
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.requests import Part, Payload, Request
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.result import Result
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.base.trees import arrange
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import share_s
from fapool_plugin.plan.shares import Plan, within_residency
from fapool_plugin.wire.messages import Header, Message, Op, Status, dtype_code, elements, float_bits


@dataclass
class AttentionRequests:
    """The requests of one layer's call."""

    manager: ResourceManager
    decided: Forward
    sequence: SequenceState
    layer: int
    result: Result
    resident: bool
    """Whether what is sent stays on the ranks, as prefixes of the sequence."""
    keeping: KeepingStep | None
    """In training: ranks keep the whole call."""

    def shared_out(self, plan: Plan) -> tuple[list[Request], list[Tile]]:
        """(what ranks are asked, what the base computes)."""
        requests, mine = [], list(plan.base)
        for rank, share in zip(plan.ranks, plan.shares, strict=True):
            if rank.lost or (not self.resident and plan.axis == "keys"):
                if share and not self.resident:
                    self.decided.note("keys are not in the plugin's cache, and would be sent at every step", False)
                mine.extend(share)
                continue
            work, left = within_residency(share, self._held(rank), plan.axis, self.manager.config.kv_block)
            mine.extend(left)
            if work:
                requests.append(Request(rank, work))
        if plan.axis == "keys":
            # Where queries are disjoint there is nothing to merge on the way.
            profile, result = self.manager.advisor.profile, self.result
            # Merged results travel as exactly as they are here.
            lane_bytes = result.q.shape[2] * result.group * (result.v.shape[3] + 1) * result.out_BSHE.element_size()
            link = profile.link if profile is not None else None
            arrange(requests, self.decided.config, link, lane_bytes, self.manager.guard)
        return requests, mine

    def message(self, request: Request) -> tuple[Header, Payload]:
        """Tiles with their queries, and the keys that the rank lacks."""
        result, geometry = self.result, self.result.geometry
        q = [result.q[tile.row, result.heads(tile), geometry.q_slice(tile)] for tile in request.tiles]

        def new(kv_BKTD: Tensor) -> list[Tensor]:
            return [
                kv_BKTD[tile.row, tile.head_start : tile.head_stop, geometry.k_slice(tile.row, start, stop)]
                for tile, start, stop in request.work
            ]

        k, v = new(result.k), new(result.v)
        header = Header(
            op=Op.ATTEND,
            sequence=self.sequence.id,
            layer=self.layer,
            keep=int(self.resident),
            dtype=dtype_code(result.q.dtype),
            tiles=len(request.work),
            q_elements=elements(q),
            k_elements=elements(k),
            v_elements=elements(v),
            head_dim=result.k.shape[3],
            v_head_dim=result.v.shape[3],
            group=result.group,
            capacity=self.sequence.capacity,
            scale_bits=float_bits(result.softmax_scale),
            softcap_bits=float_bits(result.softcap),
        )
        table = torch.tensor(
            [(*tile, start, stop) for tile, start, stop in request.work], dtype=torch.int64, device="cpu"
        )
        return self.keeping.marked(request, header, [table, q, k, v]) if self.keeping else (header, [table, q, k, v])

    def sent(self, request: Request) -> None:
        """The rank now holds what it was sent."""
        for tile, start, stop in request.work if self.resident else ():
            if stop > start:
                self.sequence.residency.advance(request.rank.key, self.layer, *tile[:3], stop)

    def merge(self, answer: Message, tiles: Sequence[Tile]) -> None:
        """Into the call's result."""
        self.result.add(answer, tiles)

    def arrived(self, request: Request, part: Part) -> None:
        """Counts what the rank did, beside what it was predicted to take."""
        counters, details = request.rank.counters, {"layer": self.layer, "queries": self.result.q.shape[2]}
        counters.calls += 1
        counters.compute_s += part.took_ns / 1e9
        spans: dict[str, float] = {**details, "tiles": len(request.work)}
        if self.decided.rank_cost is not None and not request.kept:
            predicted_s = share_s(self.decided.rank_cost, self.result.k.shape[1], request.tiles)
            counters.predicted_s += predicted_s
            spans["predicted_ms"] = predicted_s * 1e3
        began_ns = part.began_ns + request.rank.clock_offset
        self.manager.timeline.rank(request.rank.number, began_ns, part.took_ns, **spans)
        if self.keeping:
            self.keeping.arrived(request, part.kept)

    def lacks(self, request: Request, part: Part) -> bool:
        """A rank that no longer holds what it was to hold holds nothing; of a kept call it is asked once more."""
        if part.status == Status.STALE:
            request.rank.counters.stale += 1
            if not request.kept and all(one.key_start == 0 for one in request.work):
                self.sequence.full.add(request.rank.key)
            self.sequence.residency.forget(request.rank.key)
        return self.keeping is not None and self.keeping.lost(request) and part.status == Status.STALE

    def _held(self, rank: PoolRank) -> Callable[[Tile], int]:
        def held(tile: Tile) -> int:
            lanes = (tile.row, tile.head_start, tile.head_stop)
            return self.sequence.residency.held(rank.key, self.layer, *lanes) if self.resident else 0

        return held
