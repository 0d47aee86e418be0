"""Links: how two ranks exchange messages over one stream socket, and notice that the other is gone or stands still.

      base ── request ──▶ rank          sends never wait: what the socket does not take is sent later
      base ◀── reply ──── rank          received ahead, into a queue
      base ── beat ─────▶ rank          each timeout_s / 5
      base ◀── steps ──── rank          how much it has done so far

What messages mean is not known here. Tensors on other devices are copied to host memory.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    HEADER_BYTES,
    Header,
    LinkLost,
    Message,
    Op,
    Packed,
    Payload,
    Status,
    body_memory,
    header_of,
    packed,
    rooms,
    tensors_of,
)

_QUEUED = 4096
"""Messages that may be received ahead."""
_AS_THEY_ARE = nullcontext()
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
        address: where other ranks reach the other end; empty: nowhere.
        check: called with every header before its body is received; raises LinkLost.
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
        address: str = "",
        check: Callable[[Header], object] = lambda header: None,
    ) -> None:
        self.name, self.loop, self.timeout_s, self.address = name, loop, timeout_s, address
        self._socket, self._asks, self._steps = sock, asks, steps
        sock.setblocking(False)
        self.is_local = sock.family == socket.AF_UNIX
        if not self.is_local:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received: deque[tuple[Link, Message | LinkLost]] = deque()
        self.into = into if into is not None else self._received.append
        self.check = check
        self.lost: str | None = None
        self.heard = False
        """Whether the other end has said anything yet."""
        self.moved = self._alive = time.monotonic()
        """When the other end last got on with something."""
        self.bytes_sent = self.bytes_received = 0
        self._beat_at = 0.0
        self._answered_steps = -1
        self._sending, self._losing = threading.RLock(), threading.RLock()
        self._posting = False
        self._behind: deque[tuple[Packed, socket.socket | None]] = deque()
        self._outgoing: deque[tuple[memoryview, socket.socket | None]] = deque()
        """What the socket did not take yet, and a socket that goes with it."""
        self._messages_waiting: deque[int] = deque()
        """Of each message that is not out yet, the number of buffers left."""
        self._header_bytes = bytearray(HEADER_BYTES)
        self._begin_message()
        loop.add(self)
        if not asks:
            with suppress(LinkLost):
                self.send(Header(op=Op.BEAT, status=Status.OK, clock=steps()))  # it is ready

    def fileno(self) -> int:
        """Its descriptor."""
        return self._socket.fileno()

    def send(self, header: Header, tensors: Payload = (), attached: socket.socket | None = None) -> None:
        """Sends without waiting: what the socket does not take at once is copied and goes later.

        Args:
            header: announces the payload.
            tensors: the payload, in the header's order.
            attached: a socket that goes with it, and is closed here; only to ranks on this machine.

        Raises:
            LinkLost: the other end is known to be gone.
            ValueError: the payload is not what the header announces.
        """
        with _real_tensors():
            message = packed(header, tensors)
        with self._sending:
            if self.lost:
                raise LinkLost(self.lost)
            if self._posting:
                # A garbage collector's finalizer, in the middle of another message of this thread.
                self._behind.append((message, attached))
                return
            self._posting = True
            try:
                self._post(message, attached)
                while self._behind:
                    self._post(*self._behind.popleft())
            except OSError as error:
                raise LinkLost(self.fail(f"send failed: {first_line(error)}")) from error
            except BaseException as error:
                # Half a message may be out: nothing after it could be understood.
                self.fail(f"send failed: {first_line(error)}")
                raise
            finally:
                self._posting = False

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
        if len(self._messages_waiting) > messages:
            self.loop.wait(lambda: len(self._messages_waiting) <= messages or self.lost)

    def fail(self, reason: str) -> str:
        """Marks the link as lost, once, and wakes whoever waits for it. Returns the first reason given."""
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
                self._flush()
        self.fail("closed")
        with self.loop.alone(), self._sending:
            self.loop.remove(self)
            self._socket.close()
            self._outgoing.clear()

    def handle(self, events: int) -> None:
        """Sends and receives what can be now."""
        try:
            if self.lost:
                self.close()
                return
            if events & select.EPOLLOUT:
                with self._sending:
                    self._flush()
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
        elif self._asks and self.heard and now >= self._beat_at and not self._outgoing:
            self._beat_at = now + self.timeout_s / 5
            with suppress(LinkLost):
                self.send(Header(op=Op.BEAT))
        return self.timeout_s / 10

    def abandon(self) -> None:
        """Its loop has ended, or this is a child of its process, and must neither keep nor end the connection."""
        self.lost = self.lost or "it is not served any more"
        self._socket.close()

    def _post(self, message: Packed, attached: socket.socket | None) -> None:
        self.bytes_sent += message.nbytes
        sent = 0
        if not self._outgoing:
            with suppress(BlockingIOError):
                sent = self._socket.sendmsg(message.buffers, _rights(attached))
            if sent and attached is not None:
                attached.close()
                attached = None
        if sent == message.nbytes:
            return
        left = 0
        for buffer, borrowed in zip(message.buffers, message.borrowed, strict=True):
            skipped, sent = min(sent, len(buffer)), max(0, sent - len(buffer))
            if skipped < len(buffer):
                rest = memoryview(buffer)[skipped:]
                # The caller may write to its own tensors as soon as this returns.
                self._outgoing.append((memoryview(bytes(rest)) if borrowed else rest, attached))
                attached, left = None, left + 1
        self._messages_waiting.append(left)
        self.loop.writing(self, True)

    def _flush(self) -> None:
        while self._outgoing:
            buffer, attached = self._outgoing[0]
            try:
                sent = self._socket.sendmsg([buffer], _rights(attached))
            except BlockingIOError:
                return
            if attached is not None:
                attached.close()
            self.moved = self._alive = time.monotonic()
            if sent < len(buffer):
                self._outgoing[0] = buffer[sent:], None
                continue
            self._outgoing.popleft()
            self._messages_waiting[0] -= 1
            if not self._messages_waiting[0]:
                self._messages_waiting.popleft()
        self.loop.writing(self, False)

    def _begin_message(self) -> None:
        self._header: Header | None = None
        self._body: memoryview | None = None
        self._attached: socket.socket | None = None
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
                if header.op == Op.BEAT:
                    self._begin_message()
                    self._beaten(header)
                    return
                self.check(header)
                nbytes = rooms(header)[1]
                if nbytes:
                    self._room = self._body = body_memory(nbytes)
                    continue
            self._deliver(header)
            return

    def _take(self) -> int:
        if self._header is None and self.is_local and not self._asks:
            count, rights, _, _ = self._socket.recvmsg_into([self._room], _DESCRIPTOR_ROOM)
            for level, kind, data in rights:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS) and len(data) >= 4:
                    if self._attached is not None:
                        self._attached.close()
                    self._attached = socket.socket(fileno=int.from_bytes(data[:4], "little"))
            return count
        return self._socket.recv_into(self._room)

    def _deliver(self, header: Header) -> None:
        with _real_tensors():
            message = Message(header, tensors_of(header, self._body), self._attached)
        self.bytes_received += HEADER_BYTES + (len(self._body) if self._body is not None else 0)
        self.moved = self._alive
        self._begin_message()
        if len(self._received) >= _QUEUED:
            raise LinkLost(f"{_QUEUED} messages that were not asked for")
        self.into((self, message))

    def _beaten(self, header: Header) -> None:
        if self._asks:
            if header.clock != self._answered_steps:
                self._answered_steps, self.moved = header.clock, self._alive
        elif header.status == Status.REQUEST:
            with suppress(LinkLost):
                self.send(Header(op=Op.BEAT, status=Status.OK, clock=self._steps()))


def _rights(attached: socket.socket | None) -> list[tuple[int, int, bytes]]:
    if attached is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, attached.fileno().to_bytes(4, "little"))]


def _real_tensors() -> AbstractContextManager[Any]:
    """Messages have memory in the middle of anything: a sequence may end while a mode makes all other tensors fake,
    and what arrives while some caller is in inference mode may be another's."""
    faked, in_inference = torch._C._len_torch_dispatch_stack(), torch.is_inference_mode_enabled()
    if not faked and not in_inference:
        return _AS_THEY_ARE
    modes = ExitStack()
    if in_inference:
        modes.enter_context(torch.inference_mode(False))
    if faked:
        modes.enter_context(_disable_current_modes())
    return modes


def first_line(error: BaseException) -> str:
    """The beginning of an error's message, where it says what happened."""
    return str(error).splitlines()[0][:160] if str(error) else type(error).__name__


def watch_process(loop: Loop, pid: int, ended: Callable[[], object]) -> None:
    """Calls ``ended`` once the process ``pid`` has ended, though descriptors of its links may live on in children."""
    loop.add(_Watch(loop, os.pidfd_open(pid), ended))


class _Watch:
    """A process's descriptor; readable when it has ended."""

    def __init__(self, loop: Loop, descriptor: int, ended: Callable[[], object]) -> None:
        self._loop, self._descriptor, self._ended = loop, descriptor, ended

    def fileno(self) -> int:
        return self._descriptor

    def handle(self, events: int) -> None:
        ended = select.poll()
        ended.register(self._descriptor, select.POLLIN)
        if not ended.poll(0):
            return  # the event was another descriptor's, of the same number
        self._loop.remove(self)
        os.close(self._descriptor)
        self._ended()

    def tick(self, now: float, away_s: float) -> float:
        return 1.0

    def abandon(self) -> None:
        os.close(self._descriptor)
