"""What the base does from moment to moment: one activity after the other, each with its name.

Feeds the counters and, if there is one, the trace. On a device an activity takes what the device takes for it, and is
read when that is over. Knows names and moments; not what the activities are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from fapool_plugin.observe.metrics import PhaseCounters
from fapool_plugin.observe.trace import BASE, Trace, pool_row

LINEAR, SEND, ATTENTION, WAIT, MERGE = "linear", "send", "attention", "wait", "merge"


class Moment(Protocol):
    """A point of time."""

    ns: int
    """By this process's ``time.perf_counter_ns``."""

    def since(self, earlier: Any) -> float | None:
        """Seconds; None if this one is not over yet."""


class Timeline:
    """The base's activities during pooled forwards. Forwards follow each other; inside one, only :meth:`switch`.

    Args:
        now: tells moments.
    """

    def __init__(self, now: Callable[[], Moment]) -> None:
        self.trace: Trace | None = None
        self._now = now
        self._spans: deque[tuple[PhaseCounters, str, Moment, Moment]] = deque()
        """What is over on the host, and not read."""
        self._traced_ns = 0
        self._counters: PhaseCounters | None = None
        self._activity = LINEAR
        self._since = now()

    def begin(self, counters: PhaseCounters) -> None:
        """A forward begins, with what comes before its first attention call."""
        self.read()
        self._counters, self._activity, self._since = counters, LINEAR, self._now()

    def switch(self, activity: str) -> None:
        """One activity ends, another begins."""
        now = self._now()
        if self._counters is not None:
            self._spans.append((self._counters, self._activity, self._since, now))
        self._activity, self._since = activity, now

    def read(self) -> None:
        """Counts what is over. Does not wait."""
        while self._spans:
            counters, activity, since, until = self._spans[0]
            took_s = until.since(since)
            if took_s is None:
                return
            self._spans.popleft()
            counters.base_s[activity] = counters.base_s.get(activity, 0.0) + took_s
            if self.trace is not None:
                kind = "wait" if activity == WAIT else "compute"
                # A device is behind its host.
                start_ns = max(since.ns, self._traced_ns)
                self._traced_ns = start_ns + round(took_s * 1e9)
                self.trace.span(BASE, activity, start_ns, self._traced_ns, kind=kind)  # type: ignore[arg-type]

    def rank(self, number: int, start_ns: int, took_ns: int, **details: Any) -> None:
        """A pool rank computed, by this process's clock."""
        if self.trace is not None:
            self.trace.span(pool_row(number), ATTENTION, start_ns, start_ns + took_ns, **details)

    def end(self) -> None:
        """The forward has ended."""
        self.switch(LINEAR)
        self._counters = None
        self.read()
