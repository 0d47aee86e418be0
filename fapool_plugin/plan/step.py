"""A decode step, played with two clocks: as a whole, and as parts of its batch in turns.

    whole  base   linear | ask, own ──│ merge, linear ...
           ranks              ────────│
    turns  base   linear a | ask a, own a | linear b | ask b, own b | merge a, linear a ...
           ranks                 a ──────────────────│  b ──────────────────│

In turns the base computes what is linear for one part while ranks attend for another. That pays where a part is large
enough to use the base well: what is bound by reading weights reads them for each part. On devices asking is the host's,
beside the own share, and answers leave one after the other beside what is computed (`clocks`). Knows numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fapool_plugin.plan.block import Block
from fapool_plugin.plan.clocks import (
    Cores,
    Played,
    Sides,
    Way,
    attention_costs,
    beside_own,
    parts_of,
    payload_bytes,
    rank_speeds,
)
from fapool_plugin.plan.line import Line, Piece, Row, Runs
from fapool_plugin.plan.profile import AttentionCost, Profile


class Layer(NamedTuple):
    """Seconds of one layer of a decode step, or of a pass of training."""

    linear_s: float
    asking_s: float
    own_s: float
    """The base's own keys."""
    away_s: float
    """From the last request to the last answer."""
    rank_s: float
    """The busiest rank works so long."""
    leaving_s: float
    """An answer is copied so long beside that; 0 where that is the rank's own work."""
    merging_s: float


@dataclass(frozen=True)
class Decode:
    """One decode step: one new token for each sequence of ``rows``. Nothing overlaps: one block. Ranks sleep while
    the base computes what is linear; at an attention call all wake at once.

    ``held`` are keys that each rank holds, of all lanes together. What a share lacks is sent once for ``steps``
    steps; each is charged its part.
    """

    profile: Profile
    rows: Sequence[Row]
    cores: Cores
    held: Sequence[int]
    steps: int = 1
    slowdown: Sequence[float] = ()
    _known: dict[int, Sides] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def line(self) -> Line:
        return Line(self.rows, self.profile.shape.kv_heads)

    @cached_property
    def _keys(self) -> tuple[int, int]:
        """Of all rows, and their squares."""
        return sum(row.keys * row.alike for row in self.rows), sum(row.keys**2 * row.alike for row in self.rows)

    @cached_property
    def _block(self) -> Block:
        first, last, alike = np.array([(row.q_start, row.q_stop, row.alike) for row in self.rows]).T
        return Block(first, last, alike, self.profile.shape.kv_heads)

    @cached_property
    def alone_s(self) -> float:
        """Seconds of the base alone, with all its threads."""
        cost = self.profile.attention_for(self.cores.total)
        linear = self.profile.linear_for(self.cores.total).decode.at(self._block.tokens)
        calls = self.profile.call.own_s + len(self.rows) * cost.decode.a
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
        side, layers, one = self._sides(way.ranks), self.profile.shape.layers, self.layer(way)
        mine = beside_own(one.asking_s, one.own_s, on_devices=self.profile.on_devices)
        step = max(mine, one.asking_s + one.away_s, one.rank_s) + one.merging_s
        busy = mine + one.merging_s
        return Played(side.linear_s + layers * step, side.linear_s + layers * busy, layers * one.rank_s)

    def layer(self, way: Way) -> Layer:
        """What one layer takes of whom."""
        side, link, call = self._sides(way.ranks), self.profile.link, self.profile.call
        *pieces, own = self._pieces(way)
        asking = merging = slowest = busiest = leaving = 0.0
        for mine, missing in zip(pieces, self._missing(way), strict=True):
            if not mine:
                continue
            out, back = payload_bytes(self.profile, self._block.lanes(mine), missing / self.steps)
            work = call.rank_s + self._block.calls(mine) * side.rank_call_s + (1 - way.base_share) * side.ranks_s
            slowest = max(slowest, asking + link.to_rank.at(out) + work + link.to_base.at(back) + call.away_s)
            sending = link.send.at(back)
            if self.profile.on_devices:
                leaving, sending = max(leaving, sending), 0.0
            busiest = max(busiest, link.take.at(out) + work + sending)
            asking += call.ask_s + link.send.at(out)
            merging += call.merge_s + link.take.at(back)
        mine_s = bool(own) * call.own_s + self._block.calls(own) * side.base_call_s + way.base_share * side.base_s
        linear = side.linear_s / self.profile.shape.layers
        return Layer(linear, asking, mine_s, slowest - asking, busiest, leaving, merging)

    def _pieces(self, way: Way) -> list[list[Piece | Runs]]:
        return self.line.pieces(parts_of(way, self.slowdown))

    def _missing(self, way: Way) -> list[int]:
        keys = self.line.work
        parts = parts_of(way, self.slowdown)[:-1]
        return [max(0, round(part * keys) - held) for part, held in zip(parts, self.held, strict=False)]

    def _sides(self, ranks: int) -> Sides:
        if ranks not in self._known:
            # Ranks sleep while the base computes what is linear.
            crowding = self.cores.crowding(ranks, self.profile.machine.cores)
            base, rank = attention_costs(self.profile, self.cores, ranks)
            linear = self.profile.linear_for(self.cores.base(ranks)).decode
            self._known[ranks] = Sides(
                linear.at(self._block.tokens),
                0.0,
                self._attention_s(base) * crowding,
                self._attention_s(rank) * crowding / sum(rank_speeds(ranks, self.slowdown)),
                base.decode.a * crowding,
                rank.decode.a * crowding,
            )
        return self._known[ranks]

    def _attention_s(self, cost: AttentionCost) -> float:
        """One layer's attention without the cost of a call."""
        keys, squares = self._keys
        return cost.decode.b * keys + cost.decode.c * squares


def turns_s(parts: Sequence[Decode], way: Way) -> float:
    """Seconds of a step in these parts, one after the other in each layer."""
    profile = parts[0].profile
    return alternate_s([part.layer(way) for part in parts], profile.shape.layers, on_devices=profile.on_devices)


def alternate_s(layers: Sequence[Layer], count: int, *, on_devices: bool = False) -> float:
    """Seconds of so many layers, in each of which these parts take turns."""
    base = ranks = last = 0.0
    answered = [0.0] * len(layers)
    for number in range(count):
        for index, one in enumerate(layers):
            base = max(base, answered[index]) + (one.merging_s if number else 0.0) + one.linear_s
            begun = max(base + one.asking_s, ranks)
            answered[index] = last = max(begun + one.away_s, last + one.leaving_s)
            ranks = begun + one.rank_s
            base += beside_own(one.asking_s, one.own_s, on_devices=on_devices)
    for index, one in enumerate(layers):
        base = max(base, answered[index]) + one.merging_s
    return base
