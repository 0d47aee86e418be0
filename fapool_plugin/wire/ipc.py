"""Bodies in memory of devices: each end has a ring on its own, which the other one's copies go to.

    base ── HELLO: has a device ──────────────────▶ rank
    base ◀── HELLO, its ring's handle ───────────── rank: has one, too, and a ring there
    base: opens it, and fills it
    base ── HELLO, the base's handle ─────────────▶ rank: looks at every byte; opens the base's, and fills it
    base ◀── HELLO ──────────────────────────────── rank
    base: looks at every byte
    base ── HELLO: all came ──────────────────────▶ rank
    base ◀── HELLO ──────────────────────────────── rank      from here on; before, and where any of this fails: shm

    sender      copy into the slot ── waits for its own copy ── header ──▶
    receiver                                                      copies out, waits for its own copy, looks at it

A ring's memory goes back when the process that has it open has ended: one that was lost by mistake may still be
writing, and what it hits must not be in use. A handle opens only in other processes of one machine, on devices that
reach each other. Whatever has tensors of a device goes so, however small; what the host reads of it, tables, is copied
from what was copied out. No device waits for another process. Has run with a stand-in for the library only, never on a
GPU.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch

from fapool_plugin.wire.device_memory import DeviceMemory, address_of, moved, pushed, room_on, to_host
from fapool_plugin.wire.messages import Body, Header, Laid, LinkLost, Payload, rooms, tensors_of
from fapool_plugin.wire.ring import within
from fapool_plugin.wire.slotted import Slotted, bytes_of

_LEAST = 64
"""Every body that has a tensor of a device: all are filled up to so many bytes."""
_NUMBERS, _HANDLE_BYTES = struct.Struct("<qqq"), 64
WhenEnded = Callable[[int, Callable[[], object]], object]
"""Calls a function once a process has ended."""


class DeviceRing:
    """Memory of a device: this end's own, or the other end's opened here.

    Args:
        device: whose.
        size: in bytes.
        handle: the other end's; None: memory is made. Raises RuntimeError.
        process: whose memory it is.
        nonce: of what it is tried with; the owner's; None: one is drawn.
    """

    def __init__(
        self, device: DeviceMemory, size: int, handle: bytes | None = None, process: int = 0, nonce: int | None = None
    ) -> None:
        self._device, self.size, self.process, self._is_mine = device, size, process, handle is None
        self.nonce = secrets.randbits(62) if nonce is None else nonce
        self.address = device.allocate(size) if handle is None else device.open(handle)
        self._owner: int | None = os.getpid()

    def check(self, start: int, length: int) -> int:
        """Its address. Raises LinkLost if there are no such bytes."""
        return self.address + within(start, length, self.size)

    def name(self) -> torch.Tensor:
        """How the other end opens it: bytes. Raises RuntimeError."""
        told = _NUMBERS.pack(self.size, os.getpid(), self.nonce) + self._device.handle(self.address)
        return torch.tensor(list(told), dtype=torch.uint8, device="cpu")

    @classmethod
    def named(cls, device: DeviceMemory, name: torch.Tensor, size: int) -> DeviceRing:
        """What the other end has, which must be of this size. Raises RuntimeError, LinkLost if it is of another."""
        told = bytes(name.tolist())
        if len(told) != _NUMBERS.size + _HANDLE_BYTES:
            raise LinkLost(f"offers a device's memory by {len(told)} bytes, not {_NUMBERS.size + _HANDLE_BYTES}")
        offered, process, nonce = _NUMBERS.unpack_from(told)
        if offered != size or not 0 < process < 2**31 or nonce < 0:
            raise LinkLost(f"offers {offered} bytes of process {process} on a device, and {size} were asked for")
        return cls(device, size, told[_NUMBERS.size :], process, nonce)

    def close(self) -> None:
        """Its copies have been waited for. In a forked child there is nothing to do."""
        owner, self._owner = self._owner, None
        if owner == os.getpid():
            with suppress(RuntimeError):  # a device that is lost has no memory to give back
                (self._device.free if self._is_mine else self._device.shut)(self.address)


class Ipc(Slotted):
    """One end's.

    Args:
        mine: the ring that the other end writes to.
        theirs: the ring that this end writes to.
        asks: whether this is the base's end.
        device: where this end computes.
        when_ended: waits for the other end's process.
    """

    name = "ipc"

    def __init__(
        self, mine: DeviceRing, theirs: DeviceRing, asks: bool, device: DeviceMemory, when_ended: WhenEnded
    ) -> None:
        super().__init__(mine, theirs, asks, _LEAST)
        self._device, self._from, self._to, self._when_ended = device, mine, theirs, when_ended

    def takes(self, nbytes: int) -> bool:
        """See :class:`Carrier`."""
        return nbytes > 0

    def room(self, nbytes: int) -> Body:
        """See :class:`Carrier`."""
        return room_on(self._device, nbytes)

    def tensors(self, header: Header, body: Body | None) -> list[torch.Tensor]:
        """See :class:`Carrier`."""
        found = tensors_of(header, body)
        for at, room in enumerate(rooms(header)[0]):
            if room.elements and not room.dtype.is_floating_point and self._device.holds(found[at]):
                found[at] = to_host(self._device, found[at])
        return found

    def close(self) -> None:
        """See :class:`Carrier`."""
        self._to.close()
        try:
            self._when_ended(self._to.process, self._from.close)
        except OSError:
            self._from.close()  # it has

    def on_host(self, body: Body) -> np.ndarray:
        """See :class:`Slotted`."""
        return bytes_of(to_host(self._device, body) if isinstance(body, torch.Tensor) else body)

    def goes_there(self, tensors: Payload) -> bool:
        """See :class:`Slotted`."""
        parts = (part if isinstance(part, Sequence) else [part] for part in tensors)
        return any(self._device.holds(x) for part in parts for x in part)

    def write(self, start: int, laid: Laid, nbytes: int) -> Iterator[int]:
        """See :class:`Slotted`."""
        return pushed(self._device, self._to.check(start, nbytes), laid, nbytes, max(1, nbytes))

    def aside(self, laid: Laid, nbytes: int) -> Body:
        """See :class:`Slotted`."""
        body = room_on(self._device, nbytes)
        deque(pushed(self._device, body.data_ptr(), laid, nbytes, nbytes), maxlen=0)
        return body

    def put(self, at: int, body: Body, done: int, piece: int) -> None:
        """See :class:`Slotted`."""
        moved(self._device, self._to.check(at, piece), address_of(body) + done, piece)

    def take(self, start: int, piece: int, body: Body, done: int) -> None:
        """See :class:`Slotted`."""
        moved(self._device, address_of(body) + done, self._from.check(start, piece), piece)
