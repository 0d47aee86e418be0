"""What forwards took, told to who learns from it once the device has computed them: at the next begin.

    begin ── launches ── end: not computed yet ...... begin of the next: computed, and learned from

A local forward would else "take" as long as its launch. Knows forwards and moments; not what is learned.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from fapool_plugin.base.forward import Forward
from fapool_plugin.devices.clock import Moment
from fapool_plugin.devices.gpu import is_capturing

_MOST = 64
"""Forwards that may wait to be read; of more the first are forgotten."""


class Durations:
    """Of one model's prompts and planned forwards, in their order.

    Args:
        learn: each is called with a forward and its seconds.
    """

    def __init__(self, *learn: Callable[[Forward, float], object]) -> None:
        self._learn, self._reading = learn, threading.Lock()
        self._waiting: deque[tuple[Forward, Moment, Moment]] = deque(maxlen=_MOST)

    def add(self, forward: Forward, ended: Moment) -> None:
        """A forward has ended on the host. Reads, too: on a CPU it was computed then."""
        began, ended = forward.took or (forward.began, ended)
        if began is not None and (forward.choice is not None or forward.phase == "prefill"):
            self._waiting.append((forward, began, ended))
        self.read()

    def read(self) -> None:
        """Learns from those that have been computed. Does not wait."""
        if not self._waiting or is_capturing() or not self._reading.acquire(blocking=False):
            return
        try:
            while self._waiting:
                forward, began, ended = self._waiting[0]
                seconds = ended.since(began)
                if seconds is None:
                    return
                self._waiting.popleft()
                for learn in self._learn:
                    learn(forward, seconds - forward.apart_s)
        finally:
            self._reading.release()
