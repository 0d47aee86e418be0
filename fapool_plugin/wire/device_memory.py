"""What carriers ask of a device: memory, and copies that only this process waits for.

    sender      copies begun ── waits for its own ── header ──▶
    receiver                                            begins to copy out ── waits for its own ── gives the slot back

Which library does it is not known here; :class:`fapool_plugin.devices.cudart.Cudart` has CUDA's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

import torch

from fapool_plugin.wire.messages import Body, Laid, LinkLost


class DeviceMemory(Protocol):
    """One link's, of the device where its end computes. What fails raises RuntimeError."""

    def holds(self, x: torch.Tensor) -> bool:
        """Whether a tensor is on a device."""

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """All elements in one piece, computed; as it is where it is so already."""

    def memory(self, nbytes: int) -> torch.Tensor:
        """Bytes on the device. Raises torch.OutOfMemoryError."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """Bytes of the host, page-locked if they can be."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Begins to copy between two addresses, whosever memory they are."""

    def wait(self) -> None:
        """Until all copies have been done."""

    def register(self, address: int, nbytes: int) -> None:
        """Page-locks memory of the host."""

    def unregister(self, address: int) -> None:
        """No longer."""

    def allocate(self, nbytes: int) -> int:
        """Device memory that may be opened elsewhere; its address."""

    def free(self, address: int) -> None:
        """Gives it back."""

    def handle(self, address: int) -> bytes:
        """By which another process of this machine opens it."""

    def open(self, handle: bytes) -> int:
        """Where another process's memory is in this one."""

    def shut(self, address: int) -> None:
        """It is not used here any more."""


def address_of(body: Body) -> int:
    """Of its first byte."""
    return (body if isinstance(body, torch.Tensor) else torch.frombuffer(body, dtype=torch.uint8)).data_ptr()


def room_on(device: DeviceMemory, nbytes: int) -> torch.Tensor:
    """Memory for a body: the device's, or the host's where that has no more."""
    try:
        return device.memory(nbytes)
    except torch.OutOfMemoryError:
        return device.host_memory(nbytes)


def moved(device: DeviceMemory, target: int, source: int, nbytes: int) -> None:
    """Copies, and waits for it. Raises LinkLost."""
    with _settled(device):
        device.copy(target, source, nbytes)
        device.wait()


def pushed(device: DeviceMemory, address: int, laid: Laid, nbytes: int, every: int) -> Iterator[int]:
    """Writes a body of ``nbytes`` to an address. Yields how many bytes are there: about every ``every`` bytes, and at
    the end all. Raises LinkLost."""
    told, kept = 0, list[torch.Tensor]()
    with _settled(device):
        for room, parts in laid:
            at = room.start
            for part in parts:
                x = device.flat(part.detach())
                kept.append(x)  # until it has been read
                size, done = x.numel() * x.itemsize, 0
                while done < size:
                    piece = min(every, size - done)
                    device.copy(address + at, x.data_ptr() + done, piece)
                    at, done = at + piece, done + piece
                    if at - told >= every and at < nbytes:
                        device.wait()
                        yield at
                        told = at
        device.wait()
    yield nbytes


@contextmanager
def _settled(device: DeviceMemory) -> Iterator[None]:
    """However it ends, no copy that was begun is under way after it: its memory may be used for something else at once.
    Raises LinkLost for a copy that fails."""
    try:
        yield
    except GeneratorExit:  # all have been waited for, and this may be another process by now
        raise
    except BaseException as error:
        with suppress(RuntimeError):
            device.wait()
        if isinstance(error, RuntimeError) and not isinstance(error, LinkLost):
            raise LinkLost(f"a copy failed: {error}") from error
        raise


def to_host(device: DeviceMemory, x: torch.Tensor) -> torch.Tensor:
    """A few bytes of a device, in host memory. Raises LinkLost."""
    there = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    moved(device, there.data_ptr(), x.data_ptr(), x.numel() * x.itemsize)
    return there
