"""What moves the bodies of a link's messages. Headers always go over its socket.

A carrier says what goes out on the socket for a message, and gets what has come otherwise. It never waits: where a
message has to wait for room, its link keeps the rest of it, and goes on once the other end has given room back. Each
kind is a file of its own; which one a link has is agreed on at HELLO.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from fapool_plugin.wire.messages import Body, Header, Packed, Payload


class Carrier(Protocol):
    """One end's."""

    name: str

    def takes(self, nbytes: int) -> bool:
        """Whether it copies a body of so many bytes from a device by itself: its tensors stay there. Who sends has
        waited until they are computed, and they are in one piece each."""

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

    def room(self, nbytes: int) -> Body:
        """Memory for a body that is elsewhere."""

    def copy_out(self, header: Header, body: Body, done: int) -> int:
        """Bytes of a body that are elsewhere, as ``header`` says, into ``body`` from ``done`` on; how many. Raises
        LinkLost for a place that there is not."""

    def tensors(self, header: Header, body: Body | None) -> list[torch.Tensor]:
        """What a whole message brings; tables are in host memory."""

    def arrived(self, header: Header) -> None:
        """A whole message has come."""

    def close(self) -> None:
        """Its memory is used no more; nothing is being copied."""

    def credited(self, header: Header) -> None:
        """The other end has taken all that was sent before it was asked. Raises LinkLost if it was not asked."""
