"""A descriptor that travels with a message over a Unix socket; of what, its ends know."""

from __future__ import annotations

import os
import socket


class Descriptor:
    """Closed with this object, unless it is taken out before."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fileno(self) -> int:
        """Its number; -1: it is closed or taken."""
        return self._number

    def socket(self) -> socket.socket:
        """The socket that it is, which is the caller's from now on. Raises OSError if it is none."""
        found = socket.socket(fileno=self._number)
        self._number = -1
        return found

    def close(self) -> None:
        """Closes it, unless it is taken."""
        left, self._number = self._number, -1
        if left >= 0:
            os.close(left)

    def __del__(self) -> None:
        self.close()
