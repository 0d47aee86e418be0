"""A leased pool rank, seen from the base: take the lease, ask, get the answer that belongs to the question.

Knows one link and one lease; not who else is leased, nor what is asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from torch import Tensor

from fapool_plugin.metrics import RankCounters
from fapool_plugin.transport import PROTOCOL_VERSION, Header, Link, LinkLost, Message, Op, Status


class PoolRank:
    """One leased pool rank, seen from the base."""

    def __init__(self, number: int, link: Link, token: int, counters: RankCounters) -> None:
        self.number, self.link, self.token, self.counters = number, link, token, counters
        self.key = secrets.randbits(62)
        """Names this rank in this lease, so that residency never outlives the lease."""
        self.memory_limit = 0
        self._call = 0
        self._counted = link.bytes_sent, link.bytes_received

    def open(self) -> None:
        """Takes the lease. Raises LinkLost if the rank is lost, busy or speaks another protocol."""
        self.link.send(Header(op=Op.HELLO, token=self.token))
        # A link outlives leases: replies to calls that an earlier lease gave up may come first.
        reply = self.link.receive().header
        while reply.op != Op.HELLO:
            reply = self.link.receive().header
        if reply.version != PROTOCOL_VERSION:
            raise LinkLost(
                f"speaks protocol {reply.version}, the base speaks {PROTOCOL_VERSION}: install one version on both"
            )
        if reply.status != Status.OK:
            raise LinkLost(f"is {Status(reply.status).name.lower()}: another job holds its lease")
        self.memory_limit = reply.extra

    def ask(self, header: Header, tensors: Sequence[Tensor | Sequence[Tensor]]) -> int:
        """Sends a request; returns its call number."""
        self._call += 1
        self.link.send(header._replace(token=self.token, call=self._call), tensors)
        return self._call

    def answer(self, call: int) -> Message:
        """Waits for the reply to ``call``; replies to calls that were given up are dropped."""
        while True:
            message = self.link.receive()
            if (message.header.op, message.header.token, message.header.call) == (Op.ATTEND, self.token, call):
                self.link.settle()
                self._count_bytes()
                return message

    def _count_bytes(self) -> None:
        now = self.link.bytes_sent, self.link.bytes_received
        self.counters.bytes_sent += now[0] - self._counted[0]
        self.counters.bytes_received += now[1] - self._counted[1]
        self._counted = now

    def tell(self, op: Op, sequence: int = 0) -> None:
        """Sends a message that has no reply."""
        self.link.send(Header(op=op, token=self.token, sequence=sequence))
