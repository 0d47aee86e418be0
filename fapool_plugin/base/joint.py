"""Pool ranks that work on one call together: whose answers are merged by whom, which keys go from rank to rank.

Chooses by cost, introduces the ranks to each other, numbers the call alike at all of them and reads what is told of
their parts. It sends no tensors and computes nothing; what becomes of a rank that is lost meanwhile is the guard's
matter.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.line import Tile, round_up
from fapool_plugin.plan.profile import LinkCost
from fapool_plugin.plan.shares import Request
from fapool_plugin.plan.trees import Lanes, arrangements, choose_distribution, choose_reduction, routes
from fapool_plugin.wire.messages import Header, Message, Status

Guard = Callable[[PoolRank], AbstractContextManager[None]]


@dataclass(eq=False)
class Asked:
    """What one rank is asked, and all that is needed to compute it at the base should its answer not come."""

    rank: PoolRank
    requests: list[Request]
    call: int | None = None
    """None: not asked."""
    joint: int = 0
    """The number of this call at all ranks that work on it together; 0: this rank works alone."""
    awaits: int = 0
    """Messages of keys that reach it beside the request."""
    kept: int = 0
    """The number of the call that the rank keeps, this one or the same before; 0: none."""
    above: Asked | None = None
    """Whose answer brings this one's; None: it answers by itself."""
    below: list[Asked] = field(default_factory=list)

    @property
    def tiles(self) -> list[Tile]:
        """What it is to compute."""
        return [request.tile for request in self.requests]

    def all(self) -> list[Asked]:
        """This one and all whose parts come with its answer."""
        return [self, *(one for child in self.below for one in child.all())]

    def joined(
        self, header: Header, tensors: list[Tensor | list[Tensor]]
    ) -> tuple[Header, list[Tensor | list[Tensor]]]:
        """The request as one to a rank that works with others; the one above it was asked before."""
        if self.above is not None and self.above.call is None:
            self.detach()
        below = [torch.tensor([child.rank.number for child in self.below])] if self.below else []
        peer = 1 + self.above.rank.number if self.above is not None else 0
        header = header._replace(joint=self.joint, peer=peer, peers=len(self.below), awaits=self.awaits)
        return header, [*tensors, *below]

    def detach(self) -> None:
        """It answers by itself after all."""
        if self.above is not None:
            self.above.below.remove(self)
            self.above = None


class Part(NamedTuple):
    """What is told of one rank's part."""

    status: int = Status.MISSING
    took_ns: int = 0
    began_ns: int = 0
    kept: bool = False


def told(answer: Message | None, number: int) -> dict[int, Part]:
    """What an answer of rank ``number`` says of its part, and of those that were merged into it."""
    if answer is None:
        return {}
    header = answer.header
    if header.parts:
        return {rank: Part(*rest) for rank, *rest in answer.tensors[-1].tolist()}
    return {number: Part(header.status, header.extra, header.clock, header.keep == 2)}


@dataclass(frozen=True)
class Sizes:
    """What parts of a call weigh."""

    answer: int
    """Bytes of the merged result of one lane's queries."""
    query: int
    """Bytes of one query position of one lane."""
    position: int
    """Bytes of one key and its value of one lane."""
    layers: int


Weigh = Callable[[Sequence[Asked]], tuple[tuple[int, ...], int]]
"""(bytes of each rank's answer, bytes when all are merged into one)."""


def answers(size: int) -> Weigh:
    """Answers of ``size`` bytes for each lane, however many ranks work on it."""

    def weigh(team: Sequence[Asked]) -> tuple[tuple[int, ...], int]:
        lanes = [{(t.row, head) for t in one.tiles for head in range(t.head_start, t.head_stop)} for one in team]
        return tuple(len(some) * size for some in lanes), len(set().union(*lanes)) * size

    return weigh


def gradients(query: int, position: int) -> Weigh:
    """Gradients: ``query`` bytes for each query of a lane, and ``position`` bytes for each key of a lane, which are
    summed where several ranks have the same."""

    def weigh(team: Sequence[Asked]) -> tuple[tuple[int, ...], int]:
        sizes, queries, furthest = [], 0, dict[tuple[int, int], int]()
        for one in team:
            rows = sum((t.head_stop - t.head_start) * (t.q_stop - t.q_start) for t in one.tiles)
            mine = _furthest(one.tiles)
            sizes.append(rows * query + sum(mine.values()) * position)
            queries += rows
            for lane, stop in mine.items():
                furthest[lane] = max(furthest.get(lane, 0), stop)
        return tuple(sizes), queries * query + sum(furthest.values()) * position

    return weigh


def _furthest(tiles: Sequence[Tile]) -> dict[tuple[int, int], int]:
    """The end of the keys of each lane."""
    found: dict[tuple[int, int], int] = {}
    for tile in tiles:
        for head in range(tile.head_start, tile.head_stop):
            found[tile.row, head] = max(found.get((tile.row, head), 0), tile.k_stop)
    return found


def arrange(asked: Sequence[Asked], config: FAPoolConfig, link: LinkCost | None, weigh: Weigh, guard: Guard) -> None:
    """Settles whose answers are merged by whom on their way to the base: sets ``above``, ``below`` and ``joint``."""
    team = [one for one in asked if not one.rank.apart]
    if len(team) < 2 or config.reduction == "direct" or (config.reduction == "auto" and link is None):
        return
    nodes = tuple(one.rank.node for one in team)
    parts, whole = weigh(team)
    way, _ = choose_reduction(config.reduction, link, parts, whole, config.reduction_fan_in, nodes)
    for one, parent in zip(team, arrangements(len(team), config.reduction_fan_in, nodes)[way], strict=True):
        if parent is not None and _introduce(team[parent].rank, one.rank, guard):
            one.above = team[parent]
            team[parent].below.append(one)
    _number([one for one in team if one.above is not None or one.below])


def distribute(
    asked: Sequence[Asked], config: FAPoolConfig, link: LinkCost | None, sizes: Sizes, blocks: int, guard: Guard
) -> list[tuple[list[Asked], tuple[Lanes, ...]]]:
    """Settles which keys go from rank to rank, and sets ``joint`` of the ranks on the way.

    Returns ways of keys: ranks in their order, and lanes. All keys that these ranks lack go by such a way, if it is
    of one rank only; none do if the base sends keys to each rank. A rank whose memory would not hold what others on
    the way need takes no part.
    """
    team = [one for one in asked if not one.rank.apart]
    if len(team) < 2 or config.key_distribution == "direct" or (config.key_distribution == "auto" and link is None):
        return []
    needs = [[Lanes(*r.tile[:3], *r[1:]) for r in one.requests if r.key_start < r.key_stop] for one in team]
    for index, one in enumerate(team):
        mine = [lanes for route in routes(needs) if index in route.ranks for lanes in route.lanes]
        room = sum((part.head_stop - part.head_start) * round_up(part.stop, config.kv_block) for part in mine)
        if room * sizes.position * sizes.layers > one.rank.memory_limit:
            needs[index] = []
    found = routes(needs)
    queries = [sizes.query * sum((t[2] - t[1]) * (t[4] - t[3]) for t in one.tiles) for one in team]
    keys = [sizes.position * sum(lanes.positions for lanes in lacking) for lacking in needs]
    ways = [(len(route.ranks), sizes.position * route.positions) for route in found]
    way, _ = choose_distribution(config.key_distribution, link, queries, keys, ways, blocks)
    sharing = {index for route in found if len(route.ranks) > 1 for index in route.ranks}
    if way == "direct" or not sharing:
        return []
    for first, second in {pair for route in found for pair in pairwise(route.ranks)}:
        _introduce(team[first].rank, team[second].rank, guard)
    _number([team[index] for index in sharing])
    # Who shares nothing gets its keys with its request.
    kept = [route for route in found if sharing.intersection(route.ranks)]
    return [([team[index] for index in route.ranks], route.lanes) for route in kept]


def part_ways(asked: Sequence[Asked]) -> None:
    """The ranks of a joint call work apart until the lease ends: what failed between them would fail again."""
    for one in asked:
        one.rank.apart = one.rank.apart or one.joint > 0


def _introduce(one: PoolRank, other: PoolRank, guard: Guard) -> bool:
    """Has two ranks open a link, once in a lease; False if one of them is lost."""
    name = secrets.randbits(62)
    for rank, peer in ((one, other), (other, one)):
        with guard(rank):
            rank.meet(peer, name)
    return not (one.lost or other.lost)


def _number(team: Sequence[Asked]) -> None:
    joint = 1 + max((one.rank.joint for one in team), default=0)
    for one in team:
        one.joint = one.rank.joint = joint
