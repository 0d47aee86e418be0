"""Bodies follow their headers on the socket: every link begins so, and between machines stays so."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fapool_plugin.wire.messages import Body, Header, LinkLost, Packed, Payload, packed, tensors_of


class Inline:
    """Knows nothing of the link."""

    name = "inline"

    def takes(self, nbytes: int) -> bool:
        """What is sent is in host memory."""
        return False

    def outgoing(self, header: Header, tensors: Payload, answer_bytes: int, later: bool) -> Iterator[Packed | None]:
        """The message, in one."""
        return iter((packed(header, tensors),))

    def announced(self, header: Header) -> None:
        """Raises LinkLost for every body that is not on the socket."""
        if header.piece or header.answer_bytes:
            raise LinkLost("speaks of memory that was not agreed on")

    def room(self, nbytes: int) -> Body:
        """There is nothing elsewhere."""
        raise LinkLost("speaks of memory that was not agreed on")

    def copy_out(self, header: Header, body: Body, done: int) -> int:
        """There is nothing elsewhere."""
        raise LinkLost("speaks of memory that was not agreed on")

    def tensors(self, header: Header, body: Body | None) -> list[torch.Tensor]:
        """They keep the body's memory."""
        return tensors_of(header, body)

    def arrived(self, header: Header) -> None:
        """Nothing to give back."""

    def close(self) -> None:
        """Nothing to give back."""

    def credited(self, header: Header) -> None:
        """Nothing was lent."""
        raise LinkLost("speaks of memory that was not agreed on")
