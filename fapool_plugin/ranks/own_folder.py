"""A folder of one process's own, for the sockets of a pool rank: gone when it ends, or when another is made.

    made and locked ──▶ used ──▶ removed by its owner
                          └─▶ its owner was killed, and the lock ended with it ──▶ removed by the next owner

Nothing runs beside an owner to clean up after it. A lock tells who lives, not a process id: containers that share a
temporary folder number their processes alike. Knows files only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "fapool-rank-"
_LONG_PATH = 80
"""The path of a Unix socket may have 107 bytes."""


class OwnFolder:
    """A new folder of mode 0700, until :meth:`remove`; what killed owners of this user left there is removed first.

    Args:
        parent: where it is made; default: the system's temporary folder.
    """

    def __init__(self, parent: str | None = None) -> None:
        parent = parent or tempfile.gettempdir()
        parent = parent if len(parent) < _LONG_PATH else "/tmp"
        _sweep(Path(parent))
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
            with suppress(FileNotFoundError):
                self._lock = os.open(self.path, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                if self.path.exists():
                    return
                os.close(self._lock)  # another owner took it for a killed one's before it was locked

    def remove(self) -> None:
        """Removes it, with all that is in it. Harmless when repeated."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), _locked(path):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Raises OSError where the owner lives, or is another user."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(path)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
