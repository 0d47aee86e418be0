"""What the base does from moment to moment: one activity after the other, each with its name.

Feeds the counters and, if there is one, the trace. Knows names and clocks; not what the activities are.
"""

from __future__ import annotations

import time
from typing import Any

from fapool_plugin.observe.metrics import PhaseCounters
from fapool_plugin.observe.trace import BASE, Trace, pool_row

LINEAR, SEND, ATTENTION, WAIT, MERGE = "linear", "send", "attention", "wait", "merge"


class Timeline:
    """The base's activities during pooled forwards. Forwards follow each other; inside one, only :meth:`switch`."""

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self._counters: PhaseCounters | None = None
        self._activity = LINEAR
        self._since_ns = 0

    def begin(self, counters: PhaseCounters) -> None:
        """A forward begins, with what comes before its first attention call."""
        self._counters, self._activity, self._since_ns = counters, LINEAR, time.perf_counter_ns()

    def switch(self, activity: str) -> None:
        """One activity ends, another begins."""
        now = time.perf_counter_ns()
        if self._counters is not None:
            seconds = self._counters.base_s
            seconds[self._activity] = seconds.get(self._activity, 0.0) + (now - self._since_ns) / 1e9
            if self.trace is not None:
                kind = "wait" if self._activity == WAIT else "compute"
                self.trace.span(BASE, self._activity, self._since_ns, now, kind=kind)  # type: ignore[arg-type]
        self._activity, self._since_ns = activity, now

    def rank(self, number: int, start_ns: int, took_ns: int, **details: Any) -> None:
        """A pool rank computed, by this process's clock."""
        if self.trace is not None:
            self.trace.span(pool_row(number), ATTENTION, start_ns, start_ns + took_ns, **details)

    def end(self) -> None:
        """The forward has ended."""
        self.switch(LINEAR)
        self._counters = None
