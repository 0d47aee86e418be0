"""Bodies in rings: each end has one, which the other one writes to. Which memory a ring is, its carrier knows.

    base: takes room in the rank's ring, and in its own for the answer; writes the body
    base ── header: slot, room for the answer ────▶ rank: copies it out, then looks at it
    base ── PIECE: more of it ────────────────────▶       (what is long is read while the rest is being written)
    base ◀── header: slot in that room ──────────── rank: has computed, and writes; it waits for nothing
    base: copies it out; the room of both is free

An answer says that its request has been copied out. Where room runs out before, the sender asks and the other end
answers at once, past all that waits:

    base ── CREDIT, a number ─────────────────────▶ rank
    base ◀── CREDIT, the same ───────────────────── rank: all that was said before it has been copied out

A request that has no room, or none for its answer, waits in the base's queue, and so do those behind it; the rank waits
only in an answer that is larger than any slot. Neither end waits for the other to compute: both copy out whatever they
do. So with any number of requests outstanding none waits for another in a circle.

The sender writes and then says so; the receiver acts on the header only, and copies what the other end could change
before anything in it is believed. Does not know what messages mean.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

from fapool_plugin.wire.messages import (
    HEADER_BYTES,
    Body,
    Header,
    Laid,
    LinkLost,
    Op,
    Packed,
    Payload,
    body_memory,
    fill,
    header_bytes,
    laid_out,
    memory_of,
    packed,
    rooms,
)
from fapool_plugin.wire.ring import Slots

PIECES, _CHUNKS = 64, 16
"""Of a ring: a piece is what is written before the other end is told; a chunk is how much at a time goes of a body that
has to wait for room."""
_NOTED = 4096
_Call = tuple[int, int]
"""Lease and number."""


class Sized(Protocol):
    """A ring, of any memory."""

    @property
    def size(self) -> int:
        """In bytes."""

    def check(self, start: int, length: int) -> int:
        """``start``. Raises LinkLost if there are no such bytes."""


class Slotted:
    """One end's. What kind of memory it is stands in a class of its own.

    Args:
        mine: the ring that the other end writes to.
        theirs: the ring that this end writes to.
        asks: whether this is the base's end: it says where everything goes, answers too.
        least: bytes of a body that does not go over the socket.
    """

    name = ""

    def __init__(self, mine: Sized, theirs: Sized, asks: bool, least: int) -> None:
        self._mine, self._theirs, self._asks, self.least = mine, theirs, asks, least
        self.piece = theirs.size // PIECES
        self.mine_bytes, self.theirs_bytes = mine.size, theirs.size
        self._slots, self._for_answers = Slots(0, theirs.size), Slots(0, mine.size)
        self._reserved: dict[_Call, tuple[int, int]] = {}
        """Room for answers: (start, length), in the base's ring."""
        self._read_by_then: dict[_Call, int] = {}
        """What an answer says: all up to this mark has been copied out."""
        self._mark = self._asked = 0
        """The number of the last slot written, and of the last one that was asked for."""
        self._lent: deque[tuple[int, Slots, int]] = deque()
        """Slots that the other end may be reading: (mark, where it is taken from, start)."""

    def goes_there(self, tensors: Payload) -> bool:
        """Whether a body that is large enough goes into a slot."""
        return True

    def write(self, start: int, laid: Laid, nbytes: int) -> Iterator[int]:
        """Writes a body into a slot; yields, now and then, how many bytes are there, and at the end all."""
        raise NotImplementedError

    def aside(self, laid: Laid, nbytes: int) -> Body:
        """A copy of a body that has to wait for room."""
        raise NotImplementedError

    def put(self, at: int, body: Body, done: int, piece: int) -> None:
        """Writes a part of such a copy into a slot."""
        raise NotImplementedError

    def take(self, start: int, piece: int, body: Body, done: int) -> None:
        """Copies what is in a slot into a body; it is there when this returns. Raises LinkLost if there is no such
        slot."""
        raise NotImplementedError

    def room(self, nbytes: int) -> Body:
        """See :class:`Carrier`."""
        raise NotImplementedError

    def on_host(self, body: Body) -> np.ndarray:
        """A body's bytes, where the host can look at them."""
        return bytes_of(body)

    def outgoing(self, header: Header, tensors: Payload, answer_bytes: int, later: bool) -> Iterator[Packed | None]:
        """See :class:`Carrier`."""
        nbytes = rooms(header)[1]
        area = None if self._asks else self._reserved.pop(_call(header), None)
        there = nbytes >= self.least and (self._asks or area is not None) and self.goes_there(tensors)
        if not there and answer_bytes < self.least and not later:
            return iter((packed(header, tensors),))
        if area is not None:
            slots, most = Slots(*area), area[1]
        else:
            slots, most = self._slots, self._theirs.size // 2
        laid = laid_out(header, tensors)
        body = self._copied(laid, nbytes, there) if later or not there or nbytes > most else None
        return self._steps(header, laid, body, answer_bytes, there, slots, most)

    def announced(self, header: Header) -> None:
        """See :class:`Carrier`."""
        if not header.answer_bytes:
            return
        self._theirs.check(header.answer_slot, header.answer_bytes)
        if self._asks or header.answer_bytes < self.least or len(self._reserved) >= _NOTED:
            raise LinkLost(f"names {header.answer_bytes} bytes for an answer, the {len(self._reserved) + 1}th")
        self._reserved[_call(header)] = header.answer_slot, header.answer_bytes

    def copy_out(self, header: Header, body: Body, done: int) -> int:
        """See :class:`Carrier`."""
        piece, lacks = header.piece, len(body) - done
        if self._asks:
            start, length = self._reserved.get(_call(header), (0, 0))
            if not start <= header.slot < header.slot + piece <= start + length:
                raise LinkLost(f"has put {piece} bytes to {header.slot}, where it had [{start}, {start + length})")
        if piece > lacks:
            raise LinkLost(f"sends {piece} bytes more of a body that lacks {lacks}")
        self.take(header.slot, piece, body, done)
        return piece

    def arrived(self, header: Header) -> None:
        """See :class:`Carrier`."""
        if self._asks:
            if (area := self._reserved.pop(_call(header), None)) is not None:
                self._for_answers.give(area[0])
            self._give_back(self._read_by_then.pop(_call(header), 0))

    def credited(self, header: Header) -> None:
        """See :class:`Carrier`."""
        if not 0 < header.extra <= self._asked:
            raise LinkLost(f"has taken all up to {header.extra}, and was asked about {self._asked}")
        self._give_back(header.extra)

    def _steps(
        self,
        header: Header,
        laid: Laid,
        body: Body | None,
        answer_bytes: int,
        there: bool,
        slots: Slots,
        most: int,
    ) -> Iterator[Packed | None]:
        """``body``: what is laid out, if it has been copied already; ``there``: whether it goes into a slot."""
        nbytes = rooms(header)[1]
        if answer_bytes >= self.least:
            whole = answer_bytes <= self._mine.size // 2
            size = answer_bytes if whole else self._mine.size // 4
            while (at := self._for_answers.take(size)) is None:
                body = body if body is not None else self._copied(laid, nbytes, there)
                yield None
            self._reserved[_call(header)] = at, size
            header = header._replace(answer_slot=at, answer_bytes=size)
        if not there:
            assert isinstance(body, memoryview)
            yield Packed([header_bytes(header), body], [False, False], HEADER_BYTES + nbytes)
            return
        if not self._asks:
            self._lent.clear()  # of answers before, whose room was the base's to give back
        start = slots.take(nbytes) if body is None else None
        if start is not None:
            self._lend(header, slots, start, answer_bytes)
            done = 0
            for filled in self.write(start, laid, nbytes):
                yield _said(header, start + done, filled - done, done)
                done = filled
            return
        body = body if body is not None else self._copied(laid, nbytes, there)
        size, done = min(self._theirs.size // _CHUNKS, most // 2), 0
        while done < nbytes:
            piece = min(size, nbytes - done)
            while (at := slots.take(piece)) is None:
                yield self._asking() if self._asked < self._mark else None
            self.put(at, body, done, piece)
            self._lend(header, slots, at, answer_bytes)
            yield _said(header, at, piece, done)
            done += piece
            if done < nbytes:
                yield self._asking()  # room comes back while the rest is being written

    def _copied(self, laid: Laid, nbytes: int, there: bool) -> Body:
        return self.aside(laid, nbytes) if there else copied(laid, nbytes)

    def _lend(self, header: Header, slots: Slots, start: int, answer_bytes: int) -> None:
        self._mark += 1
        self._lent.append((self._mark, slots, start))
        if answer_bytes:
            self._read_by_then[_call(header)] = self._mark

    def _asking(self) -> Packed:
        self._asked = self._mark
        return Packed([header_bytes(Header(op=Op.CREDIT, extra=self._mark))], [False], HEADER_BYTES)

    def _give_back(self, mark: int) -> None:
        while self._lent and self._lent[0][0] <= mark:
            _, slots, start = self._lent.popleft()
            slots.give(start)


def copied(laid: Laid, nbytes: int) -> memoryview:
    """A body in memory of the host."""
    body = body_memory(nbytes)
    deque(fill(body, laid, nbytes, nbytes), maxlen=0)
    return body


def bytes_of(body: Body) -> np.ndarray:
    """Of a body in memory of the host."""
    return np.frombuffer(memory_of(body) if isinstance(body, torch.Tensor) else body, dtype=np.uint8)


def _call(header: Header) -> _Call:
    return header.token, header.call


def _said(header: Header, slot: int, piece: int, done: int) -> Packed:
    if done:
        header = Header(op=Op.PIECE, token=header.token, call=header.call)
    return Packed([header_bytes(header._replace(slot=slot, piece=piece))], [False], HEADER_BYTES)
