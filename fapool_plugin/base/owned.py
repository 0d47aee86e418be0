"""Keys of a batch that pool ranks own, and the base its share: nowhere else is a copy.

Says what a layer's call asks of the owners, computes the base's share of it from the base's own keys, and brings keys
back where they are to be seen. Knows ranks and tensors; not how answers are gathered or merged, nor what is done
when an owner is lost.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fapool_plugin.base.lease import Expected, PoolRank
from fapool_plugin.base.result import Result
from fapool_plugin.devices.copies import Copies, brought
from fapool_plugin.kernels.lanes import Rectangle, attend_all, can_attend_together
from fapool_plugin.plan.line import Row, Tile
from fapool_plugin.plan.owners import Asked, Owners
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.store.prefixes import PrefixStore
from fapool_plugin.wire.messages import Header, LinkLost, Op, Status, dtype_code

_FORWARDS = 16
"""Blocks of a forward, and steps, whose requests are remembered from layer to layer."""


class KeysLost(Exception):
    """An owner is gone, and its keys with it: the forward cannot be completed."""


class FailedWithout(Exception):
    """A model's own code failed in a forward that was given new keys only: for want of the others, perhaps.

    Args:
        error: what it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class NoRoom(Exception):
    """An owner has no room for more keys."""


class Holder(NamedTuple):
    """Where an owner's keys are."""

    rank: PoolRank
    sequence: int
    """Under which name."""


@dataclass(eq=False)
class OwnedKeys:
    """The keys of one batch and their owners: pool ranks, and the base as the last.

    Args:
        owners: who owns what.
        holders: the pool ranks among them, in their order; a peer takes a lost one's place.
        geometry: where rows start.
        block: positions by which storage grows.
        sequence: names the batch on the ranks.
    """

    owners: Owners
    holders: list[Holder]
    geometry: Geometry
    sequence: int
    block: int
    base_share: float = 0.0
    """The base's part of all keys."""
    capacity: int = 0
    """Columns that the batch will have at most; 0 if that is not known."""
    peers: list[Holder | None] = field(default_factory=list)
    """Of each pool rank among the owners, who has a copy."""
    own: PrefixStore = field(init=False)
    dealt: dict[int, int] = field(default_factory=dict)
    """Columns whose keys have gone to their owners, by layer."""
    position_bytes: dict[int, int] = field(default_factory=dict)
    """Of a lane's key and value, by layer."""
    kinds: dict[int, tuple[torch.dtype, torch.device, int, int]] = field(default_factory=dict)
    """Dtype, device and head dims of keys and values, by layer."""
    reserved: list[int] = field(default_factory=list)
    """Bytes that each owner must have room for, the base last."""
    _passed: dict[int, int] = field(default_factory=dict)
    """Rows of a layer whose new keys are with their owners, while those of others are not."""
    broken: str = ""
    """Why keys are lost, once that is known."""
    full: str = ""
    """Which owner has no room for more keys, once that is known."""
    worked_out: dict[int, Any] = field(default_factory=dict)
    """What follows from :meth:`asked`, by its identity."""
    _asked: dict[tuple[int, int, int, int], list[list[Asked]]] = field(default_factory=dict)
    """By columns: the same in every layer."""

    def __post_init__(self) -> None:
        self.own = PrefixStore(sys.maxsize, self.block)

    def gone(self, leased: Sequence[PoolRank]) -> str:
        """Why keys are lost, as far as is known; empty if they are not, or if a peer takes a lost owner's place."""
        for owner, holder in enumerate(self.holders):
            rank = holder.rank
            if (rank.lost or rank.link.lost or rank not in leased) and not self.replaced(owner, leased):
                return self.broken or f"pool rank {rank.number} is gone"
        return self.broken

    def replaced(self, owner: int, leased: Sequence[PoolRank]) -> bool:
        """Whether a peer has taken the place of an owner that does not answer."""
        peer = self.peer(owner)
        if peer is None or peer.rank.lost or peer.rank.link.lost or peer.rank not in leased:
            return False
        self.holders[owner], self.peers[owner] = peer, None
        peer.rank.out_of_order = True
        return True

    def instead_of(self, rank: PoolRank, owner: int, leased: Sequence[PoolRank]) -> PoolRank | None:
        """Who is asked when ``rank`` did not answer for an owner: who has taken its place, or takes it now."""
        if self.holders[owner].rank is rank and not self.replaced(owner, leased):
            return None
        return self.holders[owner].rank

    def peer(self, owner: int) -> Holder | None:
        """Who has a copy of an owner's keys."""
        return self.peers[owner] if self.peers else None

    def columns(self, layer: int) -> int:
        """Columns of a layer that have owners."""
        return self.dealt.get(layer, 0)

    def asked(self, geometry: Geometry, layer: int, first_row: int = 0) -> list[list[Asked]]:
        """What each owner is asked in a layer's call, the base last. All keys that have no owner go with it.

        Args:
            geometry: the call's; of all rows, or of a part of them in turns with others.
            layer: the layer's number.
            first_row: where the part begins.
        """
        if geometry.columns > self.geometry.columns and len(geometry.starts) == len(self.geometry.starts):
            self.geometry = geometry
        key = geometry.q_column, geometry.columns, self.columns(layer), first_row
        if key not in self._asked:
            if len(self._asked) >= _FORWARDS:
                self._asked.clear()
                self.worked_out.clear()
            self._asked[key] = self.owners.asked(geometry.rows, key[2], self.capacity, first_row)
        return self._asked[key]

    def compute(self, asked: Sequence[Asked], layer: int, result: Result, *, at_once: bool) -> None:
        """The base's share of a call, after its new keys have been stored. What is not there, or does not fit, is told
        as :meth:`give_up` and :meth:`fill_up` do."""
        there, parts = list[Asked](), list[Rectangle]()
        for one in asked:
            tile, start, stop, capacity = one.own
            where = self.sequence, layer, tile
            if stop > start:
                at = result.new_keys(one.place, one.new)
                k, v = result.k[at], result.v[at]
                if not self.own.put(*where, k, v, start, capacity, owned=True) and self.own.length(*where) >= start:
                    self.fill_up("the base has no memory for more keys", at_once=at_once)
                    continue
            if self.own.length(*where) < tile.k_stop:
                self.give_up("the base's own keys are not what they were", at_once=at_once)
                continue
            there.append(one)
        if len(there) > 1 and can_attend_together(
            result.q.transpose(1, 2), result.k.shape[3], result.v.shape[3], result.softcap
        ):
            self.own.together(self.sequence, layer, [one.own.tile for one in there])
        for one in there:
            tile = one.own.tile
            k, v = self.own.get(self.sequence, layer, tile)
            q = result.q[slice(*one.place[:2]), result.heads(tile), result.geometry.q_slice(one.place)]
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            parts.append(Rectangle(q, k, v, tile.q_start - tile.k_start))
        found = attend_all(parts, softmax_scale=result.softmax_scale, softcap=result.softcap)
        for one, (out, lse) in zip(there, found, strict=True):
            result.take_own(one.place, out, lse)

    def give_up(self, reason: str, *, at_once: bool) -> None:
        """Keys are lost. Raises KeysLost if ``at_once``; else the forward goes on, for others whose collectives need
        it, and what it computes is worth nothing."""
        self.broken = self.broken or reason
        if at_once:
            raise KeysLost(reason)

    def give_back(self, reason: str) -> None:
        """Keys are lost, and the base's share needs room no more; nor is any reserved."""
        self.broken, self.reserved = reason, [0] * len(self.reserved)
        self.own.clear()

    def fill_up(self, reason: str, *, at_once: bool) -> None:
        """There is no room. Raises NoRoom if ``at_once``."""
        self.full = reason
        if at_once:
            raise NoRoom(reason)

    def sent(self, layer: int, geometry: Geometry, k_BKTD: Tensor, v_BKTE: Tensor) -> None:
        """A call's keys are on their way to their owners: blocks behind this one begin where it ends; of parts of a
        batch the last one does."""
        rows = self._passed.pop(layer, 0) + len(geometry.starts)
        if rows < len(self.geometry.starts):
            self._passed[layer] = rows
        else:
            self.dealt[layer] = geometry.columns
        self.kinds[layer] = k_BKTD.dtype, k_BKTD.device, k_BKTD.shape[3], v_BKTE.shape[3]
        self.position_bytes[layer] = (k_BKTD.shape[3] + v_BKTE.shape[3]) * k_BKTD.element_size()

    def crop(self, layer: int, columns: int) -> None:
        """Gives up a layer's keys from a column on; new ones overwrite them."""
        if layer in self.dealt:
            self.dealt[layer] = min(self.dealt[layer], columns)
        self._passed.pop(layer, None)
        self.geometry = self._up_to(min(self.geometry.columns, max(self.dealt.values(), default=0)))
        self._asked.clear()
        self.worked_out.clear()

    def select(self, rows: list[int]) -> None:
        """Row i becomes a copy of row ``rows[i]``, at every owner."""
        told, copies = torch.tensor(rows, dtype=torch.int64, device="cpu"), [peer for peer in self.peers if peer]
        for layer in self.dealt:
            self.own.select(self.sequence, layer, rows)
            for rank, sequence in [*self.holders, *copies]:
                header = Header(op=Op.SELECT, token=rank.token, sequence=sequence, layer=layer, peers=len(rows))
                # Who cannot be told is gone, which the next forward finds.
                with suppress(LinkLost):
                    rank.link.send(header, [told])
        starts, stops = self.geometry.starts, self.geometry.stops
        self.geometry = replace(
            self.geometry, starts=tuple(starts[row] for row in rows), stops=tuple(stops[row] for row in rows)
        )
        self._asked.clear()
        self.worked_out.clear()

    def fetch(self, layer: int) -> tuple[Tensor, Tensor]:
        """All keys (B, K, T, D) and values (B, K, T, E) of a layer, 0 where there is padding. Raises KeysLost."""
        if self.broken:
            raise KeysLost(self.broken)
        columns, (dtype, device, dim, v_dim) = self.columns(layer), self.kinds[layer]
        geometry = self._up_to(columns)
        shape = len(geometry.starts), self.owners.kv_heads, columns
        with torch.inference_mode(False), torch.no_grad():
            k, v = (torch.zeros(*shape, size, dtype=dtype, device=device) for size in (dim, v_dim))
            for number, holder in enumerate([*self.holders, None]):
                ranges = self.owners.ranges(number, geometry.rows, columns)
                if not ranges:
                    continue
                tiles = [tile for tile, _ in ranges]
                if holder is None:
                    parts = [self.own.get(self.sequence, layer, tile) for tile in tiles]
                else:
                    parts = _fetched(*holder, layer, tiles, dtype, device, dim, v_dim)
                for (tile, runs), (part_k, part_v) in zip(ranges, parts, strict=True):
                    at = 0
                    for start, stop in runs:
                        where = slice(*tile[:2]), slice(*tile[2:4]), geometry.k_slice(tile, start, stop)
                        k[where], v[where] = (x[:, :, at : at + stop - start] for x in (part_k, part_v))
                        at += stop - start
        return k, v

    def held_bytes(self) -> list[int]:
        """Bytes of keys that each owner has, the base last."""
        rows_of: dict[int, list[Row]] = {}
        held = [0] * len(self.owners.whole)
        for layer, columns in self.dealt.items():
            if columns not in rows_of:
                rows_of[columns] = self._up_to(columns).rows
            for number in range(len(held)):
                ranges = self.owners.ranges(number, rows_of[columns], columns)
                held[number] += sum(t.lanes * t.k_stop for t, _ in ranges) * self.position_bytes[layer]
        return held

    def _up_to(self, columns: int) -> Geometry:
        """Where the first columns' keys lie."""
        stops = tuple(min(stop, columns) for stop in self.geometry.stops)
        return Geometry(self.geometry.starts, stops, 0, columns)


class Batches:
    """All batches of a model that have owned keys, while they live."""

    def __init__(self) -> None:
        self._all: weakref.WeakSet[OwnedKeys] = weakref.WeakSet()

    def add(self, keys: OwnedKeys) -> None:
        """One more."""
        self._all.add(keys)

    def __bool__(self) -> bool:
        return any(keys.dealt for keys in self._all)

    def taken(self, ranks: Sequence[PoolRank]) -> list[int]:
        """Bytes of each rank that batches will need."""
        by_rank = dict.fromkeys((rank.key for rank in ranks), 0)
        for keys in self._all:
            for owner, holder in enumerate(keys.holders):
                for held in (holder, keys.peer(owner)):
                    if held is not None and held.rank.key in by_rank:
                        by_rank[held.rank.key] += keys.reserved[owner]
        return list(by_rank.values())

    def held(self) -> dict[str, Any]:
        """Bytes of keys that owners have."""
        base, ranks = 0, dict[int, int]()
        for keys in self._all:
            *pool, own = keys.held_bytes()
            base += own
            for owner, nbytes in enumerate(pool):
                for held in (keys.holders[owner], keys.peer(owner)):
                    if held is not None:
                        ranks[held.rank.number] = ranks.get(held.rank.number, 0) + nbytes
        return {"base": base, "ranks": ranks}


def copy_name(sequence: int) -> int:
    """Under which name a peer has what another rank owns of a sequence."""
    return sequence ^ 1


def names(sequence: int, redundancy: str) -> tuple[int, ...]:
    """Under which names ranks may have anything of a sequence."""
    return (sequence, copy_name(sequence)) if redundancy == "peer" else (sequence,)


def _fetched(
    rank: PoolRank, sequence: int, layer: int, tiles: list[Tile], dtype: torch.dtype, device: torch.device, dim: int,
    v_dim: int,
) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
    """Keys and values of these ranges of a rank's."""
    copies, code = Copies() if device.type == "cuda" else None, dtype_code(dtype)
    table = torch.tensor([(*tile, 0, 0, 0) for tile in tiles], dtype=torch.int64, device="cpu")
    positions = sum(tile.lanes * tile.k_stop for tile in tiles)
    header = Header(
        op=Op.FETCH, sequence=sequence, layer=layer, tiles=len(tiles), dtype=code, head_dim=dim, v_head_dim=v_dim
    )
    try:
        rank.out_of_order = True  # blocks in flight may wait for others of its replies
        call = rank.ask(header, [table], Expected(Op.FETCH, code, (0, positions * dim, positions * v_dim, 0)))
        answer = rank.answer(call)
    except LinkLost as error:
        raise KeysLost(f"pool rank {rank.number}: {error}") from error
    if answer.header.status != Status.OK:
        raise KeysLost(f"pool rank {rank.number} does not hold what it owned")
    k, v = brought(copies, answer.tensors, device)
    parts, k_at, v_at = [], 0, 0
    for tile in tiles:
        shape = tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, tile.k_stop
        size = tile.lanes * tile.k_stop
        parts.append(
            (
                k[k_at : k_at + size * dim].view(*shape, dim),
                v[v_at : v_at + size * v_dim].view(*shape, v_dim),
            )
        )
        k_at, v_at = k_at + size * dim, v_at + size * v_dim
    return parts
