"""The base's half of one call's backward: who computed a tile computes its gradients, and the base sums them.

The same tiles as in forward: a tile gives dQ of its queries, and dK and dV of its keys, exact with the call's own
(out, LSE) (FlashAttention-2, Dao 2023, arXiv 2307.08691, section 3). What pool ranks did not keep since forward is sent
again, and whatever they do not answer is computed here. Autograd has a thread for each device: of a model on several,
calls ask and wait one at a time. Knows no autograd and no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.requests import Part, Payload, Request, Requests
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.devices.copies import brought
from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.observe.timeline import ATTENTION, LINEAR, SEND
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.shares import Geometry, gradient_layout
from fapool_plugin.wire.messages import Header, Message, Op, Status, dtype_code, elements, float_bits


class Saved(NamedTuple):
    """What forward leaves for backward; the outputs are final, with sinks folded in."""

    q_BHSD: Tensor
    k_BKTD: Tensor
    v_BKTE: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor
    sinks: bool = False
    """Whether there were any: outputs are not what ranks answered then."""


@dataclass
class Shares:
    """Who computed which tiles of one call in forward, and how."""

    manager: ResourceManager
    geometry: Geometry
    keeper: object
    """The lease lasts as long as this."""
    sequence: SequenceState
    layer: int
    softmax_scale: float
    softcap: float
    base: list[Tile] = field(default_factory=list)
    ranks: dict[int, list[Tile]] = field(default_factory=dict)
    """By rank number: leases come and go between forward and backward."""
    kept: dict[int, tuple[int, int]] = field(default_factory=dict)
    """For ranks that were to keep the call: (key of the rank in that lease, number of the call)."""

    def take_kept(self, rank: PoolRank) -> int:
        """The number of the call that the rank keeps, to be used once; 0 if it keeps none."""
        key, call = self.kept.get(rank.number, (0, 0))
        return call if key == rank.key and self.sequence.kept.take(key, call) else 0


class Gradients:
    """One call's backward: :meth:`post` asks and computes the base's part, :meth:`wait` completes it."""

    def __init__(self, shares: Shares, saved: Saved, dout_BSHE: Tensor) -> None:
        self.shares, self.saved, self.dout = shares, saved, dout_BSHE
        q, k, v = saved.q_BHSD, saved.k_BKTD, saved.v_BKTE
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.dq_BHSD, self.dk_BKTD, self.dv_BKTE = (x.new_zeros(x.shape, dtype=exact) for x in (q, k, v))
        self.group = q.shape[1] // k.shape[1]
        self.requests = Requests(shares.manager)

    def post(self) -> None:
        """Asks the pool ranks for the gradients of their tiles, and computes those of the base's."""
        with self.shares.manager.backwards:
            self._post()

    def _post(self) -> None:
        manager, mine, requests = self.shares.manager, list(self.shares.base), []
        held = manager.borrow(self.shares.geometry.longest, self.shares.sequence.id) if self.shares.ranks else []
        leased = {rank.number: rank for rank in held}
        if held:
            manager.threads.give_in_backward(len(held))
        manager.timeline.begin(manager.counters.backward)
        manager.timeline.switch(SEND)
        for number, tiles in self.shares.ranks.items():
            if number in leased:
                requests.append(Request(leased[number], tiles, kept=self.shares.take_kept(leased[number])))
            else:
                mine += tiles
        if self.requests.stage(self, requests):
            self._compute(mine)
            mine = []
            manager.timeline.switch(SEND)
        self._compute(mine + self.requests.post(self, requests))
        manager.timeline.end()

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) in the dtypes of q, k and v."""
        manager = self.shares.manager
        with manager.backwards:
            manager.timeline.begin(manager.counters.backward)
            pooled = self.requests.wait(self, self._compute)
            manager.timeline.end()
            manager.counters.backward.pooled_calls += pooled
            manager.counters.backward.local_calls += not pooled
        saved = self.saved
        return (
            self.dq_BHSD.to(saved.q_BHSD.dtype),
            self.dk_BKTD.to(saved.k_BKTD.dtype),
            self.dv_BKTE.to(saved.v_BKTE.dtype),
        )

    def message(self, request: Request) -> tuple[Header, Payload]:
        """Tiles with all that their gradients are made of, but what the rank keeps of the call."""
        q, k, v, out, lse, sinks = self.saved
        tiles, kept = request.tiles, request.kept
        keep = 0 if not kept else 1 if sinks else 2
        parts = [self._parts(tile) for tile in tiles]
        sent, own = parts if not keep else [], parts if keep < 2 else []
        qs = [q[rows, heads, queries] for rows, heads, _, queries, _ in sent]
        ks, vs = ([x[rows, lanes, keys] for rows, _, lanes, _, keys in sent] for x in (k, v))
        outs, lses = [out[at[0], at[3], at[1]] for at in own], [lse[at[0], at[1], at[3]] for at in own]
        douts = [self.dout[rows, queries, heads] for rows, heads, _, queries, _ in parts]
        header = Header(
            op=Op.BACKWARD,
            sequence=self.shares.sequence.id,
            layer=self.shares.layer,
            keep=keep,
            extra=kept,
            dtype=dtype_code(q.dtype),
            tiles=len(tiles),
            q_elements=elements(qs),
            k_elements=elements(ks),
            v_elements=elements(vs),
            lse_elements=elements(douts) // v.shape[3],
            head_dim=k.shape[3],
            v_head_dim=v.shape[3],
            group=self.group,
            scale_bits=float_bits(self.shares.softmax_scale),
            softcap_bits=float_bits(self.shares.softcap),
        )
        # All keys of a tile come with it.
        rows = [(*tile, tile.k_start, tile.k_stop, 0) for tile in tiles]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        return header, [table, qs, ks, vs, outs, lses, douts]

    def sent(self, request: Request) -> None:
        """Nothing stays on a rank."""

    def check(self, answer: Message, request: Request) -> None:
        """Gradients may be infinite: losses are scaled until they are."""
        spot_check = self.shares.manager.spot_check
        if answer.tensors and request.tiles and spot_check.is_due():
            q, k, v, out, lse, _ = self.saved
            shares, rest = self.shares, (self.dout, out, lse)
            spot_check.gradients(
                answer, (q, k, v), rest, shares.geometry, request.tiles, shares.softmax_scale, shares.softcap
            )

    def merge(self, answer: Message, request: Request) -> None:
        """Adds the gradients of its tiles."""
        dq, dk, dv = brought(self.shares.manager.copies, answer.tensors, self.dq_BHSD.device)
        head_dim, v_head_dim = self.dk_BKTD.shape[3], self.dv_BKTE.shape[3]
        for tile, dq_at, dk_at, dv_at in gradient_layout(request.tiles, self.group, head_dim, v_head_dim):
            rows, heads, lanes, queries, keys = self._parts(tile)
            for whole, part in (
                (self.dq_BHSD[rows, heads, queries], dq[dq_at]),
                (self.dk_BKTD[rows, lanes, keys], dk[dk_at]),
                (self.dv_BKTE[rows, lanes, keys], dv[dv_at]),
            ):
                whole += part.view(whole.shape)

    def arrived(self, request: Request, part: Part) -> None:
        """Counts what the rank did."""
        counters = request.rank.counters
        counters.calls += 1
        counters.reused_calls += request.kept > 0
        counters.compute_s += part.took_ns / 1e9
        began_ns = part.began_ns + request.rank.clock_offset
        self.shares.manager.timeline.rank(request.rank.number, began_ns, part.took_ns, layer=self.shares.layer)

    def lacks(self, request: Request, part: Part) -> bool:
        """A rank that does not keep the call any more is sent all of it."""
        was, request.kept = request.kept, 0
        return was > 0 and part.status == Status.STALE

    def _compute(self, tiles: Iterable[Tile]) -> None:
        self.shares.manager.timeline.switch(ATTENTION)
        q, k, v, out, lse, _ = self.saved
        for tile in tiles:
            rows, heads, lanes, queries, keys = self._parts(tile)
            dq, dk, dv = attend_backward(
                self.dout[rows, queries, heads],
                q[rows, heads, queries].transpose(1, 2),
                k[rows, lanes, keys].transpose(1, 2),
                v[rows, lanes, keys].transpose(1, 2),
                out[rows, queries, heads],
                lse[rows, heads, queries],
                softmax_scale=self.shares.softmax_scale,
                causal=True,
                q_offset=tile.q_start - tile.k_start,
                softcap=self.shares.softcap,
            )
            self.dq_BHSD[rows, heads, queries] += dq.transpose(1, 2)
            self.dk_BKTD[rows, lanes, keys] += dk.transpose(1, 2)
            self.dv_BKTE[rows, lanes, keys] += dv.transpose(1, 2)
        self.shares.manager.timeline.switch(LINEAR)

    def _parts(self, tile: Tile) -> tuple[slice, slice, slice, slice, slice]:
        """Rows, query heads, KV heads, queries and keys of a tile in the call's tensors."""
        geometry, lanes = self.shares.geometry, slice(tile.head_start, tile.head_stop)
        heads = slice(tile.head_start * self.group, tile.head_stop * self.group)
        keys = geometry.k_slice(tile, tile.k_start, tile.k_stop)
        return slice(tile.row_start, tile.row_stop), heads, lanes, geometry.q_slice(tile), keys
