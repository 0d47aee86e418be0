"""The base's half of one attention call: share out the tiles, compute its own, gather the rest, merge.

Pool ranks may pass keys on to each other and merge each other's results; whatever they do not deliver is computed
here, so a call always returns the exact result. Knows no model framework; how a forward was decided is given to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fapool_plugin.base.autograd import with_gradients, without_autocast
from fapool_plugin.base.forward import Forward
from fapool_plugin.base.gradients import Shares
from fapool_plugin.base.joint import Asked, Part, Sizes, answers, arrange, distribute, part_ways, told
from fapool_plugin.base.kept_calls import fingerprint
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.kernels.forward import attend, fold_sinks, merge_
from fapool_plugin.observe.timeline import ATTENTION, LINEAR, MERGE, SEND, WAIT
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import share_s
from fapool_plugin.plan.shares import in_batches, within_residency
from fapool_plugin.plan.trees import Lanes, layout
from fapool_plugin.wire.messages import Header, Op, Status, dtype_code, elements, float_bits


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
        if local is not None:
            decided.counters.phase(decided.phase).local_calls += 1
            return local()
        call = _Call(self, decided, q_BHSD, k_BKTD, v_BKTE, resident, softmax_scale, softcap)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHSD, k_BKTD, v_BKTE)):
            return with_gradients(call, sinks_H)
        with without_autocast(q_BHSD):
            call.post()
        if decided.hand_over is not None:
            decided.hand_over()
        with without_autocast(q_BHSD):
            return call.finish(sinks_H)[0]


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
        if self.keep:
            self.sequence.send_as(self.layer, k_BKTD.dtype, v_BKTE.dtype)
        # Without gradients now they may come yet, by checkpointing; with them, only where they are asked for.
        wanted = not torch.is_grad_enabled() or any(x.requires_grad for x in (q_BHSD, k_BKTD, v_BKTE))
        self.whole = decided.keeps_calls and wanted and not self.keep
        # Only whoever does not take turns can be called once more.
        self._bits = fingerprint(q_BHSD, k_BKTD, v_BKTE) if self.whole and decided.hand_over is None else b""
        self.scale, self.softcap = softmax_scale, softcap
        batch, heads, queries, _ = q_BHSD.shape
        self.group = heads // k_BKTD.shape[1]
        exact = torch.float64 if q_BHSD.dtype == torch.float64 else torch.float32
        self.out_BSHE = q_BHSD.new_zeros((batch, queries, heads, v_BKTE.shape[3]), dtype=exact)
        self.lse_BHS = q_BHSD.new_full((batch, heads, queries), -torch.inf, dtype=exact)
        self._asked: list[Asked] = []
        self._mine: list[Tile] = []
        self._timeline = module.manager.timeline
        self._sizes = Sizes(
            # Merged results travel as exactly as they are here.
            answer=queries * self.group * (v_BKTE.shape[3] + 1) * self.out_BSHE.element_size(),
            query=self.group * q_BHSD.shape[3] * q_BHSD.element_size(),
            position=(k_BKTD.shape[3] + v_BKTE.shape[3]) * k_BKTD.element_size(),
            layers=module.layers,
        )
        profile = module.manager.advisor.profile
        self._link = profile.link if profile is not None else None

    def post(self) -> None:
        """Asks the pool ranks for their shares, and computes the base's."""
        self._timeline.switch(SEND)
        plan = self.decided.plan(self.k.shape[1], self._sizes.position, self.layers)
        self._disjoint = plan.axis == "queries"
        mine = list(plan.base)
        for rank, share in zip(plan.ranks, plan.shares, strict=True):
            if rank.lost or (not self.keep and plan.axis == "keys"):
                if share and not self.keep:
                    self.decided.note("keys are not in the plugin's cache, and would be sent at every step", False)
                mine.extend(share)
                continue
            requests, left = within_residency(share, self._held(rank), plan.axis, self.manager.config.kv_block)
            mine.extend(left)
            if requests:
                self._asked.append(Asked(rank, requests))
        # Queries are disjoint, so there is nothing to merge; along the keys, ranks work on what they hold.
        if self._disjoint:
            mine.extend(self._distribute())
        else:
            weigh = answers(self._sizes.answer)
            arrange(self._asked, self.decided.config, self._link, weigh, self.manager.guard)
        for one in self._asked:
            self._ask(one)
            if one.call is None and one.above is None:
                mine.extend(one.tiles)
        self._mine = mine
        self._compute(mine)
        self._timeline.switch(LINEAR)

    def finish(self, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
        """(out, lse) with the pool ranks' parts and with sinks; out contiguous, in q's dtype."""
        gathered = [self._gather(one) for one in self._asked if one.above is None and one.call is not None]
        pooled = any(gathered)
        self._timeline.switch(LINEAR)
        counters = self.decided.counters.phase(self.decided.phase)
        counters.pooled_calls += pooled
        counters.local_calls += not pooled
        out, lse = self.out_BSHE, self.lse_BHS
        if sinks_H is not None:
            out, lse = fold_sinks(out, lse, sinks_H)
        return out.to(self.q.dtype).contiguous(), lse

    def shares(self) -> Shares:
        """Who was asked for what, for the call's backward."""
        ranks = {one.rank.number: one.tiles for one in self._asked if one.call is not None}
        kept = {one.rank.number: (one.rank.key, one.kept) for one in self._asked if one.kept}
        return Shares(
            self.manager, self.geometry, self.decided.keeper, self.sequence, self.layer, self.scale, self.softcap,
            self._mine, ranks, kept,
        )  # fmt: skip

    def _held(self, rank: PoolRank) -> Callable[[Tile], int]:
        def held(tile: Tile) -> int:
            if not self.keep:
                return 0
            lanes = (tile.row, tile.head_start, tile.head_stop)
            return self.sequence.residency.held(rank.key, self.layer, *lanes)

        return held

    def _distribute(self) -> list[Tile]:
        """Sends keys from rank to rank, if that is the way to do it. Returns the tiles of ranks that are not asked
        after all, because one of them was lost meanwhile."""
        whole, guard = self.decided.whole, self.manager.guard
        blocks = -(-whole.columns // self.q.shape[2]) if whole is not None else 1
        ways = distribute(self._asked, self.decided.config, self._link, self._sizes, blocks, guard) if self.keep else []
        for ranks, lanes in ways:
            self._give(ranks, lanes)
        together = [one for one in self._asked if one.awaits]
        if not any(one.rank.lost for one in together):
            return []
        part_ways(together)
        for one in together:
            self.sequence.residency.forget(one.rank.key)
        self._asked = [one for one in self._asked if not one.awaits]
        return [tile for one in together for tile in one.tiles]

    def _give(self, ranks: list[Asked], lanes: Sequence[Lanes]) -> None:
        """Sends keys to the first of these ranks, which passes them on."""
        first, *others = ranks
        table = [(part.row, part.head_start, part.head_stop, 0, 0, 0, 0, part.start, part.stop) for part in lanes]
        header, tensors = self._message(table, [], [(part, part.start, part.stop) for part in lanes])
        numbers = [torch.tensor([one.rank.number for one in others])] if others else []
        with self.manager.guard(first.rank):
            first.rank.give(header._replace(joint=first.joint, peers=len(others)), [*tensors, *numbers])
        for one in ranks:
            one.awaits += 1
            one.requests = [request._replace(key_start=request.key_stop) for request in one.requests]
            for part in lanes:
                self.sequence.residency.advance(one.rank.key, self.layer, *part[:3], part.stop)

    def _ask(self, one: Asked) -> None:
        """Sends one rank its tiles with the keys it lacks; leaves ``one.call`` at None if the rank is lost."""
        table = [(*request.tile, request.key_start, request.key_stop) for request in one.requests]
        header, tensors = self._message(table, one.tiles, one.requests)
        header = header._replace(op=Op.ATTEND)
        if self.whole:
            one.kept, replaced = self.sequence.kept.again(one.rank.key, self.layer, one.tiles, self._bits)
            header = header._replace(keep=2, extra=one.kept or replaced)
        if one.kept:
            header, tensors = header._replace(tiles=0, q_elements=0, k_elements=0, v_elements=0), [[], [], [], []]
        with self.manager.guard(one.rank):
            one.call = one.rank.ask(*one.joined(header, tensors))
            if self.keep:
                for tile, start, stop in one.requests:
                    if stop > start:
                        self.sequence.residency.advance(one.rank.key, self.layer, *tile[:3], stop)

    def _message(
        self, table: Sequence[tuple[int, ...]], tiles: list[Tile], keys: Sequence[tuple[Tile | Lanes, int, int]]
    ) -> tuple[Header, list[Tensor | list[Tensor]]]:
        """A tile table with the tiles' queries and these keys of these lanes."""
        q = [self._queries(tile) for tile in tiles]
        k, v = ([self._keys(x, lanes, start, stop) for lanes, start, stop in keys] for x in (self.k, self.v))
        header = Header(
            sequence=self.sequence.id,
            layer=self.layer,
            keep=int(self.keep),
            dtype=dtype_code(self.q.dtype),
            tiles=len(table),
            q_elements=elements(q),
            k_elements=elements(k),
            v_elements=elements(v),
            head_dim=self.k.shape[3],
            v_head_dim=self.v.shape[3],
            group=self.group,
            capacity=self.sequence.capacity,
            scale_bits=float_bits(self.scale),
            softcap_bits=float_bits(self.softcap),
        )
        return header, [torch.tensor(table, dtype=torch.int64), q, k, v]

    def _gather(self, asked: Asked) -> bool:
        """Merges one answer, and computes here what is not in it: parts of ranks that are lost, or no longer hold
        their keys."""
        answer = None
        self._timeline.switch(WAIT)
        with self.manager.guard(asked.rank):
            answer = asked.rank.answer(asked.call or 0)
        self._timeline.switch(MERGE)
        parts, tiles = told(answer, asked.rank.number), asked.tiles
        if answer is not None and answer.tensors:
            if answer.header.parts:
                tiles = [Tile(*row[:7]) for row in answer.tensors[2].tolist()]
            out, lse = (tensor.to(self.q.device) for tensor in answer.tensors[:2])
            for tile, outs, lses in layout(tiles, self.group, self.v.shape[3]):
                heads = (tile.head_stop - tile.head_start) * self.group
                part = out[outs].view(1, -1, heads, self.v.shape[3])
                self._merge(tile, part, lse[lses].view(1, heads, -1))
        everyone = asked.all()
        missing = [one for one in everyone if not self._note(one, parts.get(one.rank.number, Part()))]
        self._compute(chain.from_iterable(one.tiles for one in missing))
        return len(missing) < len(everyone)

    def _note(self, one: Asked, part: Part) -> bool:
        """Draws conclusions from how one rank's part came; whether its result is there."""
        with self.manager.guard(one.rank):
            if part.status == Status.MISSING:
                one.rank.check()
            elif one.call is not None:
                one.rank.answered(one.call)
        if part.status == Status.OK:
            self._count(one, part)
            if self.whole:
                self._note_kept(one, part.kept)
            return True
        held_nothing = not (one.awaits or one.kept) and all(request.key_start == 0 for request in one.requests)
        if part.status == Status.STALE:
            one.rank.counters.stale += 1
            if held_nothing:
                self.sequence.full.add(one.rank.key)
        if part.status == Status.MISSING or one.awaits:
            part_ways(self._asked)
        if part.status == Status.STALE or one.awaits:
            self.sequence.residency.forget(one.rank.key)
        self.sequence.kept.take(one.rank.key, one.kept)
        one.kept = 0
        return False

    def _note_kept(self, one: Asked, kept: bool) -> None:
        """Records whether the rank keeps this call."""
        one.rank.counters.reused_calls += one.kept > 0
        if not one.kept and kept and one.call is not None:
            one.kept = one.call
            self.sequence.kept.add(one.rank.key, one.call, self.layer, one.tiles, self._bits)
            one.rank.counters.kept_calls += 1
        one.rank.counters.unkept_calls += not one.kept

    def _count(self, one: Asked, part: Part) -> None:
        one.rank.counters.calls += 1
        one.rank.counters.compute_s += part.took_ns / 1e9
        details: dict[str, float] = {"layer": self.layer, "queries": self.q.shape[2], "tiles": len(one.tiles)}
        if self.decided.rank_cost is not None and not one.kept:
            predicted_s = share_s(self.decided.rank_cost, self.k.shape[1], one.tiles)
            one.rank.counters.predicted_s += predicted_s
            details["predicted_ms"] = predicted_s * 1e3
        self._timeline.rank(one.rank.number, part.began_ns + one.rank.clock_offset, part.took_ns, **details)

    def _compute(self, tiles: Iterable[Tile]) -> None:
        self._timeline.switch(ATTENTION)
        for tile, rows in in_batches(tiles, self.geometry):
            batch, keys = slice(tile.row, tile.row + rows), self.geometry.k_slice(tile.row, tile.k_start, tile.k_stop)
            lanes = slice(tile.head_start, tile.head_stop)
            heads, queries = self._heads(tile), self.geometry.q_slice(tile)
            out, lse = attend(
                self.q[batch, heads, queries].transpose(1, 2),
                self.k[batch, lanes, keys].transpose(1, 2),
                self.v[batch, lanes, keys].transpose(1, 2),
                softmax_scale=self.scale,
                causal=True,
                q_offset=tile.q_start - tile.k_start,
                softcap=self.softcap,
            )
            self._merge(tile, out, lse)

    def _merge(self, tile: Tile, out_BSHE: Tensor, lse_BHS: Tensor) -> None:
        """Takes a part of rows from the tile's on."""
        rows, queries = slice(tile.row, tile.row + out_BSHE.shape[0]), self.geometry.q_slice(tile)
        heads = self._heads(tile)
        if self._disjoint:
            self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries] = out_BSHE, lse_BHS
        else:
            merge_(self.out_BSHE[rows, queries, heads], self.lse_BHS[rows, heads, queries], out_BSHE, lse_BHS)

    def _heads(self, tile: Tile) -> slice:
        return slice(tile.head_start * self.group, tile.head_stop * self.group)

    def _queries(self, tile: Tile) -> Tensor:
        return self.q[tile.row, self._heads(tile), self.geometry.q_slice(tile)]

    def _keys(self, kv_BKTD: Tensor, lanes: Tile | Lanes, start: int, stop: int) -> Tensor:
        return kv_BKTD[lanes.row, lanes.head_start : lanes.head_stop, self.geometry.k_slice(lanes.row, start, stop)]
