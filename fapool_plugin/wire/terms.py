"""Which carrier a link has: what its ends offer and agree on at HELLO.

    base ── HELLO, a ring in host memory ─────────▶ rank      with neither: inline
    base ◀── HELLO, the rank's ─────────────────── rank      shm, as far as both have one
    base ◀── HELLO, a ring on its device ────────── rank      (the same message) if both have a device
    base ── HELLO, a ring on the base's device ───▶ rank
    base ◀── HELLO, it could be opened ──────────── rank      ipc, if each opens the other's; else shm stays

Between machines, where that is asked for, the last three are said of memory that NIXL writes to, and inline stays else.
Knows rings and carriers; not how messages travel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress

import torch

from fapool_plugin.wire.carrier import Carrier
from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.device_memory import DeviceMemory
from fapool_plugin.wire.inline import Inline
from fapool_plugin.wire.ipc import DeviceRing, Ipc, WhenEnded
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.nixl import Nixl
from fapool_plugin.wire.ring import Ring
from fapool_plugin.wire.shm import Shm
from fapool_plugin.wire.window import Window


class Terms:
    """Of one end.

    Args:
        asks: whether this is the base's end.
        ring_bytes: of the memory for bodies that it offers; 0: none is offered.
        when_ended: calls a function once a process has ended.
        window: makes memory that NIXL writes to; None: there is to be none.
    """

    def __init__(
        self, asks: bool, ring_bytes: int, when_ended: WhenEnded, window: Callable[[], Window] | None = None
    ) -> None:
        self.carrier: Carrier = Inline()
        self.device: DeviceMemory | None = None
        """Where this end computes; None: on a CPU."""
        self.uses_device_rings = True
        self.notes: list[str] = []
        """What did not work as it might have, for people."""
        self._asks, self._ring_bytes, self._when_ended = asks, ring_bytes, when_ended
        self._ring: Ring | None = None
        self._mine: DeviceRing | None = None
        self._theirs: DeviceRing | None = None
        self._new_window = window
        self._window: Window | None = None
        """From when it is named or opened until it is agreed on."""

    @property
    def awaits_ring(self) -> bool:
        """Whether a descriptor may come with a message."""
        return not self._asks or self._ring is not None

    @property
    def wish(self) -> int:
        """What the base's HELLO asks for, ``keep``: 1: rings on devices; 2: memory that NIXL writes to; 0: neither."""
        return 2 if self._has_window else int(self.has_device_ring)

    @property
    def _has_window(self) -> bool:
        return self._new_window is not None and isinstance(self.carrier, Inline)

    @property
    def has_device_ring(self) -> bool:
        """Whether this end could have one, and has not agreed on it yet."""
        near = not self._asks or self._ring_bytes > 0
        return near and self.device is not None and self.uses_device_rings and not isinstance(self.carrier, Ipc)

    def offer(self) -> Descriptor | None:
        """A ring for what the other end sends, to go with HELLO; None: it has one, or none is to be had."""
        if self._ring_bytes and isinstance(self.carrier, Inline):
            with suppress(OSError):
                self._ring, made = Ring.made(self._ring_bytes)
                return made
        return None

    def agree(self, theirs: Descriptor | None) -> Descriptor | None:
        """Bodies go through memory from now on, if the other end has sent a ring, with HELLO or with its answer.
        Returns this end's, to go with the answer. Raises LinkLost if that is not what it was to send."""
        if theirs is None:
            return None
        with closing(theirs):
            ring, made = Ring(theirs), None
        if not isinstance(self.carrier, Inline) or self._asks > (self._ring is not None):
            raise LinkLost("offers memory that was not asked for")
        if self._ring is None:
            try:
                self._ring, made = Ring.made(ring.size)
            except OSError:
                return None
        self.carrier = Shm(self._ring, ring, self._asks, self.device, self.notes)
        return made

    def name(self) -> torch.Tensor | None:
        """What the other end opens this end's ring by, on a device or for NIXL; None: there is none."""
        if self._has_window:
            try:
                return self._made().name()
            except RuntimeError as error:
                self.stay(f"no memory can be written to from elsewhere: {error}")
                return None
        if self.device is None or self._ring is None or not self.has_device_ring:
            return None
        try:
            self._mine = DeviceRing(self.device, self._ring.size)
            return self._mine.name()
        except RuntimeError as error:
            self.stay(f"no memory of this device can be shared: {error}")
            return None

    def open(self, name: torch.Tensor) -> bool:
        """Opens the other end's; whether it could. Raises LinkLost if that is no name, or was not asked for."""
        if self._has_window and (self._asks or self._window is not None):
            try:
                self._made().open(name)
            except LinkLost:
                raise
            except RuntimeError as error:
                self.stay(f"the other end's memory cannot be written to from here: {error}")
                return False
            return True
        if self.device is None or self._ring is None or not self.has_device_ring:
            raise LinkLost("names memory that was not asked for")
        try:
            self._theirs = DeviceRing.named(self.device, name, self._ring.size)
        except LinkLost:
            raise
        except RuntimeError as error:
            self.stay(f"the other end's device memory cannot be opened here: {error}")
            return False
        return True

    def use_rings(self) -> None:
        """Each end has opened the other's."""
        if self._window is not None:
            self.carrier = Nixl(self._window, self._asks, self.device, self.notes)
            self._window = None
            return
        if self._mine is None or self._theirs is None or self.device is None:
            raise LinkLost("speaks of memory of a device that was not agreed on")
        self.carrier.close()
        self.carrier = Ipc(self._mine, self._theirs, self._asks, self.device, self._when_ended)
        self._ring = self._mine = self._theirs = None

    def answered(
        self, keep: int, name: torch.Tensor | None, theirs: Descriptor | None
    ) -> tuple[int, torch.Tensor | None, Descriptor | None]:
        """What goes with a pool rank's answer to a HELLO with these: its ``keep``, its ring on a device, its ring in
        host memory. Raises LinkLost as :meth:`agree` and :meth:`open` do."""
        made = self.agree(theirs)
        if name is not None:
            if opened := self.open(name):
                self.use_rings()  # before the base may
            return int(opened), None, made
        if keep:
            return 0, self.name() if keep == self.wish else None, made
        self.drop()
        return 0, None, made

    def stay(self, why: str) -> None:
        """Bodies go as they do now, from now on and for good."""
        how = "on the link's socket" if self._has_window else "through host memory"
        self.notes.append(f"bodies go {how}: {why}")
        self.uses_device_rings, self._new_window = False, None
        self.drop()

    def close(self) -> None:
        """Nothing is copied any more."""
        self.carrier.close()
        self.drop()
        self.carrier, self._ring = Inline(), None

    def drop(self) -> None:
        """Rings on devices or for NIXL that were not agreed on."""
        if self._window is not None:
            self._window.close()
            self._window = self._new_window = None  # each takes addresses for good
        for ring in (self._theirs, self._mine):
            if ring is not None:
                ring.close()
        self._mine = self._theirs = None

    def _made(self) -> Window:
        """This end's. Raises RuntimeError."""
        assert self._new_window is not None
        if self._window is None:
            self._window = self._new_window()
        return self._window
