"""Ends of processes, told by the loop that serves links: children of one that is gone may hold its sockets."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from fapool_plugin.wire.loop import Loop


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
