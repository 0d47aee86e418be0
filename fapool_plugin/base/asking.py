"""What one attention call asks of pool ranks: its tiles, with the keys that each rank lacks.

What a plan asks of ranks depends on what they hold, and is the same in every layer of which they hold the same: it is
worked out once. Keeps the base's record of what ranks hold in step with what was sent and with what came back. Knows
the call's tensors and the sequence; nothing of how answers are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fapool_plugin.base.forward import Forward
from fapool_plugin.base.kept_calls import KeepingStep
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.owned import OwnedKeys
from fapool_plugin.base.requests import Part, Payload, Request
from fapool_plugin.base.residency import Held, alike_rows, grown
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.result import Result
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.base.trees import arrange, check_merged
from fapool_plugin.devices.copies import sendable
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.owners import Asked
from fapool_plugin.plan.profile import share_s
from fapool_plugin.plan.shares import Plan, TileWithKeys, within_residency
from fapool_plugin.wire.messages import Header, Message, Op, Status, dtype_code, elements, float_bits


@dataclass(frozen=True, eq=False)
class Work:
    """What one rank is asked in every layer of which it holds the same."""

    rank: PoolRank
    tiles: list[Tile]
    places: list[Tile]
    """Where their queries are taken from, and their results go."""
    table: Tensor
    keys: list[tuple[slice, slice, slice | Tensor]]
    """Where the new keys are that go with them."""
    after: Held | None
    """What the rank holds once it has them; None: it owns them."""
    starts_anew: bool
    """Whether all keys that it needs are among them."""
    predicted_s: float
    owner: int = -1
    """Its number among the owners of keys, if they have owners."""


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
    owned: OwnedKeys | None = None
    """The keys have owners, and only new ones are given."""

    def shared_out(self, plan: Plan) -> tuple[list[Request], list[Tile], list[Tile]]:
        """(what ranks are asked, what the base computes, the same in columns)."""
        residency = self.sequence.residency
        held = [residency.of(rank.key, self.layer) if self.resident else None for rank in plan.ranks]
        # Arrays are not written to, and kept beside what follows from them, so that no other has its id.
        key = self.resident, *map(id, held)
        if key not in plan.worked_out:
            plan.worked_out[key] = held, *self._worked_out(plan, held)
        _, works, own, columns = plan.worked_out[key]
        requests = [Request(work.rank, work.tiles, work) for work in works if not work.rank.lost]
        if lost := [tile for work in works if work.rank.lost for tile in work.tiles]:
            own, columns = own + lost, columns + self.result.in_columns(lost)
        if plan.axis == "keys":
            self._arrange(requests)
        return requests, own, columns

    def of_owners(self, owned: OwnedKeys) -> tuple[list[Request], list[Asked]]:
        """(what pool ranks are asked that own keys, what the base is)."""
        asked = owned.asked(self.result.geometry, self.layer, self.decided.first_row)
        if id(asked) not in owned.worked_out:
            cost, lanes = self.decided.rank_cost, self.result.k.shape[1]
            works = []
            for owner, (holder, share) in enumerate(zip(owned.holders, asked, strict=False)):
                tiles = [one.own.tile for one in share]
                works.append(
                    Work(
                        holder.rank,
                        tiles,
                        self.result.places([one.place for one in share]),
                        _table(one.own for one in share),
                        [self.result.new_keys(one.place, one.new) for one in share if one.new],
                        None,
                        False,
                        share_s(cost, lanes, tiles) if cost is not None else 0.0,
                        owner,
                    )
                )
            owned.worked_out[id(asked)] = works
        works = [work for work in owned.worked_out[id(asked)] if work.tiles]
        requests = [Request(owned.holders[work.owner].rank, work.tiles, work) for work in works]
        if self.result.q.shape[2] == 1 and not owned.owners.disjoint and not owned.peers:
            # What is missing of a tree's answer could not be asked of a peer.
            self._arrange(requests)
        return requests, asked[-1]

    def copy_to_peers(self, requests: list[Request], owned: OwnedKeys) -> None:
        """Sends new keys to the ranks that have copies."""
        for work in (request.notes for request in requests):
            peer = owned.peer(work.owner)
            if peer is None or not work.keys:
                continue
            k, v = [self.result.k[at] for at in work.keys], [self.result.v[at] for at in work.keys]
            table = work.table[work.table[:, 9] > work.table[:, 8]]  # tiles that new keys come with
            header = self._header._replace(op=Op.STORE, token=peer.rank.token, sequence=peer.sequence, tiles=len(table))
            with self.manager.guard(peer.rank):
                header = header._replace(k_elements=elements(k), v_elements=elements(v))
                link = peer.rank.link
                link.send(header, sendable(self.manager.copies, [table, k, v], link.carrier.takes))
                peer.rank.count_bytes()

    def _arrange(self, requests: list[Request]) -> None:
        """Has ranks merge results of the same queries; where queries are disjoint there is nothing to merge."""
        profile, result = self.manager.advisor.profile, self.result
        # Merged results travel as exactly as they are here.
        lane_bytes = result.q.shape[2] * result.group * (result.v.shape[3] + 1) * result.exact.itemsize
        link = profile.link if profile is not None else None
        arrange(requests, self.decided.config, link, lane_bytes, self.manager.guard)

    def message(self, request: Request) -> tuple[Header, Payload]:
        """Tiles with their queries, and the keys that the rank lacks."""
        result, work = self.result, request.notes
        q = result.queries(work.places)
        k, v = [result.k[at] for at in work.keys], [result.v[at] for at in work.keys]
        sizes = {"q_elements": elements(q), "k_elements": elements(k), "v_elements": elements(v)}
        header = self._header._replace(tiles=len(request.tiles), **sizes)
        if self.owned is not None:
            header = header._replace(sequence=self.owned.holders[work.owner].sequence)
        tensors: Payload = [work.table, q, k, v]
        return self.keeping.marked(request, header, tensors) if self.keeping else (header, tensors)

    def sent(self, request: Request) -> None:
        """The rank now holds what it was sent."""
        if self.resident:
            self.sequence.residency.hold(request.rank.key, self.layer, request.notes.after)

    def check(self, answer: Message, request: Request) -> None:
        """Lanes that were asked for, each once, and finite numbers."""
        asked = reported = request.tiles
        if answer.header.parts:
            asked, reported = check_merged(answer, request)
        if answer.tensors:
            self.result.check(answer)
            if self.manager.spot_check.is_due():
                self.manager.spot_check.attention(answer, self.result, asked, reported)

    def merge(self, answer: Message, request: Request) -> None:
        """Into the call's result."""
        self.result.add(answer, request.notes.places, self.manager.copies)

    def arrived(self, request: Request, part: Part) -> None:
        """Counts what the rank did, beside what it was predicted to take."""
        counters, details = request.rank.counters, {"layer": self.layer, "queries": self.result.q.shape[2]}
        counters.calls += 1
        counters.compute_s += part.took_ns / 1e9
        spans: dict[str, float] = {**details, "tiles": len(request.tiles)}
        if self.decided.rank_cost is not None and not request.kept:
            counters.predicted_s += request.notes.predicted_s
            spans["predicted_ms"] = request.notes.predicted_s * 1e3
        began_ns = part.began_ns + request.rank.clock_offset
        self.manager.timeline.rank(request.rank.number, began_ns, part.took_ns, **spans)
        if self.keeping:
            self.keeping.arrived(request, part.kept)

    def lacks(self, request: Request, part: Part) -> bool:
        """A rank that no longer holds what it was to hold holds nothing; of a kept call it is asked once more."""
        if self.owned is not None:
            who, alone = f"pool rank {request.rank.number}", self.manager.base_ranks == 1
            if part.status == Status.FULL:
                self.owned.fill_up(f"{who} has no room for more keys", at_once=alone)
            elif other := self.owned.instead_of(request.rank, request.notes.owner, self.manager.ranks):
                request.rank = other
                return True
            else:
                why = "does not hold what it owned" if part.status == Status.STALE else "did not answer"
                self.owned.give_up(f"{who} {why}", at_once=alone)
            return False
        if part.status in (Status.STALE, Status.FULL):
            request.rank.counters.stale += part.status == Status.STALE
            if part.status == Status.FULL or (not request.kept and request.notes.starts_anew):
                self.sequence.full.add(request.rank.key)
            self.sequence.residency.forget(request.rank.key)
        return self.keeping is not None and self.keeping.lost(request) and part.status == Status.STALE

    @cached_property
    def _header(self) -> Header:
        """What is alike in all requests."""
        result = self.result
        return Header(
            op=Op.ATTEND,
            sequence=self.sequence.id,
            layer=self.layer,
            keep=3 if self.owned is not None else int(self.resident),
            dtype=dtype_code(result.q.dtype),
            head_dim=result.k.shape[3],
            v_head_dim=result.v.shape[3],
            group=result.group,
            scale_bits=float_bits(result.softmax_scale),
            softcap_bits=float_bits(result.softcap),
        )

    def _worked_out(self, plan: Plan, held: list[Held | None]) -> tuple[list[Work], list[Tile], list[Tile]]:
        """What ranks are asked that hold this, and what the base computes."""
        result, works, mine = self.result, list[Work](), list(plan.base)
        for rank, share, prefix in zip(plan.ranks, plan.shares, held, strict=True):
            if not self.resident and plan.axis == "keys":
                if share:
                    self.decided.note("keys are not in the plugin's cache, and would be sent at every step", False)
                mine.extend(share)
                continue
            parts = [part for tile in share for part in alike_rows(prefix, tile)]
            work, left = within_residency(parts, plan.axis, self.manager.config.kv_block, self.sequence.capacity)
            mine.extend(left)
            if not work:
                continue
            tiles, sent = [one.tile for one in work], [one for one in work if one.key_stop > one.key_start]
            cost = self.decided.rank_cost
            works.append(
                Work(
                    rank,
                    tiles,
                    result.places(tiles),
                    _table(work),
                    [result.keys(*one[:3]) for one in sent],
                    grown(prefix, ((one.tile, one.key_stop) for one in sent)) if sent or prefix is None else prefix,
                    all(one.key_start == 0 for one in work),
                    share_s(cost, result.k.shape[1], tiles) if cost is not None else 0.0,
                )
            )
        return works, mine, result.in_columns(mine)


def _table(work: Iterable[TileWithKeys]) -> Tensor:
    """The tile table of a request."""
    return torch.tensor([(*tile, *keys) for tile, *keys in work], dtype=torch.int64, device="cpu")
