"""Memory that two processes map: one made it and reads, the other one writes.

It has no name and no file (memfd_create), so it ends with the last process that maps it. Its size is sealed: an end
that made it smaller would kill the other one at the next access. What is in it is not known here.

Made for devices, too: registered once, by the end that writes from one, slots are page-locked host memory, and copies
from the device into a slot need no buffer between:

    mapped ── registered ── copies, each waited for ── unregistered ── unmapped

A forked child inherits the mapping and not the registration: it undoes none.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import insort
from contextlib import suppress

import numpy as np

from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.device_memory import DeviceMemory
from fapool_plugin.wire.messages import LinkLost

RING_BYTES = 64 * 1024 * 1024
"""Of address space; memory is taken where something was written."""
_LARGEST = 1024 * 1024 * 1024
_ALIGNED = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Memory:
    """A ring in host memory, which may be registered for a device.

    Args:
        there: its bytes, contiguous.
    """

    def __init__(self, there: np.ndarray) -> None:
        self._bytes, self.size, self.address = there, len(there), int(there.ctypes.data)
        self._device: DeviceMemory | None = None
        self._owner = os.getpid()

    def part(self, start: int, length: int) -> np.ndarray:
        """These bytes of it. Raises LinkLost if there are no such."""
        self.check(start, length)
        return self._bytes[start : start + length]

    def check(self, start: int, length: int) -> int:
        """``start``. Raises LinkLost if there are no such bytes."""
        return within(start, length, self.size)

    def register(self, device: DeviceMemory) -> str:
        """Page-locked from now on, until :meth:`unregister` or its end. Why not, if it cannot be; it is used as it is
        then."""
        try:
            device.register(self.address, self.size)
        except RuntimeError as error:
            return str(error)
        self._device = device
        return ""

    def unregister(self) -> None:
        """No copy of a device is under way."""
        device, self._device = self._device, None
        if device is not None and os.getpid() == self._owner:
            with suppress(RuntimeError):  # the device may be lost: its driver has let go then
                device.unregister(self.address)

    def __del__(self) -> None:
        if hasattr(self, "_device"):  # else it was never mapped
            self.unregister()


class Ring(Memory):
    """Such memory as two processes map.

    Args:
        descriptor: of it; stays the caller's.

    Raises:
        LinkLost: its size is not sealed, or it is none that anybody here makes.
    """

    def __init__(self, descriptor: Descriptor) -> None:
        number = descriptor.fileno()
        try:
            seals, size = fcntl.fcntl(number, fcntl.F_GET_SEALS), os.fstat(number).st_size
            if seals & _SEALS != _SEALS or not 0 < size <= _LARGEST:
                raise LinkLost(f"offers {size} bytes of memory with the seals {seals}: {_SEALS} are needed")
            super().__init__(np.frombuffer(mmap.mmap(number, size), dtype=np.uint8))
        except (OSError, ValueError) as error:
            raise LinkLost(f"offers memory that cannot be mapped: {error}") from error

    @classmethod
    def made(cls, size: int) -> tuple[Ring, Descriptor]:
        """New memory, sealed, and its descriptor for the other process. Raises OSError if there is none to be had."""
        made = Descriptor(os.memfd_create("fapool ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
        os.ftruncate(made.fileno(), size)
        fcntl.fcntl(made.fileno(), fcntl.F_ADD_SEALS, _SEALS)
        return cls(made), made


def within(start: int, length: int, size: int) -> int:
    """``start``, if so many bytes from there are in a ring of this size. Raises LinkLost if not."""
    if not 0 <= start < start + length <= size:
        raise LinkLost(f"speaks of {length} bytes from {start} of a ring of {size}")
    return start


class Slots:
    """Which parts of [start, start + size) are in use.

    The lowest that is free is taken, not the one after the last: what was written a moment ago is still mapped and in
    the caches, and a link that is never more than a few messages behind keeps to the first few MiB.
    """

    def __init__(self, start: int, size: int) -> None:
        self._start, self._stop = start, start + size
        self._used: list[tuple[int, int]] = []

    def take(self, nbytes: int) -> int | None:
        """Where so many bytes are free, in use from now on; None: nowhere yet."""
        at = self._start
        for start, stop in self._used:
            if start - at >= nbytes:
                break
            at = stop
        stop = at + -(-nbytes // _ALIGNED) * _ALIGNED
        if at + nbytes > self._stop:
            return None
        insort(self._used, (at, stop))
        return at

    def give(self, start: int) -> None:
        """What was taken at ``start`` is free again."""
        self._used = [used for used in self._used if used[0] != start]
