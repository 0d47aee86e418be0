"""What moves the bodies of a link's messages. Headers always go over its socket.

A carrier says what goes out on the socket for a message, and gets what has come otherwise. It never waits: where a
message has to wait for room, its link keeps the rest of it, and goes on once the other end has given room back. Each
kind is a file of its own; which one a link has is agreed on at HELLO.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from fapool_plugin.wire.messages import Header, Packed, Payload


class Carrier(Protocol):
    """One end's."""

    name: str

    def outgoing(self, header: Header, tensors: Payload, answer_bytes: int, later: bool) -> Iterator[Packed | None]:
        """What goes out on the socket, in order; None: nothing yet, ask again when something has come.

        Args:
            header: announces the payload.
            tensors: the payload; read before the first None only.
            answer_bytes: of the body of its answer, at most; 0: no answer is due on this link.
            later: others wait already: tensors are read at once, and sent later.

        Raises:
            ValueError: the payload is not what the header announces.
        """

    def announced(self, header: Header) -> None:
        """The header of a message has come. Raises LinkLost if it speaks of room that there is not."""

    def copy_out(self, header: Header, room: memoryview) -> int:
        """Bytes of a body that are elsewhere, as ``header`` says, into ``room``; how many. Raises LinkLost for a place
        that there is not."""

    def arrived(self, header: Header) -> None:
        """A whole message has come."""

    def credited(self, header: Header) -> None:
        """The other end has taken all that was sent before it was asked. Raises LinkLost if it was not asked."""
