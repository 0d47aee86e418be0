"""Both ends of a link, in one process, that have agreed on a carrier; devices and NIXL are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from tests.bodies import RING
from tests.fake_cudart import FakeDevice
from tests.fake_nixl import End, FakeNixl
from tests.greetings import greet
from tests.tcp import tcp_pair
from tests.thread_pool import link_pair

Devices = tuple[FakeDevice, FakeDevice]
Makers = tuple[End, End]


@contextmanager
def ends_of(
    kind: str, loops: tuple[Loop, Loop], devices: Devices | None = None, makers: Makers | None = None
) -> Iterator[tuple[Link, Link]]:
    """(base, rank): shm, ipc or nixl, unless what is given for ``devices`` or ``makers`` of agents cannot do it."""
    if kind == "nixl":
        nixl = FakeNixl()
        base, pool = tcp_pair(loops, makers or (nixl.end(), nixl.end()), RING, 20.0)
    else:
        base, pool = link_pair(*loops, timeout_s=20.0, ring_bytes=RING)
    try:
        greet(base, pool, (devices or (FakeDevice(), FakeDevice())) if kind == "ipc" else (None, None))
        yield base, pool
    finally:
        base.close()
        pool.close()
