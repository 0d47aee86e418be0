"""Sockets that links are made of: a pair for a process of one's own, a listener for those who come.

On one machine a listener is a Unix socket in a folder that only its user can enter, and both ends see that the other
is the same user. Between machines it is TCP, under a key. Addresses are text: ``unix:PATH`` or ``tcp:HOST:PORT``. What
is said over them is not known here.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fapool_plugin.wire.loop import Loop

_BUFFER_BYTES = 4 * 1024 * 1024
"""As much as a socket may hold, where the system allows it: few large messages wait for the other end to read."""
_PROVING = 64
"""Callers that may be about to prove that they have the key."""
_FULL_S = 0.05
_CREDENTIALS = struct.Struct("3i")


def machine() -> str:
    """Alike for processes that see the same kernel and the same files, and can meet at a Unix socket."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}/{os.stat('/proc/self/ns/mnt').st_ino}"


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, port))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends."""
    one, other = socket.socketpair()
    for end in (one, other):
        _enlarge(end)
    return one, other


def listen(address: str) -> tuple[socket.socket, str]:
    """A listener at an address; port 0 is any. Returns (listener, its address). Raises OSError if it is not to be
    had."""
    kind, _, place = address.partition(":")
    if kind == "unix":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(place)
        os.chmod(place, 0o600)
        listener.listen()
        return listener, address
    host, _, port = place.rpartition(":")
    listener = socket.create_server((host, int(port)))
    return listener, f"tcp:{host}:{listener.getsockname()[1]}"


def connect(address: str, timeout_s: float, key: bytes | None = None, name: str = "") -> Any:
    """Connects to a listener; between machines under a key, if there is one.

    Args:
        address: where it listens.
        timeout_s: how long to wait for it.
        key: shared by both ends.
        name: of the link, which both ends prove to be talking of.

    Raises:
        OSError: it cannot be reached, another user listens there, or it has another key.
    """
    kind, _, place = address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout_s)
        try:
            sock.connect(place)
            check_user(sock)
        except BaseException:
            sock.close()
            raise
    else:
        host, _, port = place.rpartition(":")
        sock = socket.create_connection((host, int(port)), timeout_s)
    _enlarge(sock)
    if key is None or kind == "unix":
        return sock
    from fapool_plugin.wire.seal import call

    return call(sock, key, name, timeout_s)


def check_user(sock: socket.socket) -> None:
    """Raises PermissionError if the other end of a Unix socket is another user's."""
    if sock.family != socket.AF_UNIX:
        return
    _, user, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if user != os.geteuid():
        raise PermissionError(f"the other end is user {user}, not {os.geteuid()}")


def caller(sock: Any) -> str:
    """Who is at the other end, for people."""
    if sock.family != socket.AF_UNIX:
        host, port, *_ = sock.getpeername()
        return f"{host}:{port}"
    pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"pid {pid}"


class Listener:
    """Accepts connections; a handler of its loop.

    Args:
        listener: the socket.
        accepted: called with each connection.
        key: callers from other machines must have it, too.
        patience_s: how long they may take to prove it.
    """

    def __init__(
        self,
        listener: socket.socket,
        loop: Loop,
        accepted: Callable[[Any], object],
        key: bytes | None = None,
        patience_s: float = 5.0,
    ) -> None:
        listener.setblocking(False)
        self._listener, self._loop, self._accepted, self._patience_s = listener, loop, accepted, patience_s
        self._key = key if listener.family != socket.AF_UNIX else None
        self._proving = 0
        loop.add(self)

    def fileno(self) -> int:
        """Its descriptor."""
        return self._listener.fileno()

    def handle(self, events: int) -> None:
        """Takes a connection, if its other end is the same user's."""
        if not events & select.EPOLLIN:
            return
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_FULL_S)  # it waits, and would be reported at once again
            return  # or it has gone again
        try:
            check_user(sock)
            _enlarge(sock)
        except OSError:
            sock.close()
            return
        if self._key is None:
            self._accepted(sock)
        elif self._proving < _PROVING:
            # A caller may be slow, or a stranger: others are served meanwhile.
            self._proving += 1
            threading.Thread(target=self._agree, args=(sock, self._key), daemon=True).start()
        else:
            sock.close()

    def tick(self, now: float, away_s: float) -> float:
        """Nothing to do."""
        return 1.0

    def abandon(self) -> None:
        """It is another process's, or it accepts no more."""
        self._listener.close()

    def _agree(self, sock: socket.socket, key: bytes) -> None:
        from fapool_plugin.wire.seal import answer

        try:
            self._accepted(answer(sock, key, self._patience_s))
        except (OSError, ValueError):
            pass  # a stranger, or none any more
        finally:
            self._proving -= 1


def _enlarge(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
