"""Links between machines under a shared key: both ends prove that they have it, and then every byte is encrypted.

    caller ── its public key, nonce, name, version ─────────────▶ listener
    caller ◀── its public key, nonce, HMAC over all of that ───── listener
    caller ── HMAC over all of that ────────────────────────────▶ listener

X25519 (RFC 7748) for a secret of this link alone, HMAC-SHA256 with the file's key so that neither end is a stranger,
HKDF (RFC 5869) for a key in each direction, AES-256-GCM for each frame with a counter as its nonce. What is recorded
today cannot be read with a key that is stolen tomorrow. Knows sockets and bytes, no messages.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fapool_plugin.wire import PROTOCOL_VERSION

_MAGIC = b"fapool link"
_PUBLIC, _NONCE, _MAC = 32, 32, 32
_LONGEST_NAME = 256
_FRAME = 256 * 1024
_LENGTH = struct.Struct("<I")
_TAG = 16


def call(sock: socket.socket, key: bytes, name: str, timeout_s: float) -> SealedSocket:
    """Agrees with a listener. The socket is closed after an error.

    Raises:
        ConnectionError: it does not have the key, or breaks off.
        OSError: it does not answer in time.
    """
    return _agree(sock, key, timeout_s, name)


def answer(sock: socket.socket, key: bytes, timeout_s: float) -> SealedSocket:
    """Agrees with a caller. Raises as :func:`call` does."""
    return _agree(sock, key, timeout_s, None)


def _agree(sock: socket.socket, key: bytes, timeout_s: float, name: str | None) -> SealedSocket:
    own = X25519PrivateKey.generate()
    mine, deadline = own.public_key().public_bytes_raw() + secrets.token_bytes(_NONCE), time.monotonic() + timeout_s
    try:
        sock.settimeout(timeout_s)
        if name is not None:
            told = name.encode()[:_LONGEST_NAME]
            hello = _MAGIC + struct.pack("<qI", PROTOCOL_VERSION, len(told)) + told + mine
            sock.sendall(hello)
            theirs = _exactly(sock, _PUBLIC + _NONCE, deadline)
            said = hello + theirs
            _prove(_exactly(sock, _MAC, deadline), key, b"listener", said)
            sock.sendall(hmac.digest(key, b"caller" + said, "sha256"))
        else:
            head = _exactly(sock, len(_MAGIC) + 12, deadline)
            version, length = struct.unpack_from("<qI", head, len(_MAGIC))
            if not head.startswith(_MAGIC) or length > _LONGEST_NAME:
                raise ConnectionError("the other end does not use a link key")
            if version != PROTOCOL_VERSION:
                raise ConnectionError(f"the other end speaks protocol {version}, this one {PROTOCOL_VERSION}")
            said = head + _exactly(sock, length, deadline)
            theirs = _exactly(sock, _PUBLIC + _NONCE, deadline)
            said += theirs + mine
            sock.sendall(mine + hmac.digest(key, b"listener" + said, "sha256"))
            _prove(_exactly(sock, _MAC, deadline), key, b"caller", said)
        shared = own.exchange(X25519PublicKey.from_public_bytes(theirs[:_PUBLIC]))
    except BaseException:
        sock.close()
        raise
    keys = HKDF(SHA256(), 64, salt=hmac.digest(key, said, "sha256"), info=_MAGIC).derive(shared)
    ways = keys[:32], keys[32:]
    return SealedSocket(sock, *(ways if name is not None else ways[::-1]))


def _prove(mac: bytes, key: bytes, role: bytes, said: bytes) -> None:
    if not hmac.compare_digest(mac, hmac.digest(key, role + said, "sha256")):
        raise ConnectionError("the other end has another link key")


def _exactly(sock: socket.socket, count: int, deadline: float) -> bytes:
    """So many bytes, until then: one that sends a byte now and then is not waited for any longer."""
    data = b""
    while len(data) < count:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the other end does not prove in time that it has the link key")
        sock.settimeout(left_s)
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionError("the other end broke off: does it have the same link key?")
        data += more
    return data


class SealedSocket:
    """A socket whose bytes are encrypted; what a link needs of one. Frames do not cross calls of :meth:`sendmsg`."""

    def __init__(self, sock: socket.socket, sending: bytes, receiving: bytes) -> None:
        self._sock, self.family = sock, sock.family
        self._sending, self._receiving = AESGCM(sending), AESGCM(receiving)
        self._sent = self._received = 0
        self._pending = memoryview(b"")
        self._accepted = 0
        """Bytes whose frame is not out yet, or whose sending was not reported yet."""
        self._frame = bytearray()
        self._opened = memoryview(b"")

    def sendmsg(self, buffers: Sequence[bytes | memoryview], rights: Sequence[Any] = ()) -> int:
        """Seals and sends; how many of these bytes have gone. After a BlockingIOError the same bytes must come again.
        Descriptors cannot go along."""
        if rights:
            raise OSError("a socket cannot be sent to another machine")
        whole = sum(map(len, buffers))
        if not self._accepted and whole:
            data = b"".join(buffers) if whole <= _FRAME else bytes(_first(buffers, _FRAME))
            sealed = self._sending.encrypt(_nonce(self._sent), data, None)
            self._sent += 1
            self._pending, self._accepted = memoryview(_LENGTH.pack(len(sealed)) + sealed), len(data)
        while self._pending:
            self._pending = self._pending[self._sock.send(self._pending) :]
        gone = min(self._accepted, whole)
        self._accepted -= gone
        return gone

    def getpeername(self) -> Any:
        """Of the socket."""
        return self._sock.getpeername()

    def recv_into(self, room: memoryview) -> int:
        """Receives and opens; 0 at the end. Raises ConnectionError for what was not sealed by the other end."""
        while not self._opened:
            if len(self._frame) >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._frame)
                if not _TAG < length <= _FRAME + _TAG:
                    raise ConnectionError(f"a frame of {length} bytes")
                wanted = _LENGTH.size + length
            else:
                wanted = _LENGTH.size
            if len(self._frame) < wanted or wanted == _LENGTH.size:
                more = self._sock.recv(wanted - len(self._frame))
                if not more:
                    return 0
                self._frame += more
                continue
            try:
                opened = self._receiving.decrypt(_nonce(self._received), bytes(self._frame[_LENGTH.size :]), None)
            except InvalidTag:
                raise ConnectionError("a frame that the other end did not seal") from None
            self._received += 1
            self._frame.clear()
            self._opened = memoryview(opened)
        count = min(len(room), len(self._opened))
        room[:count] = self._opened[:count]
        self._opened = self._opened[count:]
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def _first(buffers: Sequence[bytes | memoryview], count: int) -> bytearray:
    data = bytearray()
    for buffer in buffers:
        data += buffer[: count - len(data)]
        if len(data) == count:
            break
    return data


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "little")
