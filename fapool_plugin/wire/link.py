"""Links: how two ranks exchange messages over one stream socket, and notice that the other is gone or stands still.

      base ── request ──▶ rank          sends never wait: what the socket does not take is sent later
      base ◀── reply ──── rank          received ahead, into a queue
      base ── beat ─────▶ rank          each timeout_s / 5
      base ◀── steps ──── rank          how much it has done so far, and what it wishes

What messages mean is not known here. How bodies travel is their carrier's.
"""

from __future__ import annotations

import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from fapool_plugin.wire.carrier import Carrier
from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.inline import Inline
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    HEADER_BYTES,
    Body,
    Header,
    LinkLost,
    Message,
    Op,
    Packed,
    Payload,
    Status,
    body_memory,
    header_bytes,
    header_of,
    memory_of,
    rooms,
)
from fapool_plugin.wire.modes import real_tensors
from fapool_plugin.wire.outgoing import Attached, Outgoing
from fapool_plugin.wire.terms import Terms
from fapool_plugin.wire.watch import watch_process
from fapool_plugin.wire.window import Window
from fapool_plugin.wire.wishes import Wishes

_QUEUED = 4096
"""Messages that may be received ahead."""
_DESCRIPTOR_ROOM = socket.CMSG_SPACE(4)


class Link:
    """One end of a link. A handler of its loop.

    Args:
        sock: connected, a socket or one that is sealed; the link's from now on.
        loop: serves it.
        name: for people.
        timeout_s: silence, in seconds, after which the other end is lost, once it has been heard.
        asks: whether this end asks for heartbeats; the other one answers them.
        into: called with all that arrives, when several links share a queue; None for one of its own.
        steps: what this end has done so far, for its answers to heartbeats.
        wishes: what they say beside that.
        address: where other ranks reach the other end; empty: nowhere.
        check: called with every header before its body is received; raises LinkLost.
        ring_bytes: of the memory for bodies that it offers to an end on this machine; 0: none is offered.
        window: makes memory that an end on another machine writes to by NIXL, told ``timeout_s``; never under a key.
    """

    def __init__(
        self,
        sock: Any,
        loop: Loop,
        *,
        name: str,
        timeout_s: float,
        asks: bool,
        into: Callable[[tuple[Link, Message | LinkLost]], object] | None = None,
        steps: Callable[[], int] = int,
        wishes: Callable[[Link], Wishes] = lambda link: Wishes(),
        address: str = "",
        check: Callable[[Header], object] = lambda header: None,
        ring_bytes: int = 0,
        window: Callable[[float], Window] | None = None,
    ) -> None:
        self.name, self.loop, self.timeout_s, self.address = name, loop, timeout_s, address
        self._socket, self._asks, self._steps, self._wishes = sock, asks, steps, wishes
        sock.setblocking(False)
        self.is_local = sock.family == socket.AF_UNIX
        if not self.is_local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received: deque[tuple[Link, Message | LinkLost]] = deque()
        self.into = into if into is not None else self._received.append
        self.check = check
        is_open = isinstance(sock, socket.socket) and not self.is_local  # what NIXL moves is not encrypted
        by_nixl = partial(window, timeout_s) if window is not None and is_open else None
        self.terms = Terms(asks, ring_bytes if self.is_local else 0, partial(watch_process, loop), by_nixl)
        self.lost: str | None = None
        self.heard = False
        """Whether the other end has said anything yet."""
        self.moved = self._alive = time.monotonic()
        """When the other end last got on with something."""
        self.wishes = Wishes()
        """What its last heartbeat said."""
        self.bytes_sent = self.bytes_received = 0
        self._beat_at = 0.0
        self._answered_steps = -1
        self._sending, self._losing = threading.RLock(), threading.RLock()
        self._outgoing = Outgoing(
            sock, lambda wanted: loop.writing(self, wanted), lambda wanted: loop.expecting(self, wanted)
        )
        self._header_bytes = bytearray(HEADER_BYTES)
        self._partial: tuple[Header, Body, int, Descriptor | None] | None = None
        """A message whose body comes in pieces: its header, the body, how much of it is there, what was attached."""
        self._begin_message()
        loop.add(self)
        if not asks:
            self.beat()  # it is ready

    @property
    def carrier(self) -> Carrier:
        """What moves bodies."""
        return self.terms.carrier

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    @property
    def silent_s(self) -> float:
        """Seconds since the other end was last heard, heartbeats included."""
        return time.monotonic() - self._alive

    def beat(self) -> None:
        """Says at once what an answer to a heartbeat would."""
        self._say(self._wishes(self).beat(self._steps()))

    def send(self, header: Header, tensors: Payload = (), attached: Attached = None, *, answer_bytes: int = 0) -> None:
        """Sends without waiting: what cannot go at once is copied and goes later.

        Args:
            header: announces the payload.
            tensors: the payload, in the header's order.
            attached: what goes with it, and is closed here; only to ranks on this machine.
            answer_bytes: of the body of its answer, at most; 0: none is due.

        Raises:
            LinkLost: the other end is known to be gone.
            ValueError: the payload is not what the header announces.
        """
        with self._sending, real_tensors():
            self._add(self.carrier.outgoing(header, tensors, answer_bytes, self._outgoing.is_queued), attached)
            self.bytes_sent += HEADER_BYTES + rooms(header)[1]

    def receive(self, stall_s: float | None = None) -> Message:
        """The next message. Raises LinkLost once the other end is gone, or, with ``stall_s``, if for so many seconds
        it neither sends, nor takes what is sent, nor gets on with its work."""
        if not self._received:
            began = time.monotonic()
            deadline = None if stall_s is None else lambda: max(began, self.moved) + stall_s
            if not self.loop.wait(lambda: self._received or self.lost, deadline):
                self.fail(f"it does not get on: nothing done for {stall_s:g} s")
        if not self._received:
            raise LinkLost(self.lost or "closed")
        _, item = self._received[0]
        if isinstance(item, LinkLost):
            raise LinkLost(str(item))  # the kept one would keep the frames that it passes, and a graph in them
        self._received.popleft()
        return item

    def wait_until_heard(self, timeout_s: float) -> None:
        """Waits for the other end's first word. Raises LinkLost if it ends or does not come."""
        deadline = time.monotonic() + timeout_s
        if not self.loop.wait(lambda: self.heard or self.lost, lambda: deadline):
            self.fail(f"was not ready within {timeout_s:g} s")
        if self.lost:
            raise LinkLost(self.lost)

    def drain(self, messages: int) -> None:
        """Waits until no more than so many messages are still to be sent."""
        if len(self._outgoing) > messages:
            self.loop.wait(lambda: len(self._outgoing) <= messages or self.lost)

    def fail(self, reason: str) -> str:
        """Marks the link as lost, once, and wakes all that wait for it. Returns the first reason given."""
        with self._losing:
            if self.lost is not None:
                return self.lost
            self.lost = reason
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.into((self, LinkLost(reason)))
        self.loop.wake()
        return reason

    def close(self) -> None:
        """Ends the link; what can still be sent at once is."""
        if not self.lost:
            with self._sending, suppress(OSError):
                self._outgoing.flush()
        self.fail("closed")
        with self.loop.alone(), self._sending:
            self.loop.remove(self)
            self._socket.close()
            self._outgoing.clear()
            self._partial = None
            self.terms.close()

    def handle(self, events: int) -> None:
        """Sends and receives what can be now."""
        try:
            if self.lost:
                self.close()
                return
            if events & select.EPOLLOUT:
                with self._sending:
                    if self._outgoing.flush():
                        self.moved = self._alive = time.monotonic()
            if events & ~select.EPOLLOUT:
                self._read()
        except OSError as error:
            self.fail(f"connection ended: {first_line(error)}")
        except Exception as error:  # whatever it was, nothing more will be read
            self.fail(f"broke the protocol: {first_line(error)}" if isinstance(error, LinkLost) else first_line(error))
        except BaseException as error:
            self.fail(f"interrupted in the middle of a message: {first_line(error)}")
            raise

    def tick(self, now: float, away_s: float) -> float:
        """Asks for a heartbeat when it is time; the link is lost if the other end is silent for too long."""
        if self.lost:
            self.close()
            return self.timeout_s
        if away_s > self.timeout_s / 2:
            self._alive = self.moved = now
        silent_s = now - self._alive
        if silent_s > self.timeout_s and (self.heard or not self._asks):
            self.fail(f"no heartbeat within {self.timeout_s:g} s")
        elif self._asks and self.heard and now >= self._beat_at and not self._outgoing.is_behind:
            self._beat_at = now + self.timeout_s / 5
            self._say(Header(op=Op.BEAT))
        return self.timeout_s / 10

    def abandon(self) -> None:
        """Its loop has ended, or this is a child of its process, and must neither keep nor end the connection."""
        self.lost = self.lost or "it is not served any more"
        self._socket.close()

    def _say(self, header: Header) -> None:
        """Past all that waits for room: it gives room back, or says that this end lives."""
        with self._sending:
            if self._outgoing.is_behind and len(self._outgoing) > _QUEUED:
                self.fail("does not read what it asks for")
            with suppress(LinkLost):
                self._add(iter((Packed([header_bytes(header)], [False], HEADER_BYTES),)), first=True)

    def _add(self, steps: Iterator[Packed | None], attached: Attached = None, *, first: bool = False) -> None:
        if self.lost:
            raise LinkLost(self.lost)
        try:
            self._outgoing.add(steps, attached, first=first)
        except OSError as error:
            raise LinkLost(self.fail(f"send failed: {first_line(error)}")) from error
        except BaseException as error:
            # Half a message may be out: nothing after it could be understood.
            self.fail(f"send failed: {first_line(error)}")
            raise

    def _begin_message(self) -> None:
        self._header: Header | None = None
        self._body: Body | None = None
        self._attached: Descriptor | None = None
        self._room = memoryview(self._header_bytes)

    def _read(self) -> None:
        """Receives until a message is complete or nothing is left; the loop comes back for more."""
        while True:
            try:
                count = self._take()
            except BlockingIOError:
                return
            if not count:
                raise ConnectionError("the other end has closed it")
            self.heard, self._alive = True, time.monotonic()
            if count < len(self._room):
                self._room = self._room[count:]
                if self._header is not None:
                    self.moved = self._alive
                continue
            header = self._header
            if header is None:
                header = self._header = header_of(self._header_bytes)
                if header.op in (Op.BEAT, Op.CREDIT):
                    self._begin_message()
                    (self._beaten if header.op == Op.BEAT else self._credited)(header)
                    return
                if self._partial is not None or header.op == Op.PIECE:
                    self._continue(header)
                    return
                self.check(header)
                self.carrier.announced(header)
                nbytes = rooms(header)[1]
                if header.piece:
                    with real_tensors():
                        self._partial = header, self.carrier.room(nbytes), 0, self._attached
                    self._continue(header._replace(op=Op.PIECE))
                    return
                if nbytes:
                    self._body, self._room = self._memory(nbytes)
                    continue
            self._deliver(header, self._body, self._attached)
            return

    def _continue(self, piece: Header) -> None:
        """More of a body is there."""
        if self._partial is None or (piece.op, piece.call) != (Op.PIECE, self._partial[0].call):
            raise LinkLost(f"sent op {piece.op} in the middle of a body, or a piece of none")
        header, body, done, attached = self._partial
        done += self.carrier.copy_out(piece, body, done)
        self.moved = self._alive
        self._begin_message()
        self._partial = (header, body, done, attached) if done < len(body) else None
        if self._partial is None:
            self._deliver(header, body, attached)

    def _credited(self, header: Header) -> None:
        self.moved = self._alive
        if header.status == Status.REQUEST:
            self._say(header._replace(status=Status.OK))
            return
        with self._sending:
            self.carrier.credited(header)
            self._outgoing.advance()

    def _take(self) -> int:
        if self._header is None and self.is_local and self.terms.awaits_ring:
            count, rights, _, _ = self._socket.recvmsg_into([self._room], _DESCRIPTOR_ROOM, socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= 4:
                    self._attached = Descriptor(int.from_bytes(data[:4], "little"))
            return count
        return self._socket.recv_into(self._room)

    def _memory(self, nbytes: int) -> tuple[Body, memoryview]:
        """For a body that follows on the socket; and the same to receive into."""
        if self.terms.device is None:
            body = body_memory(nbytes)
            return body, body
        with real_tensors():
            there = self.terms.device.host_memory(nbytes)
        return there, memory_of(there)

    def _deliver(self, header: Header, body: Body | None, attached: Descriptor | None) -> None:
        if not isinstance(self.carrier, Inline):
            with self._sending:
                self.carrier.arrived(header)
                self._outgoing.advance()
            header = header._replace(slot=0, piece=0, answer_slot=0, answer_bytes=0)
        with real_tensors():
            message = Message(header, self.carrier.tensors(header, body), attached)
        self.bytes_received += HEADER_BYTES + (len(body) if body is not None else 0)
        self.moved = self._alive
        self._begin_message()
        if len(self._received) >= _QUEUED:
            raise LinkLost(f"{_QUEUED} messages that were not asked for")
        self.into((self, message))

    def _beaten(self, header: Header) -> None:
        if self._asks:
            self.wishes = Wishes.of(header)
            if header.clock != self._answered_steps:
                self._answered_steps, self.moved = header.clock, self._alive
        elif header.status == Status.REQUEST:
            self.beat()


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, where it says what happened."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__
