"""Links: how one base rank and one pool rank exchange tensors, and notice that the other is gone.

A link is a pair of two-member gloo groups on a TCPStore, outside torch.distributed's WORLD: one for messages, one
for heartbeats. A message is a fixed-length int64 header that determines dtype, shape and order of every tensor after
it; nothing that came over a wire is unpickled. This module does not know what the tensors mean.

Tensors on other devices are staged through host memory; NCCL links do not exist yet.
"""

from __future__ import annotations

import math
import queue
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from enum import IntEnum
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist

PROTOCOL_VERSION = 5
TILE_FIELDS, PART_FIELDS = 9, 4
INLINE_BYTES = 4096
"""Payloads up to this size travel in the frame of their header: a decode step is one transfer each way."""

_FOREVER = timedelta(days=365)
"""For waits that a lost link ends: gloo closes a pair when a wait of its own times out."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Op(IntEnum):
    """What a message asks for."""

    HELLO = 1
    ATTEND = 2
    FREE = 3
    RELEASE = 4
    BYE = 5
    PEER = 6
    KEYS = 7
    BACKWARD = 8


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
    """Requests: a kept call's number, 0 for none. HELLO's reply: the rank's memory limit in bytes. Other replies:
    nanoseconds spent computing."""
    clock: int = 0
    """Replies: the rank's clock, in nanoseconds, when it began to compute, or to answer a HELLO."""
    joint: int = 0
    """The attention call, by one number at all pool ranks that work on it together; 0: each works alone."""
    number: int = 0
    """PEER: the receiving rank's number. HELLO's reply: the node that the rank is on."""
    peer: int = 0
    """ATTEND: 1 + number of the rank that the answer goes to, 0 for the base. PEER: number of the other rank."""
    peers: int = 0
    """Ranks listed: those whose answers are merged into ATTEND's, or those that KEYS are passed on to."""
    awaits: int = 0
    """KEYS messages that ATTEND waits for."""
    parts: int = 0
    """Merged answers: how many ranks' parts they report on."""


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
    if header.version != PROTOCOL_VERSION or header.op not in (Op.ATTEND, Op.KEYS, Op.BACKWARD):
        return []
    sizes = [header.tiles, header.q_elements, header.k_elements, header.v_elements, header.lse_elements]
    sizes += [header.peers, header.parts]
    if not 0 <= header.dtype < len(_DTYPES) or min(sizes) < 0:
        raise LinkLost(f"malformed header {tuple(header)}")
    dtype = _DTYPES[header.dtype]
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, lse = ((elements,) for elements in sizes[1:5])
    table: tuple[tuple[int, ...], torch.dtype] = (header.tiles, TILE_FIELDS), torch.int64
    parts: list[tuple[tuple[int, ...], torch.dtype]] = []
    if header.status == Status.REQUEST:
        parts += [table, (q, dtype), (k, dtype), (v, dtype)]
        if header.op == Op.BACKWARD:
            out, sent = (header.lse_elements * header.v_head_dim,), header.keep != 2
            parts += [(out if sent else (0,), dtype), (lse if sent else (0,), exact), (out, dtype)]
        parts += [((header.peers,), torch.int64)] if header.peers else []
    elif header.status == Status.OK:
        backward = header.op == Op.BACKWARD
        parts += [(q, exact), (k, exact), (v, exact)] if backward else [(q, dtype), (lse, exact)]
        parts += [table, ((header.parts, PART_FIELDS), torch.int64)] if header.parts else []
    return parts


def frame_bytes() -> int:
    """Bytes of every message's first transfer: the header, and room for a small payload."""
    return 8 * len(Header()) + INLINE_BYTES


class Message(NamedTuple):
    """A header and the tensors it announces, empty ones included."""

    header: Header
    tensors: list[torch.Tensor]


class _Wire:
    """A message's bytes: a frame, and a body if the payload does not fit into the frame. Tensors start at multiples
    of 64 bytes, where kernels read them fastest."""

    def __init__(self, header: Header, frame: torch.Tensor) -> None:
        self.frame, parts = frame, payload(header)
        starts, stop = [], 0
        for shape, dtype in parts:
            starts.append(stop)
            stop += -(-math.prod(shape) * dtype.itemsize // 64) * 64
        inline = frame[8 * len(header) :]
        self.body = torch.empty(stop, dtype=torch.uint8) if stop > INLINE_BYTES else None
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


def _group(store: dist.Store, name: str, rank: int, timeout: timedelta, host: str | None) -> Any:
    """A two-member gloo group. Typed as Any: torch's stubs do not know its methods."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout, options._threads = timeout, 1
    options._devices = [gloo.create_device(hostname=host) if host else gloo.create_default_device()]
    return gloo(dist.PrefixStore(name, store), rank, 2, options)


class Link:
    """One end of a link.

    A reader thread receives ahead into a queue, so that a message never waits for the computation before it, and a
    heartbeat thread watches the other end: the base asks, the pool rank answers, each ``timeout_s / 5``. Whichever
    finds the other end gone ends the queue with :class:`LinkLost`, so every wait is bounded.

    Args:
        store: where the two ends meet.
        name: unique for this link; both ends give the same.
        side: "base" asks for heartbeats, "pool" answers them.
        timeout_s: silence, in seconds, after which the other end is lost.
        connect_timeout_s: how long to wait for the other end at first; a RuntimeError after that.
        host: address to bind to; None for the default interface.
        into: called by the reader with all that arrives, when several links share a queue; None for one of its own.
    """

    def __init__(
        self,
        store: dist.Store,
        name: str,
        side: Literal["base", "pool"],
        *,
        timeout_s: float,
        connect_timeout_s: float = 60.0,
        host: str | None = None,
        into: Callable[[tuple[Link, Message | LinkLost]], object] | None = None,
    ) -> None:
        rank = 0 if side == "base" else 1
        self.name, self._peer, self._tag = name, 1 - rank, rank
        connect = timedelta(seconds=connect_timeout_s)
        self._data, self._pulse = (_group(store, f"{name}/{use}", rank, connect, host) for use in ("data", "pulse"))
        self._timeout_s, self._silence = timeout_s, timedelta(seconds=timeout_s)
        self._received: queue.SimpleQueue[tuple[Link, Message | LinkLost]] = queue.SimpleQueue()
        self._into = into if into is not None else self._received.put
        self.lost: str | None = None
        self._over, self._lost_lock, self._said_goodbye = threading.Event(), threading.Lock(), False
        # The reader says goodbye on its own: between two transfers of one message it would break the protocol, and
        # gloo ends a process that receives more than it expects.
        self._sending = threading.Lock()
        self._outgoing: deque[tuple[int, torch.Tensor, dist.Work]] = deque()
        self.messages_sent = 0
        self.bytes_sent = self.bytes_received = 0
        beat = self._ask if side == "base" else self._answer
        self._threads = [
            threading.Thread(target=target, name=f"fapool {name}", daemon=True) for target in (self._read, beat)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, header: Header, tensors: Sequence[torch.Tensor | Sequence[torch.Tensor]] = ()) -> None:
        """Copies and sends without waiting; :meth:`settle` waits.

        Args:
            header: announces the payload.
            tensors: the payload, in the header's order; a list of tensors stands for their elements end to end.

        Raises:
            LinkLost: the other end is known to be gone.
            ValueError: the payload is not what the header announces.
        """
        wire = _Wire(header, torch.empty(frame_bytes(), dtype=torch.uint8))
        _fill(wire, header, tensors)
        with self._sending:
            if self.lost:
                raise LinkLost(self.lost)
            self.messages_sent, half = self.messages_sent + 1, False
            try:
                for transfer in wire.transfers:
                    self._post(transfer)
                    half = True
            except BaseException as error:
                # Half a message may be out: nothing after it could be understood, not even a goodbye.
                self._said_goodbye = self._said_goodbye or half
                reason = self.fail(f"send failed: {first_line(error)}")
                if isinstance(error, RuntimeError):
                    raise LinkLost(reason) from error
                raise
            self.bytes_sent += wire.nbytes

    def settle(self, through: int) -> None:
        """Waits until the first ``through`` messages have gone. Call it after the reply, not before: a large send
        ends only when the other end posts its receive."""
        try:
            while self._outgoing and self._outgoing[0][0] <= through:
                if self.lost:
                    raise LinkLost(self.lost)
                self._outgoing[0][2].wait(_FOREVER)
                self._outgoing.popleft()
        except RuntimeError as error:
            if isinstance(error, LinkLost):
                raise
            raise LinkLost(self.fail(f"send failed: {first_line(error)}")) from error

    def receive(self) -> Message:
        """The next message. Raises LinkLost once the other end is gone."""
        _, item = self._received.get()
        if isinstance(item, LinkLost):
            self._received.put((self, item))
            raise LinkLost(str(item))  # the kept one would keep the frames that it passes, and a graph in them
        return item

    def fail(self, reason: str) -> str:
        """Marks the link as lost, once, and wakes whoever waits for it. Returns the first reason given."""
        with self._lost_lock:
            first = self.lost is None
            self.lost = self.lost or reason
        self._over.set()
        if first:
            self._into((self, LinkLost(self.lost)))
        return self.lost

    def close(self) -> None:
        """Says goodbye and ends; the other end says it too, so that neither waits any longer."""
        self._say_goodbye()
        self.fail("closed")

    def join(self, timeout_s: float) -> None:
        """Waits for the link's threads, which end when the other end has gone."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _post(self, transfer: torch.Tensor) -> None:
        # A send reads its tensor until it has ended: both are kept until then.
        self._outgoing.append((self.messages_sent, transfer, self._data.send([transfer], self._peer, self._tag)))

    def _say_goodbye(self) -> None:
        goodbye = torch.zeros(frame_bytes(), dtype=torch.uint8)
        _fill(_Wire(Header(), goodbye), Header(op=Op.BYE), ())
        with self._sending, suppress(RuntimeError):
            said, self._said_goodbye = self._said_goodbye, True
            if not said:
                self._post(goodbye)

    def _read(self) -> None:
        try:
            while True:
                frame = torch.empty(frame_bytes(), dtype=torch.uint8)
                self._data.recv([frame], self._peer, 1 - self._tag).wait(_FOREVER)
                header = Header(*frame[: 8 * len(Header())].view(torch.int64).tolist())
                if header.op == Op.BYE:
                    self._say_goodbye()
                    self.fail("the other end said goodbye")
                    return
                wire = _Wire(header, frame)
                if wire.body is not None:
                    self._data.recv([wire.body], self._peer, 1 - self._tag).wait(_FOREVER)
                self.bytes_received += wire.nbytes
                self._into((self, Message(header, wire.tensors)))
                del frame, wire
        except Exception as error:  # whatever it was, nothing more will be read
            self.fail(f"connection ended: {first_line(error)}")

    def _ask(self) -> None:
        beat = torch.zeros(1, dtype=torch.int64)
        try:
            while not self.lost:
                self._pulse.send([beat], self._peer, 0).wait(self._silence)
                self._pulse.recv([beat], self._peer, 1).wait(self._silence)
                self._over.wait(self._timeout_s / 5)
            beat -= 1
            self._pulse.send([beat], self._peer, 0).wait(self._silence)
        except RuntimeError as error:
            self.fail(f"no heartbeat within {self._timeout_s:g} s: {first_line(error)}")

    def _answer(self) -> None:
        beat = torch.zeros(1, dtype=torch.int64)
        try:
            while True:
                self._pulse.recv([beat], self._peer, 0).wait(self._silence)
                if beat < 0:
                    return
                self._pulse.send([beat], self._peer, 1).wait(self._silence)
        except RuntimeError as error:
            self.fail(f"no heartbeat within {self._timeout_s:g} s: {first_line(error)}")


def _fill(wire: _Wire, header: Header, tensors: Sequence[torch.Tensor | Sequence[torch.Tensor]]) -> None:
    """Writes header and payload into ``wire``. Raises ValueError if they do not agree."""
    wire.frame[: 8 * len(header)].view(torch.int64).copy_(torch.tensor(header, dtype=torch.int64))
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


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, where it says what happened."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
