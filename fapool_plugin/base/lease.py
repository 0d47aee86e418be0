"""A leased pool rank, seen from the base: take the lease, ask, get the answer that belongs to the question.

Knows one link and one lease, and what a pool of ranks can do; not what is asked. Of other ranks
it knows those that this one was introduced to.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.devices.cudart import Cudart
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.observe.metrics import Counters, RankCounters
from fapool_plugin.plan.line import Tile
from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import (
    PROTOCOL_VERSION,
    STEP_S,
    Header,
    LinkLost,
    Message,
    Op,
    Payload,
    Status,
    rooms,
)
from fapool_plugin.wire.proof import LONGEST_S
from fapool_plugin.wire.terms import AGREED, LOSES, PROVED
from fapool_plugin.wire.wishes import Wishes

_STEPS = 4
"""A rank that takes so many times as long for a step as it should does not get on."""
_EARLY = 64
"""Replies that may wait to be asked for: more than there are blocks in flight."""
_BUSY_S = 0.05


class RanksStarting(RuntimeError):
    """There is no rank now, and there soon will be: those that were lost are being started again."""


class Expected(NamedTuple):
    """What the answer to one request may announce."""

    op: int
    dtype: int
    sizes: tuple[int, int, int, int]
    """Elements of q, k, v and lse; of a merged answer at most so many."""
    parts: int = 0
    """Ranks whose parts it may have; 0: it is not merged."""

    @property
    def most_bytes(self) -> int:
        """Of its body, with padding; of a merged one, whose lanes are not known beforehand, 1."""
        if self.parts:
            return 1
        q, k, v, lse = self.sizes
        sizes = {"q_elements": q, "k_elements": k, "v_elements": v, "lse_elements": lse}
        return rooms(Header(op=self.op, status=Status.OK, dtype=self.dtype, **sizes))[1]


def expected(header: Header, tiles: Iterable[Tile], ranks: int = 0) -> Expected:
    """What the answer to a request for these tiles announces; ``ranks``: merged from so many, if they are merged."""
    rows = keys = 0
    for tile in tiles:
        rows += tile.lanes * header.group * (tile.q_stop - tile.q_start)
        keys += tile.lanes * (tile.k_stop - tile.k_start)
    if header.op == Op.BACKWARD:
        sizes = rows * header.head_dim, keys * header.head_dim, keys * header.v_head_dim, rows
    else:
        sizes = rows * header.v_head_dim, 0, 0, rows
    return Expected(header.op, header.dtype, sizes, ranks)


class Outstanding:
    """What the other end of a link may say: each answer once, and no more than was asked for. Kept with the link,
    which outlives leases. Called with every header before its body is received."""

    def __init__(self) -> None:
        self.hellos = 0
        self._expected: dict[tuple[int, int], Expected] = {}

    @classmethod
    def of(cls, link: Link) -> Outstanding:
        """The link's, from its first lease on."""
        if not isinstance(link.check, Outstanding):
            link.check = cls()
        return link.check

    def expect(self, token: int, call: int, expected: Expected) -> None:
        """A request is about to be sent."""
        self._expected[token, call] = expected

    def __call__(self, header: Header) -> None:
        """Raises LinkLost for what was not asked for."""
        if header.op == Op.HELLO and self.hellos:
            self.hellos -= 1
            return
        expected = self._expected.pop((header.token, header.call), None)
        if expected is None or header.op != expected.op:
            raise LinkLost(f"sent op {header.op} for call {header.call}, which was not asked for")
        if header.status in (Status.STALE, Status.FULL):
            return
        sizes = header.q_elements, header.k_elements, header.v_elements, header.lse_elements
        if header.op == Op.ATTEND:
            sizes = header.q_elements, 0, 0, header.lse_elements
        if expected.parts:
            fits = all(size <= most for size, most in zip(sizes, expected.sizes, strict=True))
            fits = fits and header.parts <= expected.parts and header.tiles <= expected.sizes[3]
        else:
            fits = (sizes, header.dtype, header.parts) == (expected.sizes, expected.dtype, 0)
        if header.status != Status.OK or not fits:
            raise LinkLost(f"answered call {header.call} with status {header.status} and {sizes} elements: {expected}")


class PoolRank:
    """One leased pool rank, seen from the base."""

    def __init__(
        self, number: int, link: Link, token: int, counters: RankCounters, idle_s: float | None = None
    ) -> None:
        self.number, self.link, self.token, self.counters = number, link, token, counters
        self.idle_s = idle_s
        """Seconds without a request after which another job may have it; None: never."""
        self.busy_s = 0.0
        """For how long another job has had it, if it was refused."""
        self.since = time.monotonic()
        self.key = secrets.randbits(62)
        """Names this rank in this lease, so that residency never outlives the lease."""
        self.lost = False
        """Given up: it is asked no more."""
        self.memory_limit = 0
        self.clock_offset = 0
        """Nanoseconds that this process's ``time.perf_counter_ns`` is ahead of the rank's."""
        self.node = 0
        """The node it is on."""
        self.gpu = 0
        """Names the GPU that it computes on; 0: it computes on a CPU."""
        self.merge = 0
        """The last attention call that it worked on together with other ranks."""
        self.apart = False
        """Works together with no other rank any more: a part did not arrive in this lease."""
        self.out_of_order = False
        """Its replies are not waited for in the order of its calls: it answers for a lost rank, too, or for keys."""
        self.met = set[int]()
        """Keys of the ranks that it was introduced to."""
        self._outstanding = Outstanding.of(link)
        self._call = 0
        self._early: dict[int, Message] = {}
        """Replies to calls that were not waited for yet."""
        self._counted = link.bytes_sent, link.bytes_received

    @property
    def stall_s(self) -> float:
        """Seconds without any progress after which it is given up."""
        return max(self.link.timeout_s, _STEPS * STEP_S)

    @property
    def is_recalled(self) -> bool:
        """Whether the rank has said that this lease is over."""
        return self.link.wishes.recalled == self.token

    def open(self, *, shared: bool = False, has: int = 0, device: torch.device = CPU, carrier: str = "auto") -> bool:
        """Takes the lease. A ``shared`` rank may have another job's: then it is left alone, and this returns False.
        Raises LinkLost if the rank is lost, speaks another protocol, or is busy and not shared.

        Args:
            shared: whether other jobs borrow the rank, too.
            has: ranks that this job has already; who has least is the first to get the next one.
            device: where the base computes.
            carrier: as configured.
        """
        terms = self.link.terms
        if terms.device is None and device.type == "cuda":
            terms.device, terms.uses_device_rings = Cudart.of(device), carrier in ("auto", "ipc")
        deadline = time.monotonic() + (0.0 if shared else self.link.timeout_s)
        while (reply := self._greet(has)).status == Status.BUSY and time.monotonic() < deadline:
            time.sleep(_BUSY_S)  # a lease that ends may not have ended there yet
        if reply.version != PROTOCOL_VERSION:
            raise LinkLost(
                f"speaks protocol {reply.version}, the base speaks {PROTOCOL_VERSION}: install one version on both"
            )
        if reply.status != Status.OK and not shared:
            raise LinkLost(f"is {Status(reply.status).name.lower()}: another job holds its lease")
        if reply.status != Status.OK:
            self.busy_s = reply.extra / 1e9
            return False
        self.link.wishes = Wishes()  # they were an earlier lease's
        self.counters.carrier = self.link.carrier.name
        self.memory_limit, self.node, self.gpu = reply.extra, reply.number, reply.peer
        return True

    def ask(self, header: Header, tensors: Payload, expected: Expected | None) -> int:
        """Sends a request; returns its call number. ``expected``: its answer; None: that goes to another rank."""
        self._call += 1
        if expected is not None:
            self._outstanding.expect(self.token, self._call, expected)
        due = expected.most_bytes if expected is not None else 0
        self.link.send(header._replace(token=self.token, call=self._call), tensors, answer_bytes=due)
        return self._call

    def answer(self, call: int) -> Message:
        """Waits for the reply to ``call``. Replies to calls that were given up are dropped; but gradients may be asked
        for in another order than they were sent for, and are kept while the lease lasts. Where other replies are, too,
        the last ones are kept."""
        while call not in self._early:
            message = self.link.receive(self.stall_s)
            header = message.header
            kept = header.call == call or header.op == Op.BACKWARD or self.out_of_order
            if header.token == self.token and kept:
                self._early[header.call] = message
            if self.out_of_order and len(self._early) > _EARLY:
                del self._early[min(self._early)]
        self.count_bytes()
        return self._early.pop(call)

    def introduce(self, other: PoolRank, name: int, end: socket.socket | None, address: str = "") -> None:
        """Has this rank open its end of a link to ``other``: over a socket that goes with the message, or at an
        address; without either it waits for the other one. ``name`` is the link's at both."""
        told = torch.tensor(list(address.encode()), dtype=torch.uint8, device="cpu")
        header = Header(op=Op.PEER, token=self.token, number=self.number, peer=other.number, extra=name)
        self.link.send(header._replace(address=len(told)), [told] if address else [], attached=end)
        self.met.add(other.key)

    def check(self) -> None:
        """Raises LinkLost if the rank is known to be gone."""
        if self.link.lost:
            raise LinkLost(self.link.lost)

    def count_bytes(self) -> None:
        """Counts what has moved on the link."""
        now = self.link.bytes_sent, self.link.bytes_received
        self.counters.bytes_sent += now[0] - self._counted[0]
        self.counters.bytes_received += now[1] - self._counted[1]
        self._counted = now

    def tell(self, op: Op, sequence: int = 0) -> None:
        """Sends a message that has no reply."""
        self.link.send(Header(op=op, token=self.token, sequence=sequence))

    def _greet(self, has: int) -> Header:
        terms, asked = self.link.terms, time.perf_counter_ns()
        silent_ns, idle_ns = (round(seconds * 1e9) for seconds in (self.link.timeout_s, self.idle_s or 0.0))
        hello = Header(op=Op.HELLO, token=self.token, keep=terms.wish, peers=has, extra=idle_ns, clock=silent_ns)
        message = self._said_hello(hello, attached=terms.offer())
        reply = message.header
        # Cristian (1989): the rank read its clock about midway between question and answer.
        self.clock_offset = (asked + time.perf_counter_ns()) // 2 - reply.clock
        terms.agree(message.attached)
        if reply.address:
            self._try_memory(hello, message.tensors[0])
        elif hello.keep == 2 and reply.status == Status.OK:
            terms.stay("it has no NIXL, or was not told of it")
        elif hello.keep and reply.peer:
            terms.stay("it has no device memory to share")
        return reply

    def _try_memory(self, hello: Header, theirs: torch.Tensor) -> None:
        """Agrees on memory that the rank has named, if each end finds in its own what the other wrote there."""
        terms, agreed = self.link.terms, False
        name = terms.name() if terms.open(theirs) else None
        if name is not None and terms.fill():
            filled = hello._replace(keep=1, address=len(name))
            found = self._said_hello(filled, [name], more_s=LONGEST_S).header.keep
            if found == LOSES:
                terms.distrust("what was written to the rank's memory from here arrived otherwise")
            elif found != PROVED:
                terms.stay("it cannot open the base's memory, or not write there")
            else:
                agreed = terms.holds()
        answer = self._said_hello(hello._replace(keep=AGREED if agreed else 0)).header.keep
        if agreed and answer == PROVED:
            terms.use_rings()
        elif agreed:
            terms.stay("it does not use what was agreed on")
        terms.drop()

    def _said_hello(
        self, header: Header, tensors: Payload = (), attached: Descriptor | None = None, more_s: float = 0.0
    ) -> Message:
        self._outstanding.hellos += 1
        self.link.send(header, tensors, attached=attached)
        # A link outlives leases: replies to calls that an earlier lease gave up may come first.
        while (message := self.link.receive(self.stall_s + more_s)).header.op != Op.HELLO:
            pass
        return message


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

    @property
    def look(self) -> Callable[[Collection[int]], dict[int, Link]] | None:
        """Of ranks that several jobs share, called with the numbers of those that are leased: links to those that are
        known, and more are looked for meanwhile, for the next time. None: they are one job's."""

    @property
    def said(self) -> Sequence[dict[str, Any]]:
        """What such ranks say of themselves, and of the jobs that have them."""

    def new_token(self) -> int:
        """Names the next lease; ranks serve all who give the same one."""

    def acquire(self, announce: Callable[[str], object], base: torch.device) -> dict[int, Link]:
        """Links to every rank that is ready, by rank number, those to be preferred first. Raises RuntimeError or
        FAPoolConfigError if there is none.

        Args:
            announce: told what takes a while.
            base: where the base computes.
        """

    def discard(self, rank: int, reason: str) -> str:
        """Gives up a lost rank and everything of it; returns its description."""

    def close(self) -> None:
        """Ends every rank of this pool."""


def lease(
    links: Mapping[int, Link],
    config: FAPoolConfig,
    token: int,
    device: torch.device,
    ranks: list[PoolRank],
    counters: Counters,
    guard: Callable[[PoolRank], AbstractContextManager[None]],
    *,
    most: int,
    shared: bool,
) -> list[float]:
    """Takes the lease of ``most`` ranks, those in ``ranks`` counted, or of as many as no other job has. ``ranks`` gets
    each before it is asked, so that an interrupt finds it there.

    Args:
        device: where the base computes.

    Returns:
        for each that another job has, for how many seconds.

    Raises:
        FAPoolConfigError: the carrier that is asked for cannot be had.
    """
    busy, mine = [], {rank.number for rank in ranks}
    if config.carrier == "ipc" and device.type != "cuda":
        raise FAPoolConfigError(f"carrier is ipc, and the model is on {device}: it moves bodies between GPUs; use auto")
    for number, link in links.items():
        if len(ranks) >= most:
            break
        if number in mine:
            continue
        rank = PoolRank(number, link, token, counters.rank(number), config.idle_keys_s)
        ranks.append(rank)
        with guard(rank):
            if not rank.open(shared=shared, has=len(ranks) - 1, device=device, carrier=config.carrier):
                ranks.remove(rank)
                busy.append(rank.busy_s)
            elif config.carrier in ("ipc", "nixl") and link.carrier.name != config.carrier:
                without = "the rank is on no GPU of this machine, or CUDA's runtime is not here"
                why = "; ".join(link.terms.notes) or without
                raise FAPoolConfigError(f"carrier is {config.carrier}, and not for pool rank {number}: {why}; use auto")
    return busy
