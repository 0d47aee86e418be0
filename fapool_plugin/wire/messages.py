"""Messages: a header of integers that determines dtype, shape and order of every tensor after it.

Nothing that came over a wire is unpickled. What the tensors mean, and how bytes travel, is not known here.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from fapool_plugin.wire import PROTOCOL_VERSION
from fapool_plugin.wire.descriptor import Descriptor

TILE_FIELDS, PART_FIELDS = 11, 4
HEADER_BYTES = 256
"""Whatever the version: up to 32 fields, so that either end can read what the other one says of its version."""
STEP_S = 0.5
"""A pool rank does its work in steps that should take no longer, so that it can tell how it gets on."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ALIGNED = 64
"""Tensors start at multiples of so many bytes, where kernels read them fastest."""
_ADDRESS_BYTES = 16 * 1024

Payload = Sequence[torch.Tensor | Sequence[torch.Tensor]]
"""Tensors in a header's order; a list of tensors stands for their elements end to end."""


class Op(IntEnum):
    """What a message asks for."""

    HELLO = 1
    ATTEND = 2
    FREE = 3
    RELEASE = 4
    BEAT = 5
    PEER = 6
    BACKWARD = 7
    FETCH = 8
    SELECT = 9
    STORE = 10
    PIECE = 11
    CREDIT = 12


class Status(IntEnum):
    """What a reply says."""

    REQUEST = 0
    OK = 1
    STALE = 2
    BUSY = 3
    VERSION = 4
    MISSING = 5
    FULL = 6


class LinkLost(RuntimeError):
    """The other end of a link died, fell silent, stood still or broke the protocol."""


class Header(NamedTuple):
    """The fixed-length int64 header; floats travel as their IEEE-754 bits (:func:`float_bits`)."""

    version: int = PROTOCOL_VERSION
    op: int = 0
    status: int = 0
    token: int = 0
    """The lease this message belongs to."""
    call: int = 0
    sequence: int = 0
    layer: int = 0
    keep: int = 0
    """ATTEND: 1: the keys sent stay resident; 2: the whole call is kept for its gradients; 3: the rank owns the keys
    sent, and gives them up for no others; 0: none of these. Its reply: 2 if the call is kept. BACKWARD: 1: q, k and v
    are kept, as the call ``extra``; 2: out and lse, too; 0: nothing is. Its reply: 1 if gradients are in ``dtype``.
    HELLO: 1: this end has a device, or has filled the ring that the other named; 2: it has NIXL; 3: rings there carry
    bodies from now on. Its reply: 1: so is this end's ring; 2: that is not what was written to it; 0: neither."""
    dtype: int = 0
    """Index of the payload's dtype (:func:`dtype_code`)."""
    tiles: int = 0
    q_elements: int = 0
    k_elements: int = 0
    v_elements: int = 0
    lse_elements: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    group: int = 0
    """Query heads per KV head."""
    scale_bits: int = 0
    softcap_bits: int = 0
    extra: int = 0
    """Requests: a kept call's number, 0 for none. PEER: the link's name. HELLO: nanoseconds without a request after
    which the lease may go to another job, 0 for never; its reply: the rank's memory limit in bytes, or for how many
    nanoseconds another job has had the lease. BEAT's reply: 1 if the rank leaves. Other replies: nanoseconds spent
    computing."""
    clock: int = 0
    """Replies: the rank's clock, in nanoseconds, when it began to compute, or to answer a HELLO. BEAT's reply: steps
    that the rank has done so far. HELLO: nanoseconds without a word after which the lease may go to another job."""
    merge: int = 0
    """The attention call, by one number at all pool ranks that work on it together; 0: each works alone."""
    number: int = 0
    """PEER: the receiving rank's number. HELLO's reply: the node that the rank is on. BEAT's reply: jobs that wait for
    the rank."""
    peer: int = 0
    """ATTEND: 1 + number of the rank that the answer goes to, 0 for the base. PEER: number of the other rank. HELLO's
    reply: names the GPU that the rank computes on, 0 for none."""
    peers: int = 0
    """Ranks listed: those whose answers are merged into ATTEND's. SELECT: rows listed. HELLO: ranks that the job has.
    BEAT's reply: the fewest that one of the jobs has that wait."""
    parts: int = 0
    """Merged answers: how many ranks' parts they report on."""
    address: int = 0
    """PEER: bytes of the other rank's address; 0: it is waited for, or its socket comes with the message. HELLO: bytes
    of the name of a ring on a device, or for NIXL."""
    slot: int = 0
    """Where in the receiver's ring the next bytes of the body are."""
    piece: int = 0
    """How many bytes are there; 0: the body follows the header."""
    answer_slot: int = 0
    """Requests: where in the sender's ring there is room for the answer's body."""
    answer_bytes: int = 0
    """How much; 0: none, the body follows the answer's header."""


_WITH_BODY = frozenset((Op.HELLO, Op.ATTEND, Op.BACKWARD, Op.PEER, Op.FETCH, Op.SELECT, Op.STORE))
_PACKED = struct.Struct(f"<{len(Header())}q")


def float_bits(value: float) -> int:
    """The bits of a float64 as an int64."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def bits_float(bits: int) -> float:
    """The float64 whose bits are ``bits``."""
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def dtype_code(dtype: torch.dtype) -> int:
    """A dtype's number on the wire. Raises ValueError for one that no kernel computes in."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype} cannot be sent to a pool rank; use one of {', '.join(map(str, _DTYPES))}")
    return _DTYPES.index(dtype)


def header_bytes(header: Header) -> bytes:
    """A header as it travels."""
    return _PACKED.pack(*header).ljust(HEADER_BYTES, b"\0")


def header_of(data: bytes | bytearray) -> Header:
    """The header in the first ``HEADER_BYTES`` bytes of a message."""
    return Header(*_PACKED.unpack_from(data))


class Room(NamedTuple):
    """Where one tensor is in a message's body."""

    start: int
    stop: int
    """In bytes."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    elements: int


def rooms(header: Header) -> tuple[tuple[Room, ...], int]:
    """(every tensor that follows ``header``, in order; bytes of the body). Raises LinkLost if it makes no sense."""
    if header.version != PROTOCOL_VERSION or header.op not in _WITH_BODY:
        return (), 0
    return _rooms(
        header.op, header.status, header.dtype, header.keep, header.tiles, header.q_elements, header.k_elements,
        header.v_elements, header.lse_elements, header.v_head_dim, header.merge, header.peers, header.parts,
        header.address,
    )  # fmt: skip


@lru_cache(4096)
def _rooms(
    op: int, status: int, dtype_index: int, keep: int, tiles: int, q_elements: int, k_elements: int, v_elements: int,
    lse_elements: int, v_head_dim: int, merge: int, peers: int, reported: int, address: int,
) -> tuple[tuple[Room, ...], int]:  # fmt: skip
    sizes = [tiles, q_elements, k_elements, v_elements, lse_elements, v_head_dim, peers, reported, address]
    backward = op == Op.BACKWARD
    # Gradients are not merged on their way.
    together = backward and any((peers, reported, merge))
    if not 0 <= dtype_index < len(_DTYPES) or min(sizes) < 0 or together or address > _ADDRESS_BYTES:
        raise LinkLost(f"malformed header: op {op}, status {status}, dtype {dtype_index}, sizes {sizes}")
    dtype = _DTYPES[dtype_index]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, lse = ((elements,) for elements in sizes[1:5])
    table: tuple[tuple[int, ...], torch.dtype] = (tiles, TILE_FIELDS), torch.int64
    parts: list[tuple[tuple[int, ...], torch.dtype]] = []
    if op in (Op.PEER, Op.HELLO):
        parts = [((address,), torch.uint8)] if address else []
    elif op == Op.SELECT:
        parts = [((peers,), torch.int64)]
    elif op == Op.STORE:
        parts = [table, (k, dtype), (v, dtype)]
    elif op == Op.FETCH:
        parts = [table] if status == Status.REQUEST else [(k, dtype), (v, dtype)] if status == Status.OK else []
    elif status == Status.REQUEST:
        parts += [table, (q, dtype), (k, dtype), (v, dtype)]
        if backward:
            out, sent = (lse_elements * v_head_dim,), keep != 2
            parts += [(out if sent else (0,), dtype), (lse if sent else (0,), exact), (out, dtype)]
        parts += [((peers,), torch.int64)] if peers else []
    elif status == Status.OK:
        of_gradients = dtype if keep else exact
        parts += [(x, of_gradients) for x in (q, k, v)] if backward else [(q, dtype), (lse, exact)]
        parts += [table, ((reported, PART_FIELDS), torch.int64)] if reported else []
    found, at = [], 0
    for shape, kind in parts:
        elements = math.prod(shape)
        found.append(Room(at, at + elements * kind.itemsize, shape, kind, elements))
        at += -(-elements * kind.itemsize // _ALIGNED) * _ALIGNED
    return tuple(found), at


Laid = Sequence[tuple[Room, Sequence[torch.Tensor]]]
"""What is in each room of a body."""
Body = memoryview | torch.Tensor
"""The bytes of one: of the host, or a tensor of them, page-locked or a device's."""


class Message(NamedTuple):
    """A header and the tensors it announces, empty ones included."""

    header: Header
    tensors: list[torch.Tensor]
    attached: Descriptor | None = None
    """What came with it."""


def tensors_of(header: Header, body: Body | None) -> list[torch.Tensor]:
    """The tensors in the bytes of a body, without a copy; None: there is none. They keep its memory."""
    found = []
    for start, stop, shape, dtype, size in rooms(header)[0]:
        if size and body is not None:
            if isinstance(body, torch.Tensor):
                x = body[start:stop].view(dtype)  # a view of it, by which torch knows what a copy is reading
            else:
                x = torch.frombuffer(body, dtype=dtype, count=size, offset=start)
            found.append(x if len(shape) == 1 else x.view(shape))
        else:
            found.append(_nothing(shape, dtype))
    return found


@lru_cache(256)
def _nothing(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")


def body_memory(nbytes: int) -> memoryview:
    """Memory for a body. Not torch's: it may be asked for in any of torch's modes, and for small ones that is slow."""
    room = np.empty(nbytes + _ALIGNED, dtype=np.uint8)
    start = -room.ctypes.data % _ALIGNED
    return memoryview(room[start : start + nbytes].data)


def elements(tensors: Iterable[torch.Tensor]) -> int:
    """Of all tensors of one part of a payload."""
    return sum(x.numel() for x in tensors)


def memory_of(x: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, whatever its dtype; they keep it."""
    memory = (ctypes.c_char * (x.numel() * x.itemsize)).from_address(x.data_ptr())
    memory.owner = x  # type: ignore[attr-defined]
    return memoryview(memory).cast("B")


class Packed(NamedTuple):
    """A message as it goes out."""

    buffers: list[bytes | memoryview]
    borrowed: list[bool]
    """Of each buffer, whether it is memory that the caller may write to again."""
    nbytes: int


def laid_out(header: Header, tensors: Payload) -> Laid:
    """What is in each room of a body; rooms without elements are left out.

    Raises:
        ValueError: the payload is not what the header announces.
    """
    announced = rooms(header)[0]
    if len(tensors) != len(announced):
        raise _refused(header, tensors)
    laid = []
    for part, room in zip(tensors, announced, strict=True):
        parts = [part] if isinstance(part, torch.Tensor) else part
        if elements(parts) != room.elements or any(x.dtype != room.dtype for x in parts if x.numel()):
            raise _refused(header, tensors)
        if room.elements:
            laid.append((room, parts))
    return laid


def packed(header: Header, tensors: Payload) -> Packed:
    """A message's bytes. Tensors in one piece in host memory are not copied; others are, end to end.

    Raises:
        ValueError: the payload is not what the header announces.
    """
    nbytes, at = rooms(header)[1], 0
    buffers: list[bytes | memoryview] = [header_bytes(header)]
    borrowed = [False]
    for room, parts in laid_out(header, tensors):
        whole = parts[0] if len(parts) == 1 else None
        is_borrowed = whole is not None and whole.is_cpu and whole.is_contiguous()
        if whole is None or not is_borrowed:
            whole = _gathered(parts, room.dtype, room.elements)
        if room.start > at:
            buffers.append(bytes(room.start - at))
            borrowed.append(False)
        buffers.append(memory_of(whole))
        borrowed.append(is_borrowed)
        at = room.stop
    if nbytes > at:
        buffers.append(bytes(nbytes - at))
        borrowed.append(False)
    return Packed(buffers, borrowed, HEADER_BYTES + nbytes)


def fill(memory: memoryview, laid: Laid, nbytes: int, every: int) -> Iterator[int]:
    """Writes a body of ``nbytes`` into ``memory``, strided tensors and those of other devices without a copy between.

    Yields how many bytes are there: about every ``every`` bytes, and at the end all.
    """
    told = 0
    for room, parts in laid:
        at = room.start
        for part in parts:
            for piece in _cut(part.detach(), every):
                target = torch.frombuffer(memory, dtype=room.dtype, count=piece.numel(), offset=at)
                target.view(piece.shape).copy_(piece)
                at += piece.numel() * room.dtype.itemsize
                if at - told >= every and at < nbytes:
                    yield at
                    told = at
    yield nbytes


def _cut(x: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """A tensor's elements in order, in parts of about that many bytes."""
    size = x.numel() * x.itemsize
    if not size:
        return
    if size <= most or not x.dim():
        yield x
    elif len(x) == 1:
        yield from _cut(x[0], most)
    else:
        for part in x.split(max(1, most * len(x) // size)):
            yield from _cut(part, most)


def _refused(header: Header, tensors: Payload) -> ValueError:
    given = [[part] if isinstance(part, torch.Tensor) else list(part) for part in tensors]
    told = [(elements(parts), {t.dtype for t in parts if t.numel()}) for parts in given]
    return ValueError(f"a payload of {told} is not what {header} announces: {rooms(header)[0]}")


def _gathered(parts: Iterable[torch.Tensor], dtype: torch.dtype, size: int) -> torch.Tensor:
    together, at = torch.empty(size, dtype=dtype, device="cpu"), 0
    for part in parts:
        together[at : at + part.numel()].view(part.shape).copy_(part.detach())
        at += part.numel()
    return together
