"""What one end of a link still has to send, in order.

    queue:  messages whose first may wait for room at the other end
    bytes:  of messages that are on their way, what the socket did not take yet

What gives room back, and what says that this end lives, goes past the queue, never past the bytes. Knows a socket; not
what is sent. Its link's lock is held by who calls.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.messages import Packed

Attached = socket.socket | Descriptor | None


class Outgoing:
    """Of one socket.

    Args:
        sock: does not block.
        writing: told whether the socket did not take all.
        waiting: told whether the first message waits for room.
    """

    def __init__(self, sock: Any, writing: Callable[[bool], object], waiting: Callable[[bool], object]) -> None:
        self._socket, self._writing, self._waiting = sock, writing, waiting
        self._queue: deque[tuple[Iterator[Packed | None], Attached]] = deque()
        self._bytes: deque[tuple[memoryview, Attached]] = deque()
        """And what goes with them."""
        self._left: deque[int] = deque()
        """Of each message that is not out yet, the number of buffers left."""
        self._is_busy = self._is_waiting = False

    def __len__(self) -> int:
        """Messages that are not out yet."""
        return len(self._queue) + len(self._left)

    @property
    def is_behind(self) -> bool:
        """Whether the socket did not take all."""
        return bool(self._bytes)

    @property
    def is_queued(self) -> bool:
        """Whether a message that is added now goes later."""
        return bool(self._queue)

    def add(self, steps: Iterator[Packed | None], attached: Attached = None, *, first: bool = False) -> None:
        """Sends a message, or what of it can go now. Raises OSError.

        Args:
            steps: what goes out, in order; None: nothing until the other end has given room back.
            attached: goes with it, and is closed here.
            first: past the queue.
        """
        if self._is_busy:
            # A garbage collector's finalizer, in the middle of another message of this thread.
            self._queue.append((steps, attached))
            return
        (self._queue.appendleft if first else self._queue.append)((steps, attached))
        self.advance()

    def advance(self) -> None:
        """Sends what has room. Raises OSError."""
        if self._is_busy:
            return
        self._is_busy, waits = True, False
        try:
            while self._queue and not waits:
                steps, attached = self._queue[0]
                for step in steps:
                    if waits := step is None:
                        break
                    self._post(step, attached)
                    if attached is not None:
                        attached = None
                        self._queue[0] = steps, None
                else:
                    self._queue.popleft()
        finally:
            self._is_busy = False
        if waits != self._is_waiting:
            self._is_waiting = waits
            self._waiting(waits)

    def flush(self) -> bool:
        """Sends what the socket takes now; whether that was anything. Raises OSError."""
        any_sent = False
        while self._bytes:
            buffer, attached = self._bytes[0]
            try:
                sent = self._socket.sendmsg([buffer], _rights(attached))
            except BlockingIOError:
                return any_sent
            if attached is not None:
                attached.close()
            any_sent = True
            if sent < len(buffer):
                self._bytes[0] = buffer[sent:], None
                continue
            self._bytes.popleft()
            self._left[0] -= 1
            if not self._left[0]:
                self._left.popleft()
        self._writing(False)
        return any_sent

    def clear(self) -> None:
        """Nothing of it will go."""
        self._queue.clear()
        self._bytes.clear()

    def _post(self, message: Packed, attached: Attached) -> None:
        sent = 0
        if not self._bytes:
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
                self._bytes.append((memoryview(bytes(rest)) if borrowed else rest, attached))
                attached, left = None, left + 1
        self._left.append(left)
        self._writing(True)


def _rights(attached: Attached) -> list[tuple[int, int, bytes]]:
    if attached is None:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, attached.fileno().to_bytes(4, "little"))]
