"""A prompt's forward walked event by event, with every rank's real tiles: what forecasts are held against."""

from __future__ import annotations

import functools
from itertools import pairwise, product

from fapool_plugin.plan.clocks import Cores
from fapool_plugin.plan.line import Row, Tile, partition
from fapool_plugin.plan.profile import Profile, share_s

KV_HEADS, GROUP, HEAD_DIM, V_HEAD_DIM, LAYERS = 3, 2, 16, 8, 4


def blocks_of(rows: list[Row], blocks: int) -> list[list[Row]]:
    """Written anew: edges at 64s of the longest row, the others' ends aligned with it."""
    columns = max(row.q_stop - row.q_start for row in rows)
    units = (columns + 63) // 64
    edges = [64 * (i * units // blocks) for i in range(blocks)] + [columns]
    parts = []
    for start, stop in pairwise(edges):
        part = []
        for row in rows:
            shift = row.q_stop - columns
            first, last = max(row.q_start, shift + start), max(row.q_start, shift + stop)
            part.append(Row(first, last, last))
        parts.append(part)
    return parts


def tiles_of(rows: list[Row], ranks: int, blocks: int, share: float) -> list[list[tuple[Tile, ...]]]:
    """For each block the shares of all ranks and, last, the base."""
    speeds = [(1 - share) / ranks] * ranks + [share]
    return [partition(part, KV_HEADS, speeds, block=1, whole=rows) for part in blocks_of(rows, blocks)]


def bytes_of(shares: list[list[tuple[Tile, ...]]], rank: int) -> tuple[int, int]:
    """Bytes of one layer to and from a rank, position by position: a key is sent when it is first needed."""
    sent = received = 0
    known: set[tuple[int, int, int]] = set()
    for block in shares:
        for tile in block[rank]:
            for lane in product(range(*tile[:2]), range(*tile[2:4])):
                sent += (tile.q_stop - tile.q_start) * GROUP * HEAD_DIM * 2
                received += (tile.q_stop - tile.q_start) * GROUP * (V_HEAD_DIM * 2 + 4)
                needed = {(*lane, key) for key in range(tile.k_stop)} - known
                sent += len(needed) * (HEAD_DIM + V_HEAD_DIM) * 2
                known |= needed
    return sent, received


def walked_s(told: Profile, rows: list[Row], ranks: int, blocks: int, share: float, cores: Cores) -> float:
    """Seconds of a forward by following every event back to what it waits for, with every rank's real tiles."""
    shares, cuts = tiles_of(rows, ranks, blocks, share), blocks_of(rows, blocks)
    threads = cores.base(ranks)
    base_cost, rank_cost = told.attention_for(threads), told.attention_for(cores.per_rank or threads)
    linear, tokens = told.linear_for(threads).prefill, sum(row.q_stop - row.q_start for row in rows)
    link, call = told.link, told.call
    out, back = zip(*(bytes_of(shares, rank) for rank in range(ranks)), strict=True)
    ask = [call.ask_s + link.send.at(nbytes / blocks) for nbytes in out]
    merge = [call.merge_s + link.take.at(nbytes / blocks) for nbytes in back]
    slower = told.beside if cores.per_rank else 1.0

    @functools.cache
    def posted(step: int) -> float:
        layer, block = divmod(step, blocks)
        new = sum(row.q_stop - row.q_start for row in cuts[block])
        work = slower * (linear.a + (linear.at(tokens) - linear.a) * new / tokens) / LAYERS
        ready = left(step - 1) if step else 0.0
        if not layer:
            return ready + work
        return max(ready, *(replied(step - blocks, rank) for rank in range(ranks))) + sum(merge) + work

    @functools.cache
    def left(step: int) -> float:
        own = (call.own_s if share else 0.0) + share_s(base_cost, KV_HEADS, shares[step % blocks][ranks])
        # On a device the own share is launched first, and the host asks meanwhile.
        return posted(step) + (max(sum(ask), own) if told.on_devices else sum(ask) + own)

    @functools.cache
    def computed(step: int, rank: int) -> float:
        # A device has copied all answers but the last when it is given the next request.
        free = computed(step - 1, rank) if step and told.on_devices else 0.0
        free = max(free, copied(step - 1 - told.on_devices, rank))
        start = max(free, posted(step) + sum(ask[:rank]) + link.to_rank.at(out[rank] / blocks))
        work = call.rank_s + share_s(rank_cost, KV_HEADS, shares[step % blocks][rank])
        return start + link.take.at(out[rank] / blocks) + work

    @functools.cache
    def copied(step: int, rank: int) -> float:
        """Its answer; nothing before the first."""
        begun = max(computed(step, rank), copied(step - 1, rank)) if step >= 0 else 0.0
        return begun + link.send.at(back[rank] / blocks) if step >= 0 else 0.0

    def replied(step: int, rank: int) -> float:
        return copied(step, rank) - link.send.at(back[rank] / blocks) + link.to_base.at(back[rank] / blocks)

    last = LAYERS * blocks - 1
    base = left(last)
    for step in range(last - blocks + 1, last + 1):
        base = max(base, *(replied(step, rank) for rank in range(ranks))) + sum(merge)
    return max(base, *(copied(last, rank) for rank in range(ranks)))
