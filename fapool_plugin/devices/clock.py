"""Time as a device takes it: the host launches work and goes on, so its own clock times launches only.

    host      now ── launches ── now ............. since: None, not there yet ..... since: seconds
    device      └─ event ── computes ── event ┘

Elsewhere a moment is the host's time, there at once. Knows no work. Has run with stand-ins for events only, never
on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Events = Callable[[torch.device], Any]
"""Makes an event with timing, recorded on the device's current stream."""


def recorded(device: torch.device) -> Any:
    """CUDA's."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Moment:
    """A point of the host's program; on a device, when it has come as far."""

    __slots__ = ("event", "ns")

    def __init__(self, event: Any = None) -> None:
        self.event, self.ns = event, time.perf_counter_ns()

    def since(self, earlier: Moment) -> float | None:
        """Seconds from an earlier one of the same clock to this one; None if the device has not come as far. Does not
        wait."""
        if self.event is None or earlier.event is None:
            return (self.ns - earlier.ns) / 1e9
        return earlier.event.elapsed_time(self.event) / 1e3 if self.event.query() else None

    def wait(self) -> None:
        """Until the device has come as far."""
        if self.event is not None:
            self.event.synchronize()

    def waited_since(self, earlier: Moment) -> float:
        """As :meth:`since`, after waiting for it."""
        self.wait()
        seconds = self.since(earlier)
        assert seconds is not None
        return seconds


class Clock:
    """Tells moments.

    Args:
        device: whose.
        events: makes events on a CUDA device; tests have others. Elsewhere the host's time is all there is.
    """

    def __init__(self, device: torch.device, events: Events = recorded) -> None:
        self._events = events
        self.move_to(device)

    def move_to(self, device: torch.device) -> None:
        """Another device's moments, from now on."""
        self.device = device

    def now(self) -> Moment:
        """What is launched after this has not begun then."""
        return Moment(self._events(self.device) if self.device.type == "cuda" else None)
