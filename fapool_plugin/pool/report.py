"""What a worker tells of itself to the process that watches it, a few numbers and a name in a file that both have, and
the one thing that it is told there: to leave.

The worker never waits for its watcher, and the watcher asks nothing of the worker, so one that stands still can be
looked at, too. Imports no torch: a watcher computes nothing.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path
from typing import NamedTuple

_TOLD, _LEAVES = struct.Struct("<5q64s"), struct.Struct("<q")
_BYTES = _TOLD.size + _LEAVES.size


class Told(NamedTuple):
    """What was written last; all 0 before the first word."""

    serves: int = 0
    """1 once it answers."""
    leased_ns: int = 0
    """When the lease began, as ``time.time_ns``; 0: there is none."""
    requests: int = 0
    """Answered so far."""
    busy_ns: int = 0
    """Spent answering them."""
    held_bytes: int = 0
    """Keys and values of the lease."""
    job: bytes = b""
    """Who has the lease, for people."""


class Report:
    """The worker's end; without a file it says nothing. Raises OSError if the file is not to be had."""

    def __init__(self, path: str | None = None) -> None:
        self._told, self._map = Told(), None
        if path is not None:
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), _BYTES)

    def is_leaving(self) -> bool:
        """Whether the worker is told to leave."""
        return self._map is not None and _LEAVES.unpack_from(self._map, _TOLD.size) != (0,)

    def answered(self, took_ns: int) -> None:
        """One more request."""
        told = self._told
        self._told = told._replace(requests=told.requests + 1, busy_ns=told.busy_ns + took_ns)

    def tell(self, job: str, held_bytes: int) -> None:
        """Writes all. ``job``: who has the lease; empty: it is free."""
        if self._map is not None:
            same = job.encode() == self._told.job
            since = (self._told.leased_ns if same and self._told.leased_ns else time.time_ns()) if job else 0
            self._told = self._told._replace(serves=1, leased_ns=since, held_bytes=held_bytes, job=job.encode())
            _TOLD.pack_into(self._map, 0, *self._told)


def make(path: Path) -> None:
    """A file for a worker that is started next; only this user may read it."""
    path.touch(mode=0o600)
    path.write_bytes(bytes(_BYTES))


def leave(path: Path) -> None:
    """Tells the worker to leave."""
    with open(path, "r+b") as file:
        file.seek(_TOLD.size)
        file.write(_LEAVES.pack(1))


def read(path: Path) -> Told:
    """What the worker has written. A look in the middle of its writing may show old beside new numbers."""
    told = Told._make(_TOLD.unpack(path.read_bytes()[: _TOLD.size]))
    return told._replace(job=told.job.rstrip(b"\0"))
