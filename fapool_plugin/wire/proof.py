"""Whether rings carry what is written to them: seen before anything depends on it, in the very memory and by the very
copies that bodies will take.

    each end   fills the other's ring, past its end and over its beginning ── says so ──▶ looks at every byte of its own

A copy between GPUs may lose bytes and report nothing: so on machines whose IOMMU translates what goes from one PCIe
device to another (CUDA C++ Programming Guide, "IOMMU on Linux"). What is written follows from a number that the ring's
owner draws: nothing that lay there before passes for it. Knows slots and bytes, no kind of memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from hashlib import shake_128

import numpy as np
import torch

from fapool_plugin.wire.messages import LinkLost, Room
from fapool_plugin.wire.slotted import Slotted

LONGEST_S = 5.0
"""What takes longer to fill is no gain."""
_PERIOD = 65521
"""Of the pattern, in bytes: prime, so that what is off by any power of two differs."""
_PIECES, _AGAIN = 16, 8
"""Of a ring, as bodies that wait for room go; and the part of it that is written twice."""


def fill(carrier: Slotted, nonce: int) -> None:
    """Writes to the other end's ring, all of it and some once more. Raises LinkLost: it fails, or takes too long."""
    size, deadline = carrier.theirs_bytes, time.monotonic() + LONGEST_S
    pattern = _Pattern(nonce, size)
    for at, start, nbytes in _pieces(size, size + size // _AGAIN):
        if time.monotonic() > deadline:
            raise LinkLost(f"{start} of {size} bytes were there after {LONGEST_S:g} s")
        room = Room(0, nbytes, (nbytes,), torch.uint8, nbytes)
        body = carrier.aside([(room, [torch.from_numpy(pattern.part(start, nbytes))])], nbytes)
        carrier.put(at, body, 0, nbytes)


def lacking(carrier: Slotted, nonce: int) -> int:
    """How many bytes of this end's ring are not what the other end wrote there. Raises LinkLost: a copy fails."""
    size, wrong = carrier.mine_bytes, 0
    pattern, again = _Pattern(nonce, size), size // _AGAIN
    for at, _, nbytes in _pieces(size, size):
        body = carrier.room(nbytes)
        carrier.take(at, nbytes, body, 0)
        found, twice = carrier.on_host(body), max(0, min(nbytes, again - at))
        for part, start in ((found[:twice], size + at), (found[twice:], at + twice)):
            wrong += int(np.count_nonzero(part != pattern.part(start, len(part))))
    return wrong


class _Pattern:
    """Bytes without end, for a ring of this size."""

    def __init__(self, nonce: int, size: int) -> None:
        period = np.frombuffer(shake_128(nonce.to_bytes(8, "little")).digest(_PERIOD), dtype=np.uint8)
        self._some = np.tile(period, 2 + _most(size) // _PERIOD)

    def part(self, start: int, nbytes: int) -> np.ndarray:
        """As many of them as a piece has, or fewer, from a place on."""
        return self._some[start % _PERIOD :][:nbytes]


def _most(size: int) -> int:
    return max(1, size // _PIECES - 1)  # odd: edges lie anywhere


def _pieces(size: int, total: int) -> Iterator[tuple[int, int, int]]:
    """(where, of which bytes, how many): ``total`` bytes laid round a ring, none past its end."""
    start, most = 0, _most(size)
    while start < total:
        at = start % size
        nbytes = min(most, size - at, total - start)
        yield at, start, nbytes
        start += nbytes
