"""A pool rank's lease, as the rank keeps it: one job has it, and those that asked in vain are remembered for a while.

    asked for ──▶ had by one job ──▶ given back by the last of its links ──▶ had by the one that waits with the least
                       └── recalled: it is not used, or its job is silent, and another asks ──▶

Jobs are known by their tokens, and by how many ranks they say they have. Knows links; not what a lease is for.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import Header, Op, Status
from fapool_plugin.wire.wishes import Wishes

_WAITS_S = 2.0
"""A job that was refused asks again within this time, or does not wait any more: four times what it takes to ask."""


class _Waiting(NamedTuple):
    """A job that was refused."""

    since: float
    last: float
    """When it asked first and last."""
    has: int
    """Ranks that it had then."""
    link: Link


class Lease:
    """One rank's. Links are answered by one thread while another computes, so both may ask.

    Args:
        is_leaving: whether the rank is to leave, and takes no new lease.
    """

    def __init__(self, is_leaving: Callable[[], bool] = bool) -> None:
        self.token: int | None = None
        """Names the lease there is."""
        self._is_leaving = is_leaving
        self._holders = set[Link]()
        self._recalled: dict[Link, int] = {}
        """What was recalled from whom, until they take it again."""
        self._waiting: dict[int, _Waiting] = {}
        self._began = self._used = 0.0
        self._idle_s = self._silent_s = math.inf
        self._lock = threading.RLock()

    def refusal(self, link: Link, asked: Header, *, at_work: bool = False) -> Header | None:
        """The answer to a HELLO that cannot be granted now; None: it can be, as long as nothing else happens.

        Args:
            link: who asks.
            asked: the HELLO.
            at_work: the rank computes: what it computes for is not recalled.
        """
        with self._lock:
            now, leaving = time.monotonic(), self._is_leaving()
            # A base rank that has parted with a rank that leaves must not get it again from the others' part.
            if asked.token == self.token and (not leaving or link in self._holders):
                return None
            if not leaving:
                before = self._in_line(now).get(asked.token)
                self._waiting[asked.token] = _Waiting(before.since if before else now, now, max(0, asked.peers), link)
                free = self.token is None or (not at_work and self._is_unused(now))
                if free and self._first(now) == asked.token:
                    return None
            held_ns = round((now - self._began) * 1e9) if self.token is not None else 0
            return Header(op=Op.HELLO, status=Status.BUSY, token=asked.token, extra=held_ns)

    def has(self, link: Link) -> bool:
        """Whether the lease is had over this link."""
        return link in self._holders

    def grant(self, link: Link, asked: Header) -> None:
        """A job has it now, over this link too."""
        with self._lock:
            now = time.monotonic()
            if self.token != asked.token:
                self._began = now
            self.token, self._used = asked.token, now
            self._idle_s, self._silent_s = (ns / 1e9 if ns > 0 else math.inf for ns in (asked.extra, asked.clock))
            self._holders.add(link)
            self._waiting.pop(asked.token, None)
            self._recalled.pop(link, None)

    @property
    def job(self) -> str:
        """Who has it, for people; empty: it is free."""
        with self._lock:
            return min((link.name for link in self._holders), default="")

    def used(self) -> None:
        """The job that has it was answered."""
        self._used = time.monotonic()

    def recall(self) -> list[Link]:
        """It is free. Returns the links over which it was had; their jobs are told."""
        with self._lock:
            links, token, self.token = list(self._holders), self.token or 0, None
            self._recalled |= dict.fromkeys(links, token)
            self._holders.clear()
        for link in links:
            link.beat()
        return links

    def leave(self, link: Link) -> bool:
        """A link's part in it ends. Whether it is free now."""
        with self._lock:
            self._holders.discard(link)
            if link.lost:
                self._recalled.pop(link, None)
            if not self._holders:
                self.token = None
            return self.token is None

    def wishes(self, link: Link) -> Wishes:
        """What a link's other end is told with every heartbeat."""
        with self._lock:
            recalled = self._recalled.get(link, 0)
            if link not in self._holders:
                return Wishes(recalled=recalled)
            waiting = self._in_line(time.monotonic()).values()
            least = min((one.has for one in waiting), default=0)
            return Wishes(len(waiting), least, int(self._is_leaving()), recalled)

    def _in_line(self, now: float) -> dict[int, _Waiting]:
        self._waiting = {
            token: one for token, one in self._waiting.items() if now - one.last < _WAITS_S and not one.link.lost
        }
        return self._waiting

    def _first(self, now: float) -> int:
        """Who has least, and of those who has waited longest."""
        return min(self._in_line(now).items(), key=lambda one: (one[1].has, one[1].since))[0]

    def _is_unused(self, now: float) -> bool:
        gone = all(link.lost or link.silent_s > self._silent_s for link in self._holders)
        return gone or now - self._used > self._idle_s
