"""What one way of computing a forward takes: two clocks, the base's and the busiest pool rank's, played through.

A way is a number of ranks, blocks in flight and a part for the base. Lanes are cut as they really are, but anywhere
and not at multiples; bytes are also counted from real tiles, payloads only. Which way is best is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import NamedTuple

from fapool_plugin.plan.line import Piece, Row, line_pieces, partition
from fapool_plugin.plan.profile import AttentionCost, Profile
from fapool_plugin.plan.shares import SHORTEST_BLOCK, cut_rows, granule, new_columns


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


class _Sides(NamedTuple):
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
    _known: dict[int, _Sides] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def tokens(self) -> int:
        """New tokens of all rows."""
        return sum(row.q_stop - row.q_start for row in self.rows)

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
        mine, theirs = layers * way.base_share * side.base_s, layers * (1 - way.base_share) * side.ranks_s
        return linear + max(mine, theirs) if way.blocks == 1 else max(linear + mine, theirs)

    def play(self, way: Way) -> Played:
        """Both clocks through the forward.

        Blocks come strictly round robin, handing over at every attention call. For each the base waits for the reply
        of the layer before and merges it, computes what is linear, asks, and computes its own tiles; ranks answer in
        order. What a message costs its two ends in processor time keeps them from computing.
        """
        side, layers = self._sides(way.ranks), self.profile.shape.layers
        link, call = self.profile.link, self.profile.call
        works = [row.pairs for row in self.rows]
        *pieces, own = line_pieces(works, self.profile.shape.kv_heads, _parts(way, self.slowdown))
        speeds, cuts = _speeds(way.ranks, self.slowdown), cut_rows(self.rows, way.blocks)
        per_pair = [side.ranks_s * sum(speeds) / speed / sum(works) for speed in speeds]
        asking = merging = 0.0
        messages = []
        for mine in pieces:
            out, back = (nbytes / way.blocks for nbytes in self._bytes(mine, cuts))
            messages.append(_Message(asking + link.to_rank.at(out), link.take.at(out), link.send.at(back), back))
            if mine:
                asking += call.ask_s + link.send.at(out)
                merging += call.merge_s + link.take.at(back)
        linears, owns, pools = [], [], []
        for rows in cuts:
            tokens = sum(row.q_stop - row.q_start for row in rows) / self.tokens
            pairs = [row.pairs / self.profile.shape.kv_heads for row in rows]
            linears.append((side.block_s + (side.linear_s - side.block_s) * tokens) / layers)
            owns.append(
                asking + bool(own) * call.own_s + _seconds_of(own, pairs, side.base_call_s, side.base_s / sum(works))
            )
            pools.append([
                bool(mine) * call.rank_s + message.taking + _seconds_of(mine, pairs, side.rank_call_s, pair_s)
                for mine, pair_s, message in zip(pieces, per_pair, messages, strict=True)
            ])  # fmt: skip
        base, free, replies = 0.0, [0.0] * way.ranks, [0.0] * way.blocks
        merge = 0.0
        for _ in range(layers):
            for block, linear in enumerate(linears):
                posted = max(base, replies[block]) + merge + linear
                for rank, (message, busy) in enumerate(zip(messages, pools[block], strict=True)):
                    if not pieces[rank]:
                        continue
                    done = max(free[rank], posted + message.arrives) + busy
                    free[rank] = done + message.sending
                    replies[block] = max(replies[block], done + link.to_base.at(message.back))
                base = posted + owns[block]
            merge = merging
        for reply in replies:
            base = max(base, reply) + merging
        sending = [message.sending * way.blocks for message in messages]
        busiest = max(sum(block) + last for *block, last in zip(*pools, sending, strict=True))
        busy = layers * (sum(linears) + sum(owns) + way.blocks * merging)
        return Played(max(base, *free), busy, layers * busiest)

    def real_bytes(self, way: Way) -> tuple[int, int]:
        """Bytes of all layers to and from all ranks, of the tiles that :func:`partition` gives. Keys of the past
        count as not yet sent."""
        shape, queries = self.profile.shape, 0
        furthest: dict[tuple[int, int, int], int] = {}
        for rows in cut_rows(self.rows, way.blocks):
            block = granule(new_columns(rows), way.ranks + 1)
            shares = partition(rows, shape.kv_heads, _parts(way, self.slowdown), block=block, whole=self.rows)
            for rank, tile in ((rank, tile) for rank, share in enumerate(shares[:-1]) for tile in share):
                queries += (tile.q_stop - tile.q_start) * (tile.head_stop - tile.head_start)
                for head in range(tile.head_start, tile.head_stop):
                    lane = (rank, tile.row, head)
                    furthest[lane] = max(furthest.get(lane, 0), tile.k_stop)
        sent, received = _payload_bytes(self.profile, queries, sum(furthest.values()))
        return round(sent) * shape.layers, round(received) * shape.layers

    def _sides(self, ranks: int) -> _Sides:
        if ranks not in self._known:
            base, rank = _attention_costs(self.profile, self.cores, ranks)
            linear = self.profile.linear_for(self.cores.base(ranks)).prefill
            crowding = self.cores.crowding(ranks, self.profile.machine.cores)
            beside = crowding * (self.profile.beside if ranks and self.cores.per_rank else 1.0)
            self._known[ranks] = _Sides(
                linear.at(self.tokens) * beside,
                linear.a * beside,
                self._attention_s(base) * crowding,
                self._attention_s(rank) * crowding / sum(_speeds(ranks, self.slowdown)),
                base.prefill.a * crowding,
                rank.prefill.a * crowding,
            )
        return self._known[ranks]

    def _attention_s(self, cost: AttentionCost) -> float:
        """One layer's attention without the cost of a call, as :func:`cost.share_s` counts it."""
        fit = cost.prefill
        return max(0.0, (fit.b - fit.c) * self.tokens + 2 * fit.c * sum(row.pairs for row in self.rows))

    def _bytes(self, pieces: Sequence[Piece], cuts: Sequence[Sequence[Row]]) -> tuple[float, float]:
        """Bytes of one layer to and from a rank with these pieces, cut anywhere."""
        queries = keys = 0.0
        for piece in pieces:
            last = 0.0
            for block in cuts:
                last = _position_at(block[piece.row], piece.stop)
                queries += piece.lanes * (last - _position_at(block[piece.row], piece.start))
            keys += piece.lanes * last
        return _payload_bytes(self.profile, queries, keys)


@dataclass(frozen=True)
class Decode:
    """One decode step: a new token a sequence, ``lengths`` keys with it. Nothing overlaps: one block. Ranks sleep while
    the base computes what is linear; at an attention call all wake at once.

    ``held`` are keys that each rank holds, of all lanes together. What a share lacks is sent once for ``steps``
    steps; each is charged its part.
    """

    profile: Profile
    lengths: Sequence[int]
    cores: Cores
    held: Sequence[int]
    steps: int = 1
    slowdown: Sequence[float] = ()
    _known: dict[int, _Sides] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def alone_s(self) -> float:
        """Seconds of the base alone, with all its threads."""
        cost = self.profile.attention_for(self.cores.total)
        linear = self.profile.linear_for(self.cores.total).decode.at(len(self.lengths))
        calls = self.profile.call.own_s + len(self.lengths) * cost.decode.a
        return linear + self.profile.shape.layers * (calls + self._attention_s(cost))

    def ceiling_s(self, ranks: int) -> float:
        """Seconds without communication or cost of a call, and with both sides busy as long."""
        if ranks == 0:
            return self.alone_s
        side = self._sides(ranks)
        both = side.base_s + side.ranks_s
        return side.linear_s + (self.profile.shape.layers * side.base_s * side.ranks_s / both if both else 0.0)

    def bound_s(self, way: Way) -> float:
        """Seconds that this way takes at least; quickly known."""
        side, share = self._sides(way.ranks), way.base_share
        return side.linear_s + self.profile.shape.layers * max(share * side.base_s, (1 - share) * side.ranks_s)

    def play(self, way: Way) -> Played:
        """Both clocks through the step: the base asks, computes its own keys, and waits for the slowest reply."""
        side, layers = self._sides(way.ranks), self.profile.shape.layers
        link, call = self.profile.link, self.profile.call
        *pieces, own = self._pieces(way)
        asking = merging = slowest = busiest = 0.0
        for mine, missing in zip(pieces, self._missing(way), strict=True):
            if not mine:
                continue
            out, back = _payload_bytes(self.profile, sum(piece.lanes for piece in mine), missing / self.steps)
            work = call.rank_s + len(mine) * side.rank_call_s + (1 - way.base_share) * side.ranks_s
            slowest = max(slowest, asking + link.to_rank.at(out) + work + link.to_base.at(back) + call.away_s)
            busiest = max(busiest, link.take.at(out) + work + link.send.at(back))
            asking += call.ask_s + link.send.at(out)
            merging += call.merge_s + link.take.at(back)
        mine_s = bool(own) * call.own_s + len(own) * side.base_call_s + way.base_share * side.base_s
        step = max(asking + mine_s, slowest, busiest) + merging
        busy = asking + mine_s + merging
        return Played(side.linear_s + layers * step, side.linear_s + layers * busy, layers * busiest)

    def real_bytes(self, way: Way) -> tuple[int, int]:
        """Bytes of all layers to and from all ranks in this step, with all keys that are sent for later steps."""
        lanes = sum(piece.lanes for mine in self._pieces(way)[:-1] for piece in mine)
        sent, received = _payload_bytes(self.profile, lanes, sum(self._missing(way)))
        return round(sent) * self.profile.shape.layers, round(received) * self.profile.shape.layers

    def _pieces(self, way: Way) -> list[list[Piece]]:
        return line_pieces(self.lengths, self.profile.shape.kv_heads, _parts(way, self.slowdown))

    def _missing(self, way: Way) -> list[int]:
        keys = self.profile.shape.kv_heads * sum(self.lengths)
        parts = _parts(way, self.slowdown)[:-1]
        return [max(0, round(part * keys) - held) for part, held in zip(parts, self.held, strict=False)]

    def _sides(self, ranks: int) -> _Sides:
        if ranks not in self._known:
            # Ranks sleep while the base computes what is linear.
            crowding = self.cores.crowding(ranks, self.profile.machine.cores)
            base, rank = _attention_costs(self.profile, self.cores, ranks)
            linear = self.profile.linear_for(self.cores.base(ranks)).decode
            self._known[ranks] = _Sides(
                linear.at(len(self.lengths)),
                0.0,
                self._attention_s(base) * crowding,
                self._attention_s(rank) * crowding / sum(_speeds(ranks, self.slowdown)),
                base.decode.a * crowding,
                rank.decode.a * crowding,
            )
        return self._known[ranks]

    def _attention_s(self, cost: AttentionCost) -> float:
        """One layer's attention without the cost of a call."""
        return sum(cost.decode.at(keys) - cost.decode.a for keys in self.lengths)


def _attention_costs(profile: Profile, cores: Cores, ranks: int) -> tuple[AttentionCost, AttentionCost]:
    """What attention costs the base while it has ``ranks`` pool ranks, and one of them."""
    base = profile.attention_for(cores.base(ranks))
    return base, profile.attention_for(cores.per_rank) if cores.per_rank else base


def _speeds(ranks: int, slowdown: Sequence[float]) -> list[float]:
    """Each rank's speed; 1 is what the profile says."""
    return [1 / factor for factor in (*slowdown, *[1.0] * ranks)[:ranks]]


def _parts(way: Way, slowdown: Sequence[float]) -> list[float]:
    """Each rank's part of the work, and the base's, which is the last."""
    speeds = _speeds(way.ranks, slowdown)
    return [*((1 - way.base_share) * speed / sum(speeds) for speed in speeds), way.base_share]


def _payload_bytes(profile: Profile, queries: float, keys: float) -> tuple[float, float]:
    """Bytes to a rank (q, new k and v) and back (out, lse) for queries and keys counted in KV lanes."""
    shape = profile.shape
    heads, lse = queries * (shape.heads // shape.kv_heads), 8 if shape.dtype == "float64" else 4
    sent = (heads * shape.head_dim + keys * (shape.head_dim + shape.v_head_dim)) * shape.element_bytes
    return sent, heads * (shape.v_head_dim * shape.element_bytes + lse)


def _seconds_of(pieces: Sequence[Piece], pairs: Sequence[float], call_s: float, pair_s: float) -> float:
    """Seconds of one block's part of these pieces; ``pairs`` of each row, a part of them for each lane."""
    parts = ((pairs[piece.row], piece.lanes * (piece.stop - piece.start)) for piece in pieces)
    return sum(call_s + pair_s * row * part for row, part in parts if row)


def _position_at(row: Row, fraction: float) -> float:
    """Where a lane's work reaches this fraction."""
    if fraction in (0.0, 1.0):
        return row.q_stop if fraction else row.q_start
    return sqrt(row.q_start**2 + fraction * (row.q_stop**2 - row.q_start**2))
