"""Which carrier a link has: what its ends offer and agree on at HELLO.

    base ── HELLO, a ring in host memory ─────────▶ rank      with neither: inline
    base ◀── HELLO, the rank's ─────────────────── rank      shm, as far as both have one
    base ◀── HELLO, a ring on its device ────────── rank      (the same message) if both have a device
    base: fills it
    base ── HELLO, a ring on the base's device ───▶ rank: looks at its own; fills the base's
    base ◀── HELLO, all came, and it could ──────── rank
    base: looks at its own
    base ── HELLO, all came ──────────────────────▶ rank
    base ◀── HELLO ──────────────────────────────── rank      ipc

Where anything of this fails shm stays, and the base has the last word: each end lets go of the other's memory before it
says so, and gives its own back when the other has.

Between machines, where that is asked for, the last five are said of memory that NIXL writes to, and inline stays else.
Knows rings and carriers; not how messages travel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, suppress

import torch

from fapool_plugin.wire import proof
from fapool_plugin.wire.carrier import Carrier
from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.device_memory import DeviceMemory
from fapool_plugin.wire.inline import Inline
from fapool_plugin.wire.ipc import DeviceRing, Ipc, WhenEnded
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.modes import real_tensors
from fapool_plugin.wire.nixl import Nixl
from fapool_plugin.wire.ring import Ring
from fapool_plugin.wire.shm import Shm
from fapool_plugin.wire.window import Window

PROVED, UNOPENED, LOSES = 1, 0, 2
"""What a rank answers to the name of the base's ring: it has filled it, and its own held all that the base wrote; it
could not fill it; its own did not."""
AGREED = 3
"""What the base says then."""


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
        self.lost_bytes = False
        """Whether memory was tried that does not hold what is written to it."""
        self._asks, self._ring_bytes, self._when_ended = asks, ring_bytes, when_ended
        self._ring: Ring | None = None
        self._mine: DeviceRing | None = None
        self._theirs: DeviceRing | None = None
        self._new_window = window
        self._window: Window | None = None
        """From when it is named or opened until it is agreed on."""
        self._tried: Ipc | Nixl | None = None
        """What carries bodies as soon as it is agreed on."""

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
            self._mine = self._mine or DeviceRing(self.device, self._ring.size)
            return self._mine.name()
        except RuntimeError as error:
            self.stay(f"no memory of this device can be shared: {error}")
            self.drop()
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
        if self.device is None or self._ring is None or not self.has_device_ring or self._theirs is not None:
            raise LinkLost("names memory that was not asked for")
        try:
            self._theirs = DeviceRing.named(self.device, name, self._ring.size)
        except LinkLost:
            raise
        except RuntimeError as error:
            self.stay(f"the other end's device memory cannot be opened here: {error}")
            return False
        return True

    def fill(self) -> bool:
        """Writes to the other end's ring, which is open; whether it could."""
        carrier, _, nonce = self._trying()
        try:
            with real_tensors():
                proof.fill(carrier, nonce)
        except LinkLost as error:
            self.stay(f"the other end's memory cannot be written to from here: {error}")
            return False
        return True

    def holds(self) -> bool:
        """Whether this end's ring has all that the other one wrote to it."""
        carrier, nonce, _ = self._trying()
        try:
            with real_tensors():
                lacking = proof.lacking(carrier, nonce)
        except LinkLost as error:
            self.stay(f"what the other end wrote cannot be read: {error}")
            return False
        if lacking:
            self.distrust(f"{lacking} of {carrier.mine_bytes} bytes were not what the other end wrote here")
        return not lacking

    def distrust(self, why: str) -> None:
        """As :meth:`stay`: what was written arrived otherwise, and nothing reported that."""
        self.lost_bytes = True
        self.stay(why)

    def use_rings(self) -> None:
        """Each end has filled the other's, and found all of it."""
        tried, self._tried = self._tried, None
        if tried is None:
            raise LinkLost("speaks of memory that was not agreed on")
        self.carrier.close()
        self.carrier = tried
        if self._window is not None:
            self._window.agreed()
            if self.device is not None:
                self.notes.append("bodies come to the host first: NIXL is given no memory of GPUs")
        else:
            self._ring = None
        self._window = self._mine = self._theirs = None

    def answered(
        self, keep: int, name: torch.Tensor | None, theirs: Descriptor | None
    ) -> tuple[int, torch.Tensor | None, Descriptor | None]:
        """What goes with a pool rank's answer to a HELLO with these: its ``keep``, its ring on a device, its ring in
        host memory. Raises LinkLost as :meth:`agree` and :meth:`open` do."""
        made = self.agree(theirs)
        if name is not None:
            found = UNOPENED
            if self.open(name):
                found = LOSES if not self.holds() else PROVED if self.fill() else UNOPENED
            return found, None, made
        if keep == AGREED:
            self.use_rings()  # before the base may
            return PROVED, None, made
        if keep:
            return 0, self.name() if keep == self.wish else None, made
        self.drop()
        return 0, None, made

    def stay(self, why: str) -> None:
        """Bodies go as they do now, from now on and for good. The other end's memory is let go of; it may have this
        end's open, until :meth:`drop`."""
        how = "on the link's socket" if self._has_window else "through host memory"
        self.notes.append(f"bodies go {how}: {why}")
        self.uses_device_rings, self._new_window = False, None
        self._let_go()

    def drop(self) -> None:
        """Rings on devices or for NIXL that were not agreed on go; the other end has let go of them."""
        self._let_go()
        if self._mine is not None:
            self._mine.close()
            self._mine = None

    def close(self) -> None:
        """Nothing is copied any more by this end."""
        self.carrier.close()
        if self._mine is not None and self._theirs is not None:
            self._trying()[0].close()  # the other end may be filling it: it goes back when that has ended
        # Else it is not known whose process that is: what it may have open is kept until this one ends.
        self._mine = None
        self.drop()
        self.carrier, self._ring = Inline(), None

    def _let_go(self) -> None:
        self._tried = None
        if self._window is not None:
            self._window.close()
            self._window = self._new_window = None  # each takes addresses for good
        if self._theirs is not None:
            self._theirs.close()
            self._theirs = None

    def _trying(self) -> tuple[Ipc | Nixl, int, int]:
        """What is to carry bodies, and what this end's ring and the other's are tried with."""
        window, mine, theirs = self._window, self._mine, self._theirs
        if window is not None:
            self._tried = self._tried or Nixl(window, self._asks, self.device, self.notes)
            return self._tried, window.nonce, window.their_nonce
        if mine is None or theirs is None or self.device is None:
            raise LinkLost("speaks of memory of a device that was not agreed on")
        self._tried = self._tried or Ipc(mine, theirs, self._asks, self.device, self._when_ended)
        return self._tried, mine.nonce, theirs.nonce

    def _made(self) -> Window:
        """This end's. Raises RuntimeError."""
        assert self._new_window is not None
        if self._window is None:
            self._window = self._new_window()
        return self._window
