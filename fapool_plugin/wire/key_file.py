"""The key that the machines of a launch share, in a file of each. Nothing of it is ever sent."""

from __future__ import annotations

import hmac
import os
import stat
from pathlib import Path

SHORTEST_KEY = 32


def read_key(path: str) -> bytes:
    """The key in a file. Raises ValueError if it is too short, not there, or other users may read it."""
    try:
        mode, key = stat.S_IMODE(os.stat(path).st_mode), Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:04o}, and other users may use it: chmod 600 {path}")
    if len(key) < SHORTEST_KEY:
        raise ValueError(
            f"{path} has {len(key)} bytes, and a key has {SHORTEST_KEY} or more: head -c 64 /dev/urandom > {path}"
        )
    return key


def lease_token(key: bytes, run: str) -> int:
    """The lease of a run, alike at all that have the key, and known nowhere else."""
    return int.from_bytes(hmac.digest(key, b"lease " + run.encode(), "sha256")[:8], "little") >> 2
