"""What one way of computing a forward takes: two clocks, the base's and the busiest pool rank's, played through.

    on CPUs      base  linear | ask | own | linear ...       rank  take, compute | send | take, compute ...
    on devices   base  linear | own ...... | linear ...      rank  take, compute | take, compute ...
                 host         | ask ..| hands over           copy                | send ..|

On devices asking is the host's and goes on beside the own share, which is launched before, and answers are copied on a
stream of their own, in order: a third clock. The host launches the next block when both are done with this one's
messages; a rank launches one request beside the copy of the answer before it, and no more.

A way is a number of ranks, blocks in flight and a part for the base. Lanes are cut as they really are, but anywhere
and not at multiples; bytes are also counted from real tiles, payloads only. Which way is best is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fapool_plugin.plan.block import Block
from fapool_plugin.plan.line import FINEST_PART, Line, Row, partition
from fapool_plugin.plan.profile import AttentionCost, Profile
from fapool_plugin.plan.shares import SHORTEST_BLOCK, cut_positions, granule, new_columns

_SAME = 1e-9
"""Relative: steps of clocks that differ by less are alike."""


@dataclass(frozen=True)
class Cores:
    """How CPU threads move from the base to its ranks."""

    total: int
    """The base's without a lease."""
    per_rank: int = 1
    """Threads of each local pool rank; 0: ranks have devices of their own and nothing moves."""
    spare: int = 0
    """Cores that the base leaves idle anyway; ranks take those first."""

    def __post_init__(self) -> None:
        if self.total < 1 or self.per_rank < 0 or self.spare < 0:
            raise ValueError(
                f"{self.total} threads for the base, {self.per_rank} for each pool rank, {self.spare} spare cores; "
                "give at least 1, 0 and 0"
            )

    def base(self, ranks: int) -> int:
        """The base's threads while it has ``ranks`` pool ranks."""
        return max(1, self.total - max(0, ranks * self.per_rank - self.spare))

    def crowding(self, ranks: int, machine: int) -> float:
        """How much longer work takes where running threads are more than the ``machine`` has cores."""
        if ranks == 0 or self.per_rank == 0:
            return 1.0
        return max(1.0, (self.base(ranks) + ranks * self.per_rank) / max(machine, self.total))


class Way(NamedTuple):
    """How a forward could be computed."""

    ranks: int
    blocks: int
    base_share: float


class Played(NamedTuple):
    """What a way takes."""

    seconds: float
    base_busy_s: float
    pool_busy_s: float
    """The busiest rank's."""


class Sides(NamedTuple):
    """Costs while the base has so many ranks."""

    linear_s: float
    """The whole forward, in one block."""
    block_s: float
    """The part of it that each block costs again."""
    base_s: float
    """One layer's attention if the base computed all of it, without the cost of its calls."""
    ranks_s: float
    """The same for all ranks together, as if they were one."""
    base_call_s: float
    rank_call_s: float


class _Message(NamedTuple):
    """A request to one rank and its answer, in seconds."""

    arrives: float
    """After the base has come to asking."""
    taking: float
    sending: float
    back: float
    """Bytes of the answer."""


@dataclass(frozen=True)
class Prefill:
    """One prefill forward of causal rows; ``slowdown`` is measured over predicted seconds of each rank (default 1).

    Rows end at the same column, as left-padded ones do, and each block is cut at the same fractions.
    """

    profile: Profile
    rows: Sequence[Row]
    cores: Cores
    slowdown: Sequence[float] = ()
    _known: dict[int, Sides] = field(default_factory=dict, init=False, repr=False)
    _cut: dict[int, list[Block]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def line(self) -> Line:
        return Line(self.rows, self.profile.shape.kv_heads)

    @cached_property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum((row.q_stop - row.q_start) * row.alike for row in self.rows)

    @cached_property
    def alone_s(self) -> float:
        """Seconds of the base alone, with all its threads."""
        cost = self.profile.attention_for(self.cores.total)
        linear = self.profile.linear_for(self.cores.total).prefill.at(self.tokens)
        return linear + self.profile.shape.layers * (len(self.rows) * cost.prefill.a + self._attention_s(cost))

    def block_counts(self, most: int) -> list[int]:
        """How many blocks there may be, up to ``most``, if none is to be short."""
        return list(range(1, max(1, min(most, new_columns(self.rows) // SHORTEST_BLOCK)) + 1))

    def ceiling_s(self, ranks: int) -> float:
        """Seconds without communication, waiting or cost of a call; both sides busy to the end if they can be."""
        if ranks == 0:
            return self.alone_s
        side, layers = self._sides(ranks), self.profile.shape.layers
        both = layers * (side.base_s + side.ranks_s)
        balanced = max(0.0, layers * side.ranks_s - side.linear_s) / both if both else 0.0
        return side.linear_s + balanced * layers * side.base_s

    def bound_s(self, way: Way) -> float:
        """Seconds that this way takes at least; quickly known."""
        side, layers = self._sides(way.ranks), self.profile.shape.layers
        linear = side.linear_s + (way.blocks - 1) * side.block_s
        # Cuts between lanes may move so much from one side to the other.
        moved = FINEST_PART / (way.ranks + 1)
        mine = layers * max(0.0, way.base_share - moved) * side.base_s
        theirs = layers * max(0.0, 1 - way.base_share - moved) * side.ranks_s
        asking, merging = (layers * way.blocks * seconds for seconds in self._messages_s(way))
        mine = beside_own(asking, mine, on_devices=self.profile.on_devices)
        if way.blocks == 1:
            return linear + merging + max(mine, theirs)
        return max(linear + mine + merging, theirs)

    def play(self, way: Way) -> Played:
        """Both clocks through the forward.

        Blocks come strictly round robin, handing over at every attention call. For each the base waits for the reply
        of the layer before and merges it, computes what is linear, asks, and computes its own tiles; ranks answer in
        order. What a message costs its two ends in processor time keeps them from computing.
        """
        side, layers = self._sides(way.ranks), self.profile.shape.layers
        link, call = self.profile.link, self.profile.call
        *pieces, own = self.line.pieces(parts_of(way, self.slowdown))
        speeds, cuts = rank_speeds(way.ranks, self.slowdown), self._blocks(way.blocks)
        per_pair = [side.ranks_s * sum(speeds) / speed / self.line.work for speed in speeds]
        asking = merging = 0.0
        messages = []
        for mine in pieces:
            # Keys are sent once, by the last block that needs them.
            moved = sum(block.queries(mine) for block in cuts), cuts[-1].keys(mine)
            out, back = (nbytes / way.blocks for nbytes in payload_bytes(self.profile, *moved))
            messages.append(_Message(asking + link.to_rank.at(out), link.take.at(out), link.send.at(back), back))
            if mine:
                asking += call.ask_s + link.send.at(out)
                merging += call.merge_s + link.take.at(back)
        linears, owns, pools = [], [], []
        for block in cuts:
            linears.append((side.block_s + (side.linear_s - side.block_s) * block.tokens / self.tokens) / layers)
            mine_s = block.calls(own) * side.base_call_s + block.pairs(own) * side.base_s / self.line.work
            owns.append(beside_own(asking, bool(own) * call.own_s + mine_s, on_devices=self.profile.on_devices))
            pools.append([
                bool(mine) * call.rank_s + message.taking
                + block.calls(mine) * side.rank_call_s + block.pairs(mine) * pair_s
                for mine, pair_s, message in zip(pieces, per_pair, messages, strict=True)
            ])  # fmt: skip
        base, free, replies = 0.0, [0.0] * way.ranks, [0.0] * way.blocks
        left = [0.0] * way.ranks  # when each rank's last answer was copied
        merge, at_hand = 0.0, [rank for rank, mine in enumerate(pieces) if mine]
        before: list[float] = []
        for layer in range(layers):
            for turn, linear in enumerate(linears):
                posted = max(base, replies[turn]) + merge + linear
                for rank in at_hand:
                    message, busy = messages[rank], pools[turn][rank]
                    leaves = max(max(free[rank], posted + message.arrives) + busy, left[rank])
                    left[rank] = leaves + message.sending
                    free[rank] = leaves if self.profile.on_devices else left[rank]
                    replies[turn] = max(replies[turn], leaves + link.to_base.at(message.back))
                base = posted + owns[turn]
            merge = merging
            clocks = [base, *(x[rank] for x in (free, left) for rank in at_hand), *(replies if at_hand else ())]
            steps = [now - then for now, then in zip(clocks, before, strict=False)]
            if steps and max(steps) - min(steps) <= _SAME * max(steps):
                # All clocks go on by as much: so they do in every layer that is left.
                rest = (layers - 1 - layer) * steps[0]
                base += rest
                left, replies = [x + rest for x in left], [x + rest for x in replies]
                break
            before = clocks
        for reply in replies:
            base = max(base, reply) + merging
        # Beside what a device computes.
        sending = [0.0 if self.profile.on_devices else message.sending * way.blocks for message in messages]
        busiest = max(sum(block) + last for *block, last in zip(*pools, sending, strict=True))
        busy = layers * (sum(linears) + sum(owns) + way.blocks * merging)
        return Played(max(base, *left), busy, layers * busiest)

    def real_bytes(self, way: Way) -> tuple[int, int]:
        """Bytes of all layers to and from all ranks, of the tiles that :func:`partition` gives. Keys of the past
        count as not yet sent."""
        shape, queries = self.profile.shape, 0
        furthest = np.zeros((way.ranks, sum(row.alike for row in self.rows), shape.kv_heads), dtype=np.int64)
        edges = cut_positions(self.rows, way.blocks).tolist()
        for starts, stops in pairwise(edges):
            rows = [Row(a, b, b, row.alike) for row, a, b in zip(self.rows, starts, stops, strict=True)]
            block = granule(new_columns(rows), way.ranks + 1)
            shares = partition(rows, shape.kv_heads, parts_of(way, self.slowdown), block=block, whole=self.rows)
            for rank, tile in ((rank, tile) for rank, share in enumerate(shares[:-1]) for tile in share):
                queries += (tile.q_stop - tile.q_start) * tile.lanes
                lanes = furthest[rank, tile.row_start : tile.row_stop, tile.head_start : tile.head_stop]
                np.maximum(lanes, tile.k_stop, out=lanes)
        sent, received = payload_bytes(self.profile, queries, int(furthest.sum()))
        return round(sent) * shape.layers, round(received) * shape.layers

    def _messages_s(self, way: Way) -> tuple[float, float]:
        """What asking and merging cost the base at least in one block of one layer, beside their bytes."""
        call, link = self.profile.call, self.profile.link
        # Equal ranks that have half of the work or more have no empty share; of others nothing is known.
        ranks = way.ranks if way.base_share <= 0.5 and not self.slowdown else 0
        return ranks * (call.ask_s + link.send.a), ranks * (call.merge_s + link.take.a)

    def _sides(self, ranks: int) -> Sides:
        if ranks not in self._known:
            base, rank = attention_costs(self.profile, self.cores, ranks)
            linear = self.profile.linear_for(self.cores.base(ranks)).prefill
            crowding = self.cores.crowding(ranks, self.profile.machine.cores)
            beside = crowding * (self.profile.beside if ranks and self.cores.per_rank else 1.0)
            self._known[ranks] = Sides(
                linear.at(self.tokens) * beside,
                linear.a * beside,
                self._attention_s(base) * crowding,
                self._attention_s(rank) * crowding / sum(rank_speeds(ranks, self.slowdown)),
                base.prefill.a * crowding,
                rank.prefill.a * crowding,
            )
        return self._known[ranks]

    def _attention_s(self, cost: AttentionCost) -> float:
        """One layer's attention without the cost of a call, as :func:`cost.share_s` counts it."""
        fit = cost.prefill
        pairs = self.line.work / self.profile.shape.kv_heads
        return max(0.0, (fit.b - fit.c) * self.tokens + 2 * fit.c * pairs)

    def _blocks(self, count: int) -> list[Block]:
        if count not in self._cut:
            edges, alike = cut_positions(self.rows, count), np.array([row.alike for row in self.rows])
            heads = self.profile.shape.kv_heads
            self._cut[count] = [Block(first, last, alike, heads) for first, last in pairwise(edges)]
        return self._cut[count]


def attention_costs(profile: Profile, cores: Cores, ranks: int) -> tuple[AttentionCost, AttentionCost]:
    """What attention costs the base while it has ``ranks`` pool ranks, and one of them."""
    base = profile.attention_for(cores.base(ranks))
    return base, profile.attention_for(cores.per_rank) if cores.per_rank else base


def beside_own(asking_s: float, own_s: float, *, on_devices: bool) -> float:
    """Seconds from asking ranks to having computed the own share."""
    return max(asking_s, own_s) if on_devices else asking_s + own_s


def rank_speeds(ranks: int, slowdown: Sequence[float]) -> list[float]:
    """Each rank's speed; 1 is what the profile says."""
    return [1 / factor for factor in (*slowdown, *[1.0] * ranks)[:ranks]]


def parts_of(way: Way, slowdown: Sequence[float]) -> list[float]:
    """Each rank's part of the work, and the base's, which is the last."""
    speeds = rank_speeds(way.ranks, slowdown)
    return [*((1 - way.base_share) * speed / sum(speeds) for speed in speeds), way.base_share]


def payload_bytes(profile: Profile, queries: float, keys: float) -> tuple[float, float]:
    """Bytes to a rank (q, new k and v) and back (out, lse) for queries and keys counted in KV lanes."""
    shape = profile.shape
    heads, lse = queries * (shape.heads // shape.kv_heads), 8 if shape.dtype == "float64" else 4
    sent = (heads * shape.head_dim + keys * (shape.head_dim + shape.v_head_dim)) * shape.element_bytes
    return sent, heads * (shape.v_head_dim * shape.element_bytes + lse)
