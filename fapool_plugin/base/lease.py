"""A leased pool rank, seen from the base: take the lease, ask, get the answer that belongs to the question.

Knows one link and one lease, and what a pool of ranks can do; not what is asked. Of other ranks
it knows those that this one was introduced to.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import PROTOCOL_VERSION, Header, LinkLost, Message, Op, Status


class RanksStarting(RuntimeError):
    """There is no rank now, and there soon will be: those that were lost are being started again."""


class PoolRank:
    """One leased pool rank, seen from the base."""

    def __init__(self, number: int, link: Link, token: int, counters: RankCounters) -> None:
        self.number, self.link, self.token, self.counters = number, link, token, counters
        self.key = secrets.randbits(62)
        """Names this rank in this lease, so that residency never outlives the lease."""
        self.lost = False
        """Given up: nobody asks it any more."""
        self.memory_limit = 0
        self.clock_offset = 0
        """Nanoseconds that this process's ``time.perf_counter_ns`` is ahead of the rank's."""
        self.node = 0
        """The node it is on."""
        self.merge = 0
        """The last attention call that it worked on together with other ranks."""
        self.apart = False
        """Works together with no other rank any more: a part did not arrive in this lease."""
        self._met: set[int] = set()
        self._call = 0
        self._sent: deque[tuple[int, int]] = deque()
        """(call, messages the link had sent by then): what has gone once the call is answered."""
        self._early: dict[int, Message] = {}
        """Replies to calls that nobody has waited for yet."""
        self._counted = link.bytes_sent, link.bytes_received

    def open(self) -> None:
        """Takes the lease. Raises LinkLost if the rank is lost, busy or speaks another protocol."""
        asked = time.perf_counter_ns()
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
        self.memory_limit, self.node = reply.extra, reply.number
        # Cristian (1989): the rank read its clock about midway between question and answer.
        self.clock_offset = (asked + time.perf_counter_ns()) // 2 - reply.clock

    def ask(self, header: Header, tensors: Sequence[Tensor | Sequence[Tensor]]) -> int:
        """Sends a request; returns its call number."""
        self._call += 1
        self.link.send(header._replace(token=self.token, call=self._call), tensors)
        self._sent.append((self._call, self.link.messages_sent))
        return self._call

    def answer(self, call: int) -> Message:
        """Waits for the reply to ``call``. Replies to calls that were given up are dropped; but gradients may be asked
        for in another order than they were sent for, and are kept while the lease lasts."""
        while call not in self._early:
            message = self.link.receive()
            header = message.header
            if header.token == self.token and (header.call == call or header.op == Op.BACKWARD):
                self._early[header.call] = message
        self.answered(call)
        return self._early.pop(call)

    def answered(self, call: int) -> None:
        """The answer to ``call`` is here, by whatever way: what was sent until then has gone."""
        while self._sent and self._sent[0][0] <= call:
            self.link.settle(self._sent.popleft()[1])
        self._count_bytes()

    def meet(self, other: PoolRank, name: int) -> None:
        """Has this rank open its end of a link to ``other``, once in a lease; ``name`` is the link's at both."""
        if other.key not in self._met:
            self.link.send(Header(op=Op.PEER, token=self.token, number=self.number, peer=other.number, extra=name))
            self._met.add(other.key)

    def check(self) -> None:
        """Raises LinkLost if the rank is known to be gone."""
        if self.link.lost:
            raise LinkLost(self.link.lost)

    def _count_bytes(self) -> None:
        now = self.link.bytes_sent, self.link.bytes_received
        self.counters.bytes_sent += now[0] - self._counted[0]
        self.counters.bytes_received += now[1] - self._counted[1]
        self._counted = now

    def tell(self, op: Op, sequence: int = 0) -> None:
        """Sends a message that has no reply."""
        self.link.send(Header(op=op, token=self.token, sequence=sequence))


class Guard:
    """A block in which a rank may fail; ``lose`` is told of it, and the block ends. Entered for every message, so it is
    no generator."""

    __slots__ = ("lose", "rank")

    def __init__(self, rank: PoolRank, lose: Callable[[PoolRank, str], None]) -> None:
        self.rank, self.lose = rank, lose

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, LinkLost):
            self.lose(self.rank, str(error))
            return True
        return False


class Pool(Protocol):
    """Where pool ranks come from."""

    def new_token(self) -> int:
        """Names the next lease; ranks serve all who give the same one."""

    def acquire(self, announce: Callable[[str], object]) -> dict[int, Link]:
        """Links to every rank that is ready, by rank number. Raises RuntimeError if there is none."""

    def discard(self, rank: int, reason: str) -> str:
        """Gives up a lost rank and everything of it; returns its description."""

    def close(self) -> None:
        """Ends every rank of this pool."""
