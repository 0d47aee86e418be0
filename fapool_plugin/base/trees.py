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
from fapool_plugin.wire.messages import LinkLost, Message, Status
from fapool_plugin.wire.sockets import pair

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


def check_merged(answer: Message, request: Request) -> tuple[list[Tile], list[Tile]]:
    """Holds an answer that was merged on its way against what its ranks were asked.

    Returns:
        (what the ranks were asked whose parts are in it, tiles as it is laid out).

    Raises:
        LinkLost: it is not made of that.
    """
    header, (reported, parts) = answer.header, (tensor.tolist() for tensor in answer.tensors[2:])
    team = {one.rank.number: one.tiles for one in request.all()}
    done = [number for number, status, *_ in parts if status == Status.OK]
    if len({number for number, *_ in parts}) < len(parts) or not team.keys() >= {number for number, *_ in parts}:
        raise LinkLost(f"answered for the ranks {[number for number, *_ in parts]}, and {list(team)} were asked")
    wanted = [tile for number in done for tile in team[number]]
    tiles = [Tile(*row[:8]) for row in reported]
    shape = max((t.row_stop for t in wanted), default=0), max((t.head_stop for t in wanted), default=0)
    came = {t[4:6]: np.zeros(shape, dtype=np.int64) for t in wanted}
    rows = 0
    for tile in tiles:
        inside = 0 <= tile.row_start < tile.row_stop <= shape[0] and 0 <= tile.head_start < tile.head_stop <= shape[1]
        if tile[4:6] not in came or not inside:
            raise LinkLost(f"answered with {tile}, which was not asked for")
        came[tile[4:6]][tile.row_start : tile.row_stop, tile.head_start : tile.head_stop] += 1
        rows += tile.lanes * (tile.q_stop - tile.q_start)
    due = {queries: np.zeros(shape, dtype=np.int64) for queries in came}
    for tile in wanted:
        due[tile[4:6]][tile.row_start : tile.row_stop, tile.head_start : tile.head_stop] = 1
    if any((came[queries] != due[queries]).any() for queries in due):
        raise LinkLost("answered with other lanes than the ranks that it names were asked for")
    if header.lse_elements != rows * header.group or header.q_elements != header.lse_elements * header.v_head_dim:
        raise LinkLost(f"answered with {header.q_elements} elements of {rows} queries")
    return wanted, tiles


def _introduce(one: PoolRank, other: PoolRank, guard: Guarded) -> bool:
    """Has two ranks open a link, once in a lease; False if either is lost."""
    if other.key not in one.met and not (one.lost or other.lost):
        name = secrets.randbits(62)
        ends = list(pair()) if one.link.is_local and other.link.is_local else []
        # Between machines the first waits, and the second comes.
        for rank, peer, address in ((one, other, ""), (other, one, one.link.address)):
            with guard(rank):
                rank.introduce(peer, name, ends[0] if ends else None, "" if ends else address)
                del ends[:1]  # it is the link's now
        for end in ends:
            end.close()
    return not (one.lost or other.lost)
