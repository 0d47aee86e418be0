"""One request as a pool rank reads it: held against its own header first, then read tile by tile.

A request that does not fit what it announces ends its link, and nothing is computed of it. Knows the message's layout;
neither kernels nor what the rank holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.devices.copies import Copies, brought
from fapool_plugin.plan.line import Tile
from fapool_plugin.wire.messages import Header, LinkLost, Message, Op, bits_float, rooms

_POSITIONS = 2**40
_SLACK_BYTES = 64 * 2**20


def check_header(header: Header, limit_bytes: int) -> None:
    """Held against a header before its body is received. Raises LinkLost if it is not a base's, or announces more than
    a rank that may hold ``limit_bytes`` could work on."""
    if header.op not in (Op.HELLO, Op.ATTEND, Op.FREE, Op.RELEASE, Op.PEER, Op.BACKWARD, Op.FETCH, Op.SELECT, Op.STORE):
        raise LinkLost(f"sent op {header.op}, which no base sends")
    _, nbytes = rooms(header)
    # Queries, results and gradients are not held against the limit, and are about as large as keys.
    if nbytes > 4 * limit_bytes + _SLACK_BYTES:
        raise LinkLost(f"announced {nbytes} bytes where {limit_bytes} is the memory limit (memory_limit_mib)")


class Entry(NamedTuple):
    """A row of the tile table."""

    tile: Tile
    key_start: int
    key_stop: int
    """The new keys that come with it."""
    capacity: int
    """Positions that each of its lanes will have at most, if known; 0 if not."""


def fetched(message: Message) -> list[Entry]:
    """The ranges of keys that a FETCH asks for. Raises LinkLost if there is no such range."""
    entries = [Entry(Tile(*row[:8]), *row[8:]) for row in message.tensors[0].tolist()]
    for tile, *_ in entries:
        ends = zip(tile[:4:2], tile[1:4:2], strict=True)
        if not all(0 <= low < high < _POSITIONS for low, high in ends) or not 0 <= tile.k_start < tile.k_stop:
            raise LinkLost(f"{tile} in a request for keys")
    return entries


def stored(message: Message) -> Iterator[tuple[Entry, Tensor, Tensor]]:
    """What a STORE brings: of each tile its new keys (rows, K, T, D) and values (rows, K, T, E). Raises LinkLost if the
    table says something else than the header."""
    header, (table, k, v) = message.header, message.tensors
    entries = [Entry(Tile(*row[:8]), *row[8:]) for row in table.tolist()]
    sizes = []
    for tile, start, stop, _ in entries:
        ends = zip(tile[:4:2], tile[1:4:2], strict=True)
        if not all(0 <= low < high < _POSITIONS for low, high in ends) or not 0 <= start < stop < _POSITIONS:
            raise LinkLost(f"{tile} with keys [{start}, {stop}) to be stored")
        sizes.append(tile.lanes * (stop - start))
    wanted = sum(sizes) * header.head_dim, sum(sizes) * header.v_head_dim
    if min(header.head_dim, header.v_head_dim) < 1 or (header.k_elements, header.v_elements) != wanted:
        raise LinkLost(f"{header.k_elements} and {header.v_elements} elements for tiles that have {wanted}")
    k_at = v_at = 0
    for entry, size in zip(entries, sizes, strict=True):
        tile = entry.tile
        shape = tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, entry.key_stop - entry.key_start
        k_stop, v_stop = k_at + size * header.head_dim, v_at + size * header.v_head_dim
        yield entry, k[k_at:k_stop].view(*shape, header.head_dim), v[v_at:v_stop].view(*shape, header.v_head_dim)
        k_at, v_at = k_stop, v_stop


class TileRequest:
    """Reads a request's flat payload tile by tile.

    Raises:
        LinkLost: what the table says is not what the header announces, or no tile that there could be.
    """

    def __init__(self, message: Message, device: torch.device, copies: Copies | None = None) -> None:
        self.header = message.header
        self.entries = [Entry(Tile(*row[:8]), *row[8:]) for row in message.tensors[0].tolist()]
        self._check()
        self._q, self._k, self._v, *self._results = brought(copies, message.tensors[1:7], device)
        self._q_at = self._k_at = self._v_at = self._row_at = self._dout_at = 0
        self.scale, self.softcap = bits_float(self.header.scale_bits), bits_float(self.header.softcap_bits)

    def queries(self, tile: Tile) -> Tensor:
        """The next tile's queries, (rows, H, S, D)."""
        rows, heads, length = self.sizes(tile)
        self._q_at, start = self._q_at + rows * heads * length * self.header.head_dim, self._q_at
        return self._q[start : self._q_at].view(rows, heads, length, self.header.head_dim)

    def results(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The next tile's outputs (rows, S, H, E) and LSEs (rows, H, S)."""
        (rows, heads, length), dim = self.sizes(tile), self.header.v_head_dim
        self._row_at, start = self._row_at + rows * heads * length, self._row_at
        out = self._results[0][start * dim : self._row_at * dim].view(rows, length, heads, dim)
        return out, self._results[1][start : self._row_at].view(rows, heads, length)

    def dout(self, tile: Tile) -> Tensor:
        """The gradients of the next tile's outputs, (rows, S, H, E)."""
        (rows, heads, length), dim = self.sizes(tile), self.header.v_head_dim
        self._dout_at, start = self._dout_at + rows * heads * length * dim, self._dout_at
        return self._results[2][start : self._dout_at].view(rows, length, heads, dim)

    def keys(self, tile: Tile, length: int) -> tuple[Tensor, Tensor]:
        """The next tile's new keys (rows, K, T, D) and values (rows, K, T, E)."""
        self._k_at, k_start = self._k_at + tile.lanes * length * self.header.head_dim, self._k_at
        self._v_at, v_start = self._v_at + tile.lanes * length * self.header.v_head_dim, self._v_at
        shape = tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, length
        k = self._k[k_start : self._k_at].view(*shape, self.header.head_dim)
        return k, self._v[v_start : self._v_at].view(*shape, self.header.v_head_dim)

    def sizes(self, tile: Tile) -> tuple[int, int, int]:
        """Rows, query heads, and queries of each."""
        heads = (tile.head_stop - tile.head_start) * self.header.group
        return tile.row_stop - tile.row_start, heads, tile.q_stop - tile.q_start

    def _check(self) -> None:
        header = self.header
        backward, sent = header.op == Op.BACKWARD, header.op != Op.BACKWARD or not header.keep
        if min(header.head_dim, header.v_head_dim, header.group) < 1 or not 0 <= header.keep <= 2 + (not backward):
            raise LinkLost(f"head dims {header.head_dim}, {header.v_head_dim}, group {header.group} in a request")
        rows = keys = 0
        for tile, start, stop, capacity in self.entries:
            ends = zip(tile[::2], tile[1::2], strict=True)
            if (
                not all(0 <= low < high < _POSITIONS for low, high in ends)
                or not 0 <= start <= stop < _POSITIONS > capacity
            ):
                raise LinkLost(f"{tile} with keys [{start}, {stop}) in a request")
            if (backward or header.keep not in (1, 3)) and not start <= tile.k_start < tile.k_stop <= stop:
                raise LinkLost(f"{tile} came with the keys [{start}, {stop}) only")
            rows += tile.lanes * header.group * (tile.q_stop - tile.q_start)
            keys += tile.lanes * (stop - start)
        announced = header.q_elements, header.k_elements, header.v_elements, header.lse_elements
        wanted = rows * header.head_dim, keys * header.head_dim, keys * header.v_head_dim, rows if backward else 0
        if announced != (wanted if sent else (0, 0, 0, rows)):
            raise LinkLost(f"{announced} elements for tiles that have {wanted}")
