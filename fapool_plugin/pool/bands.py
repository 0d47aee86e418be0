"""A rank's work in bands of queries: each should take no longer than a step, and is progress once it is done.

    launched   band | band | band | ...
    counted         step   step   step      on a CPU at once, on a device when it has come past the band

Knows speeds and moments; not what is computed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from fapool_plugin.devices.clock import Clock, Moment
from fapool_plugin.wire.messages import STEP_S

_SLOW_FLOPS_S, _SLOW_GPU_FLOPS_S = 2e9, 1e12
"""What a rank is taken to compute in a second until it has computed something."""
_MEASURED_S = 0.01
"""What is over sooner says how fast a rank is at least, and not how slow."""


class Bands:
    """Of one rank.

    Args:
        clock: tells when a band is done.
        step: called for each band that is.
    """

    def __init__(self, clock: Clock, step: Callable[[], object]) -> None:
        self.launched = 0
        """How many there were so far."""
        self._clock, self._step = clock, step
        self._flops_s = _SLOW_GPU_FLOPS_S if clock.device.type == "cuda" else _SLOW_FLOPS_S
        self._open: deque[tuple[Moment, Moment, int]] = deque()
        """Beginning, end and work of those that are not counted."""

    def cut(self, queries: int, flops: int) -> Iterator[slice]:
        """Runs of queries that should take no longer than a step each, by the speed of those before; ``flops`` of
        each query."""
        start = 0
        while start < queries:
            stop = min(queries, start + max(1, int(self._flops_s * STEP_S / flops)))
            began = self._clock.now()
            yield slice(start, stop)
            self._open.append((began, self._clock.now(), (stop - start) * flops))
            self.launched += 1
            self.count()
            start = stop

    def count(self, until: int = 0) -> None:
        """Counts bands that are done. Waits for the first ``until`` of all that were launched."""
        while self._open:
            began, ended, flops = self._open[0]
            if self.launched - len(self._open) < until:
                ended.wait()
            seconds = ended.since(began)
            if seconds is None:
                return
            self._open.popleft()
            speed = flops / (took_s := max(1e-6, seconds))
            if took_s > _MEASURED_S or speed > self._flops_s:
                self._flops_s = min(speed, 4 * self._flops_s)
            self._step()
