"""Bodies between machines, written by NIXL into a ring of the other end's.

    base ── HELLO: would have it ─────────────────▶ rank: makes an agent and a ring
    base ◀── HELLO, its ring's name ─────────────── rank
    base: opens it, and fills it
    base ── HELLO, the base's name ───────────────▶ rank: looks at every byte; opens the base's, and fills it
    base ◀── HELLO ──────────────────────────────── rank
    base: looks at every byte
    base ── HELLO: all came ──────────────────────▶ rank
    base ◀── HELLO ──────────────────────────────── rank      from here on; before, and where any of this fails: inline

    sender      body into its copy ── WRITE ── waits for its own ── header ──▶
                next part into its copy ─┘                           receiver: copies out, then looks at it

As with shm, but what is written to the ring is written to a copy of it, which NIXL writes from. An end on a device has
both page-locked, where that can be. Has run between processes of one machine only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fapool_plugin.wire.device_memory import DeviceMemory
from fapool_plugin.wire.messages import Body, Laid, LinkLost
from fapool_plugin.wire.shm import Shm
from fapool_plugin.wire.window import Window


class Nixl(Shm):
    """One end's.

    Args:
        window: both rings; opened.
        asks: whether this is the base's end.
        device: where this end computes; None: on a CPU.
        notes: told, for people, if memory cannot be page-locked.
    """

    name = "nixl"

    def __init__(
        self, window: Window, asks: bool, device: DeviceMemory | None = None, notes: list[str] | None = None
    ) -> None:
        super().__init__(window.mine, window.theirs, asks, device, notes)
        self._window = window

    def close(self) -> None:
        """See :class:`Carrier`."""
        super().close()
        self._window.close()

    def write(self, start: int, laid: Laid, nbytes: int) -> Iterator[int]:
        """See :class:`Slotted`. A part goes while the next is copied."""
        writing, done = None, 0
        for filled in super().write(start, laid, nbytes):
            begun = self._begun(start + done, filled - done)
            if writing is not None:
                self._there(writing)
                yield done
            writing, done = begun, filled
        if writing is not None:
            self._there(writing)
            yield nbytes

    def put(self, at: int, body: Body, done: int, piece: int) -> None:
        """See :class:`Slotted`."""
        super().put(at, body, done, piece)
        self._there(self._begun(at, piece))

    def _begun(self, start: int, nbytes: int) -> Any:
        try:
            return self._window.begin(start, nbytes)
        except RuntimeError as error:
            raise LinkLost(str(error)) from error

    def _there(self, writing: Any) -> None:
        try:
            self._window.wait(writing)
        except RuntimeError as error:
            raise LinkLost(str(error)) from error
