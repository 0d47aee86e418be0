"""Bodies in host memory that both ends map: each end has a ring, which the other one writes to.

    base ── HELLO, its ring ──────────────────────▶ rank
    base ◀── HELLO, the rank's ring ─────────────── rank

Small bodies go over the socket, which is then as fast. An end on a device has the ring that it writes to page-locked,
and copies from the device straight into slots; where that cannot be, bodies come to the host first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import chain

import numpy as np
import torch

from fapool_plugin.wire.device_memory import DeviceMemory, address_of, pushed
from fapool_plugin.wire.messages import Body, Header, Laid, body_memory, fill, tensors_of
from fapool_plugin.wire.ring import Memory
from fapool_plugin.wire.slotted import PIECES, Slotted, bytes_of, copied


class Shm(Slotted):
    """One end's.

    Args:
        mine: the ring that the other end writes to.
        theirs: the ring that this end writes to.
        asks: whether this is the base's end.
        device: where this end computes; None: on a CPU.
        notes: told, for people, if the ring cannot be page-locked.
    """

    name = "shm"

    def __init__(
        self,
        mine: Memory,
        theirs: Memory,
        asks: bool,
        device: DeviceMemory | None = None,
        notes: list[str] | None = None,
    ) -> None:
        super().__init__(mine, theirs, asks, theirs.size // PIECES)
        self._device, self._from, self._to = device, mine, theirs
        self._untried, self._notes = device, notes if notes is not None else []
        """The device that the ring is to be page-locked for."""
        self._copies: DeviceMemory | None = None
        """That device, once it is."""

    def takes(self, nbytes: int) -> bool:
        """See :class:`Carrier`."""
        if nbytes < self.least:
            return False
        device, self._untried = self._untried, None
        if device is not None:
            if problem := self._to.register(device):
                self._notes.append(f"the ring is not page-locked, and bodies are copied twice: {problem}")
            else:
                self._copies = device
        return self._copies is not None

    def room(self, nbytes: int) -> Body:
        """See :class:`Carrier`."""
        return body_memory(nbytes) if self._device is None else self._device.host_memory(nbytes)

    def tensors(self, header: Header, body: Body | None) -> list[torch.Tensor]:
        """See :class:`Carrier`."""
        return tensors_of(header, body)

    def close(self) -> None:
        """See :class:`Carrier`."""
        self._to.unregister()

    def write(self, start: int, laid: Laid, nbytes: int) -> Iterator[int]:
        """See :class:`Slotted`."""
        room = self._to.part(start, nbytes).data
        if (device := self._by_device(laid)) is not None:
            return pushed(device, address_of(room), laid, nbytes, self.piece)
        return fill(room, laid, nbytes, self.piece)

    def aside(self, laid: Laid, nbytes: int) -> Body:
        """See :class:`Slotted`."""
        if (device := self._by_device(laid)) is None:
            return copied(laid, nbytes)
        body = device.host_memory(nbytes)
        deque(pushed(device, body.data_ptr(), laid, nbytes, nbytes), maxlen=0)
        return body

    def put(self, at: int, body: Body, done: int, piece: int) -> None:
        """See :class:`Slotted`."""
        np.copyto(self._to.part(at, piece), bytes_of(body)[done : done + piece])

    def take(self, start: int, piece: int, body: Body, done: int) -> None:
        """See :class:`Slotted`."""
        np.copyto(bytes_of(body)[done : done + piece], self._from.part(start, piece))

    def _by_device(self, laid: Laid) -> DeviceMemory | None:
        """Who copies; None: the host."""
        device, parts = self._copies, chain.from_iterable(parts for _, parts in laid)
        return device if device is not None and any(device.holds(x) for x in parts) else None
