"""One poll loop for all links of a process's side, in both directions: a caller that waits polls; while none does, a
thread.

      caller waits:  poll ─▶ its message ─▶ goes on        no other thread is woken for it
      caller computes for longer than 20 ms, or has more to send than a socket takes:  the thread polls

So a small answer costs no switch of threads, and messages, heartbeats and deaths are seen during long computations,
too. Knows descriptors and times; not what is read.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

_GRACE_S = 0.02
"""So long after a caller has polled, the thread leaves it to the next one."""
_SHARE_S = 0.005
"""How often a caller looks for its own message while another one polls."""
_LONGEST_S = 1.0


class Handler(Protocol):
    """What has a descriptor and something to do at times."""

    def fileno(self) -> int:
        """Its descriptor."""

    def handle(self, events: int) -> None:
        """Something came, or may go."""

    def tick(self, now: float, away_s: float) -> float:
        """Called now and then; seconds until it should be again. ``away_s``: so long the process did not look."""

    def abandon(self) -> None:
        """It is served no more, or this is a child of the process whose it is: its descriptor is to be closed, and
        nothing said."""


class _Flag:
    """An event that a thread may set in the middle of setting it, as a garbage collector's finalizer does."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.RLock())
        self.is_up = False

    def set(self) -> None:
        self.is_up = True
        with self._changed:
            self._changed.notify_all()

    def clear(self) -> None:
        self.is_up = False

    def wait(self, timeout_s: float) -> None:
        with self._changed:
            if not self.is_up:
                self._changed.wait(timeout_s)


class Loop:
    """Serves handlers until they are removed; ends with :meth:`close`, or with the process."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._handlers: dict[int, Handler] = {}
        self._writers = set[int]()
        self._expecting = set[int]()
        self._turn, self._adding = threading.RLock(), threading.RLock()
        self._polled = self._ticked = time.monotonic()
        self._due = 0.0
        self._needed = _Flag()
        self._callers: list[None] = []
        """One entry for each caller that waits: the thread leaves the turn to them."""
        self._thread: threading.Thread | None = None
        self._closed = False
        itself = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forked(itself()))

    def add(self, handler: Handler) -> None:
        """Serves ``handler`` from now on."""
        with self._adding:
            self._handlers[handler.fileno()] = handler
            self._epoll.register(handler.fileno(), select.EPOLLIN)
            self._due = 0.0
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="fapool links", daemon=True)
                self._thread.start()
        self.wake()

    def remove(self, handler: Handler) -> None:
        """Serves it no more; before its descriptor is closed."""
        with self._adding, suppress(OSError, ValueError):
            self._writers.discard(handler.fileno())
            self._expecting.discard(handler.fileno())
            if self._handlers.pop(handler.fileno(), None) is not None:
                self._epoll.unregister(handler.fileno())

    def writing(self, handler: Handler, wanted: bool) -> None:
        """Whether ``handler`` is to be told when more can be sent."""
        with self._adding, suppress(OSError, ValueError):
            if handler.fileno() in self._handlers:
                (self._writers.add if wanted else self._writers.discard)(handler.fileno())
                self._epoll.modify(handler.fileno(), select.EPOLLIN | (select.EPOLLOUT if wanted else 0))
        if wanted:
            self.wake()

    def expecting(self, handler: Handler, wanted: bool) -> None:
        """Whether there is something to send that waits for what ``handler`` will receive."""
        with self._adding:
            (self._expecting.add if wanted else self._expecting.discard)(handler.fileno())
        if wanted:
            self.wake()

    def wait(self, ready: Callable[[], object], deadline: Callable[[], float] | None = None) -> bool:
        """Serves all handlers until ``ready()``, or until ``deadline()``, a time of ``time.monotonic``, is past.

        Returns:
            whether it is ready.
        """
        if ready():
            return True
        self._callers.append(None)
        try:
            return self._waited(ready, deadline)
        finally:
            self._callers.pop()

    def _waited(self, ready: Callable[[], object], deadline: Callable[[], float] | None) -> bool:
        overdue = False
        while not ready():
            rest = _LONGEST_S if deadline is None else deadline() - time.monotonic()
            if rest < 0 and overdue:
                return False
            # This process may have been stopped, and all that it waits for have come: one look more.
            overdue = rest < 0
            if self._closed:
                return bool(ready())
            if not self._turn.acquire(blocking=False):
                os.eventfd_write(self._wake, 1)
                if not self._turn.acquire(timeout=_SHARE_S):
                    continue
            try:
                if not ready():
                    self._poll(rest)
            finally:
                self._polled = time.monotonic()
                self._turn.release()
                if self._writers or self._expecting:
                    self._needed.set()
        return True

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other thread polls meanwhile: a descriptor may be closed, whose number another one gets at once."""
        while not self._turn.acquire(timeout=_SHARE_S):
            self.wake()
        try:
            yield
        finally:
            self._turn.release()

    def wake(self) -> None:
        """There is something to do for the thread, too."""
        self._needed.set()
        with suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Ends the thread; handlers are no longer served."""
        self._closed = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._adding:
            if self._wake >= 0:
                self._forget()

    def _serve(self) -> None:
        while not self._closed:
            left_s = self._polled + _GRACE_S - time.monotonic()
            # Nothing is read in a caller's place while callers do it themselves, unless something waits to be sent.
            if not self._needed.is_up and not self._expecting and left_s > 0:
                self._needed.wait(left_s)
                continue
            self._needed.clear()
            if self._callers or not self._turn.acquire(blocking=False):
                self._needed.wait(_GRACE_S)  # a caller polls, for all
                continue
            try:
                if not self._closed:
                    self._poll(_LONGEST_S)
            finally:
                self._turn.release()

    def _poll(self, timeout_s: float) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._tick(now)
        for descriptor, events in self._epoll.poll(max(0.0, min(timeout_s, self._due - now))):
            if descriptor == self._wake:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            handler = self._handlers.get(descriptor)
            if handler is not None:
                handler.handle(events)

    def _tick(self, now: float) -> None:
        away_s, self._ticked = max(0.0, now - max(self._ticked, self._due)), now
        with self._adding:
            handlers = list(self._handlers.values())
        self._due = now + min([handler.tick(now, away_s) for handler in handlers], default=_LONGEST_S)

    def _forget(self) -> None:
        """In a forked child: ends of links that it holds would keep the other ends from seeing this process's end."""
        self._closed = True
        for handler in self._handlers.values():
            handler.abandon()
        self._handlers = {}
        self._epoll.close()
        os.close(self._wake)
        self._wake = -1


def _forked(loop: Loop | None) -> None:
    if loop is not None and loop._wake >= 0:
        loop._forget()
