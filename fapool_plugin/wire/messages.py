"""Messages: a header of integers that determines dtype, shape and order of every tensor after it.

Nothing that came over a wire is unpickled. What the tensors mean, and how bytes travel, is not known here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

PROTOCOL_VERSION = 7
TILE_FIELDS, PART_FIELDS = 10, 4
INLINE_BYTES = 4096
"""Payloads up to this size travel in the frame of their header: a decode step is one transfer each way."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Op(IntEnum):
    """What a message asks for."""

    HELLO = 1
    ATTEND = 2
    FREE = 3
    RELEASE = 4
    BYE = 5
    PEER = 6
    BACKWARD = 7


class Status(IntEnum):
    """What a reply says."""

    REQUEST = 0
    OK = 1
    STALE = 2
    BUSY = 3
    VERSION = 4
    MISSING = 5


class LinkLost(RuntimeError):
    """The other end of a link died, fell silent or broke the protocol."""


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
    """ATTEND: 1: the keys sent stay resident; 2: the whole call is kept for its gradients; 0: neither. Its reply: 2 if
    it is kept. BACKWARD: 1: q, k and v are kept, as the call ``extra``; 2: out and lse, too; 0: nothing is."""
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
    capacity: int = 0
    """Positions a sequence will need at most, if known; 0 if not."""
    scale_bits: int = 0
    softcap_bits: int = 0
    extra: int = 0
    """Requests: a kept call's number, 0 for none. PEER: the link's number. HELLO's reply: the rank's memory limit in
    bytes. Other replies: nanoseconds spent computing."""
    clock: int = 0
    """Replies: the rank's clock, in nanoseconds, when it began to compute, or to answer a HELLO."""
    merge: int = 0
    """The attention call, by one number at all pool ranks that work on it together; 0: each works alone."""
    number: int = 0
    """PEER: the receiving rank's number. HELLO's reply: the node that the rank is on."""
    peer: int = 0
    """ATTEND: 1 + number of the rank that the answer goes to, 0 for the base. PEER: number of the other rank."""
    peers: int = 0
    """Ranks listed: those whose answers are merged into ATTEND's."""
    parts: int = 0
    """Merged answers: how many ranks' parts they report on."""


_HEADER_BYTES = 256
"""Of a frame, whatever the version: up to 32 fields, so that a frame's length, and where its payload begins, stay."""


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


def payload(header: Header) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that follows ``header``, in order. Raises LinkLost if it makes no sense."""
    if header.version != PROTOCOL_VERSION or header.op not in (Op.ATTEND, Op.BACKWARD):
        return []
    sizes = [header.tiles, header.q_elements, header.k_elements, header.v_elements, header.lse_elements]
    sizes += [header.peers, header.parts]
    backward = header.op == Op.BACKWARD
    # Gradients are not merged on their way.
    if not 0 <= header.dtype < len(_DTYPES) or min(sizes) < 0 or (backward and any([*sizes[5:], header.merge])):
        raise LinkLost(f"malformed header {tuple(header)}")
    dtype = _DTYPES[header.dtype]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, lse = ((elements,) for elements in sizes[1:5])
    table: tuple[tuple[int, ...], torch.dtype] = (header.tiles, TILE_FIELDS), torch.int64
    parts: list[tuple[tuple[int, ...], torch.dtype]] = []
    if header.status == Status.REQUEST:
        parts += [table, (q, dtype), (k, dtype), (v, dtype)]
        if backward:
            out, sent = (header.lse_elements * header.v_head_dim,), header.keep != 2
            parts += [(out if sent else (0,), dtype), (lse if sent else (0,), exact), (out, dtype)]
        parts += [((header.peers,), torch.int64)] if header.peers else []
    elif header.status == Status.OK:
        parts += [(q, exact), (k, exact), (v, exact)] if backward else [(q, dtype), (lse, exact)]
        parts += [table, ((header.parts, PART_FIELDS), torch.int64)] if header.parts else []
    return parts


def frame_bytes() -> int:
    """Bytes of every message's first transfer: the header, and room for a small payload."""
    return _HEADER_BYTES + INLINE_BYTES


class Message(NamedTuple):
    """A header and the tensors it announces, empty ones included."""

    header: Header
    tensors: list[torch.Tensor]


class Wire:
    """A message's bytes: a frame, and a body if the payload does not fit into the frame. Tensors start at multiples
    of 64 bytes, where kernels read them fastest. In host memory, whatever torch's default device is."""

    def __init__(self, header: Header, frame: torch.Tensor) -> None:
        self.frame, parts = frame, payload(header)
        starts, stop = [], 0
        for shape, dtype in parts:
            starts.append(stop)
            stop += -(-math.prod(shape) * dtype.itemsize // 64) * 64
        inline = frame[_HEADER_BYTES:]
        self.body = torch.empty(stop, dtype=torch.uint8, device="cpu") if stop > INLINE_BYTES else None
        place = inline if self.body is None else self.body
        self.tensors = [
            place[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(starts, parts, strict=True)
        ]

    @property
    def transfers(self) -> list[torch.Tensor]:
        """What goes over the wire, in order."""
        return [self.frame] if self.body is None else [self.frame, self.body]

    @property
    def nbytes(self) -> int:
        return sum(transfer.numel() for transfer in self.transfers)


def elements(tensors: Iterable[torch.Tensor]) -> int:
    """Of all tensors of one part of a payload."""
    return sum(x.numel() for x in tensors)


def fill(wire: Wire, header: Header, tensors: Sequence[torch.Tensor | Sequence[torch.Tensor]]) -> None:
    """Writes header and payload into ``wire``. Raises ValueError if they do not agree."""
    wire.frame[: 8 * len(header)].view(torch.int64).copy_(torch.tensor(header, dtype=torch.int64, device="cpu"))
    given = [[part] if isinstance(part, torch.Tensor) else list(part) for part in tensors]
    elements = [(sum(t.numel() for t in parts), {t.dtype for t in parts if t.numel()}) for parts in given]
    expected = [(room.numel(), {room.dtype} if room.numel() else set()) for room in wire.tensors]
    if elements != expected:
        raise ValueError(f"a payload of {elements} is not what {header} announces: {expected}")
    for room, parts in zip(wire.tensors, given, strict=True):
        at = 0
        for part in parts:
            room.view(-1)[at : at + part.numel()].view(part.shape).copy_(part.detach())
            at += part.numel()
