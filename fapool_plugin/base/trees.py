"""Pool ranks that merge each other's results of one call on their way to the base.

Chooses by cost who merges whose, introduces the ranks to each other and numbers the call alike at all of them; an
answer then says of each rank what became of its part. Of a call it knows the bytes of its answers. A rank that is lost
meanwhile is given up by the guard.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.requests import Request
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import LinkCost
from fapool_plugin.plan.trees import arrangements, choose_reduction

Guarded = Callable[[PoolRank], AbstractContextManager[None]]


def arrange(
    requests: Sequence[Request], config: FAPoolConfig, link: LinkCost | None, lane_bytes: int, guard: Guarded
) -> None:
    """Settles whose answers are merged by whom: sets ``above``, ``below`` and ``merge``.

    Args:
        link: measured cost of messages; None: "auto" is "direct".
        lane_bytes: of the merged result of one lane, however many ranks work on it.
    """
    team = [request for request in requests if not request.rank.apart]
    if len(team) < 2 or config.reduction == "direct" or (config.reduction == "auto" and link is None):
        return
    nodes = tuple(request.rank.node for request in team)
    sizes, whole = _merged_bytes([one.tiles for one in team], lane_bytes)
    way, _ = choose_reduction(config.reduction, link, sizes, whole, config.reduction_fan_in, nodes)
    for request, parent in zip(team, arrangements(len(team), config.reduction_fan_in, nodes)[way], strict=True):
        if parent is not None and _introduce(team[parent].rank, request.rank, guard):
            request.above = team[parent]
            team[parent].below.append(request)
    together = [request for request in team if request.above is not None or request.below]
    merge = 1 + max((request.rank.merge for request in together), default=0)
    for request in together:
        request.merge = request.rank.merge = merge


def _merged_bytes(tiles: Sequence[Sequence[Tile]], lane_bytes: int) -> tuple[tuple[int, ...], int]:
    """Bytes of each rank's results, and of all of them merged."""
    shape = max(t.row_stop for one in tiles for t in one), max(t.head_stop for one in tiles for t in one)
    lanes = np.zeros((len(tiles), *shape), dtype=bool)
    for mine, one in zip(lanes, tiles, strict=True):
        for t in one:
            mine[t.row_start : t.row_stop, t.head_start : t.head_stop] = True
    sizes = (lanes.sum(axis=(1, 2)) * lane_bytes).tolist()
    return tuple(sizes), int(lanes.any(axis=0).sum()) * lane_bytes


def _introduce(one: PoolRank, other: PoolRank, guard: Guarded) -> bool:
    """Has two ranks open a link, once in a lease; False if one of them is lost."""
    name = secrets.randbits(62)
    for rank, peer in ((one, other), (other, one)):
        with guard(rank):
            rank.meet(peer, name)
    return not (one.lost or other.lost)
