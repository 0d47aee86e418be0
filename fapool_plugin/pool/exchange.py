"""A pool rank's links to other pool ranks: results are merged on their way to the base.

      base ── PEER, one end of a pair each ──▶ rank 0, rank 1         on one machine
      base ── PEER, rank 0's address ────────▶ rank 1 ── connects ──▶ rank 0      between machines

What does not come in time is reported as missing: the base can compute everything itself. Knows links and parts; not
who asked for what, nor why.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.partial_results import PartialResults
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    STEP_S,
    TILE_FIELDS,
    Header,
    LinkLost,
    Message,
    Op,
    Payload,
    Status,
    dtype_code,
    elements,
    rooms,
)
from fapool_plugin.wire.sockets import connect

Arrived = tuple[Link, Message | LinkLost]
_UNSENT = 8
"""Messages to one rank that may wait to be sent."""
_PART_BYTES = 2**30
_UNCLAIMED, _QUEUED = 64, 4096


class Inbox:
    """What a worker's links receive into. Introductions are heeded, and jobs refused, at once; all else waits.

    Args:
        loop: serves all links of the worker.
        patience_s: seconds to wait for what other pool ranks send.
        key: of links to ranks on other machines.
    """

    def __init__(self, loop: Loop, patience_s: float, key: bytes | None = None) -> None:
        self.loop, self.patience_s, self._key = loop, patience_s, key
        self.steps = 0
        """What the worker has done so far; its links tell it."""
        self.refusal: Callable[[Link, Header], Header | None] = lambda link, asked: None
        """Answers a HELLO that is refused: the job that asks does not wait for what the worker computes."""
        self._waiting: deque[Arrived] = deque()
        self._exchanges: dict[Link, Exchange] = {}
        self._unclaimed: dict[int, tuple[Link, list[Arrived]]] = {}
        """Links of other pool ranks, by name, whose introduction has not come yet, and what they have brought."""

    def put(self, arrived: Arrived) -> None:
        """Called by the loop."""
        link, item = arrived
        if isinstance(item, LinkLost):
            if link in self._exchanges:
                self._exchanges[link].stop()
        elif item.header.op == Op.PEER:
            if item.header.status == Status.OK:
                self._claimed(item.header.extra, link)
            else:
                self._introduce(link, item)
            return
        elif item.header.op == Op.HELLO and (answer := self.refusal(link, item.header)) is not None:
            link.send(answer)
            return
        elif len(self._waiting) >= _QUEUED:
            link.fail(f"{_QUEUED} messages wait already")
            return
        self._waiting.append(arrived)

    def get(self) -> Arrived:
        """The next thing for the worker."""
        self.loop.wait(lambda: self._waiting)
        return self._waiting.popleft()

    @property
    def has_work(self) -> bool:
        """Whether something for the worker waits."""
        return bool(self._waiting)

    def step(self) -> None:
        """The worker has got on."""
        self.steps += 1

    def exchange(self, link: Link) -> Exchange:
        """The pool ranks that the base rank at ``link`` introduced. Raises LinkLost if there are none."""
        found = self._exchanges.get(link)
        if found is None:
            raise LinkLost("the base asks for work with pool ranks that it did not introduce")
        return found

    def leave(self, link: Link) -> None:
        """The base rank at ``link`` gives the lease back: its pool ranks need no links of their own any more."""
        exchange = self._exchanges.pop(link, None)
        if exchange is not None:
            exchange.close()

    def _introduce(self, link: Link, message: Message) -> None:
        header, known = message.header, self._exchanges.get(link)
        if known is None or known.token != header.token:
            self.leave(link)
            known = self._exchanges[link] = Exchange(
                header.number, header.token, self.loop, self.patience_s, self._key, self.step
            )
        if message.attached is not None:
            known.meet(header.peer, message.attached.socket())
        elif header.address:
            address = bytes(message.tensors[0].tolist()).decode(errors="replace")
            # The other end may be slow to answer: the worker goes on meanwhile.
            threading.Thread(target=known.reach, args=(header.peer, address, header.extra), daemon=True).start()
        else:
            known.await_link(header.peer, header.extra)
            if header.extra in self._unclaimed:
                self._claimed(header.extra, *self._unclaimed.pop(header.extra))

    def _claimed(self, name: int, link: Link, held: Iterable[Arrived] = ()) -> None:
        """A pool rank says that its link is the one of this name."""
        if any(exchange.claim(name, link, held) for exchange in list(self._exchanges.values())):
            return
        if len(self._unclaimed) >= _UNCLAIMED:
            link.fail("it was not introduced")
        else:
            # What it brings waits for the introduction, too.
            waiting = list[Arrived]()
            link.into, link.check = waiting.append, _check_part
            self._unclaimed[name] = link, waiting


class Exchange:
    """What this pool rank and those that one base rank introduced give each other, during one lease.

    Args:
        number: this rank's, in its pool.
        token: the lease.
        loop: serves the links.
        patience_s: seconds to wait for what they send.
        key: of links to ranks on other machines.
        step: called now and then while others are waited for: that is bounded, and no standstill.
    """

    def __init__(
        self,
        number: int,
        token: int,
        loop: Loop,
        patience_s: float,
        key: bytes | None = None,
        step: Callable[[], object] = int,
    ) -> None:
        self.number, self.token, self._step = number, token, step
        self._loop, self._patience_s, self._key = loop, patience_s, key
        self._peers: dict[int, _Peer] = {}
        self._awaited: dict[int, int] = {}
        """Numbers of ranks that will come by themselves, by the names of their links."""
        self._parts: dict[tuple[int, int], Message] = {}
        self._over = 0
        """The last merged call that waits for nothing any more; what comes for it or earlier ones comes too late."""

    def meet(self, number: int, sock: Any, name: int = 0) -> None:
        """Links to another rank over a connected socket; ``name`` says to the one that waits at the other end which
        link this is."""
        peer = self._peer(number)
        link = Link(
            sock, self._loop, name=f"peer {number}", timeout_s=2 * self._patience_s,
            asks=name > 0 or self.number < number, into=lambda arrived: self.came(peer, arrived[1]), check=_check_part,
        )  # fmt: skip
        if name:
            link.send(Header(op=Op.PEER, status=Status.OK, extra=name))
        peer.stands(link)

    def reach(self, number: int, address: str, name: int) -> None:
        """Connects to another rank, which waits for a link of this name."""
        peer = self._peer(number)
        try:
            self.meet(number, connect(address, self._patience_s, self._key, str(name)), name)
        except (OSError, LinkLost) as error:
            self.came(peer, LinkLost(str(error)))

    def await_link(self, number: int, name: int) -> None:
        """Another rank will come."""
        self._peer(number)
        self._awaited[name] = number

    def claim(self, name: int, link: Link, held: Iterable[Arrived] = ()) -> bool:
        """Whether a link of this name is awaited here; it is this rank's then, and what it has brought already."""
        number = self._awaited.pop(name, None)
        if number is None:
            return False
        peer = self._peer(number)
        link.into = lambda arrived: self.came(peer, arrived[1])
        link.check = _check_part
        peer.stands(link)
        for _, item in held:
            self.came(peer, item)
        return True

    def came(self, peer: _Peer, item: Message | LinkLost) -> None:
        """Something arrived from another rank, or nothing will any more."""
        if isinstance(item, LinkLost):
            peer.lost = True
        elif item.header.merge > self._over:
            self._parts[item.header.merge, peer.number] = item
        self._loop.wake()

    def send(self, number: int, header: Header, tensors: Payload) -> None:
        """Sends to another rank, as soon as its link stands; what cannot be sent is missed at the other end. Raises
        LinkLost if the base did not introduce it."""
        if number not in self._peers:
            raise LinkLost(f"the base wants an answer sent to pool rank {number}, which it did not introduce")
        self._peers[number].send(header, tensors)

    def merged(self, request: Message, own: Header, tensors: Payload) -> tuple[Header, Payload]:
        """The answer that this rank computed, merged with those that the request says are to come.

        Each rank has a row in the answer's table of parts: its number, its status, nanoseconds spent computing and
        the clock when it began. A rank without a row is missing.
        """
        asked, rows = request.header, [[self.number, own.status, own.extra, own.clock]]
        results = PartialResults(asked.group, asked.v_head_dim)
        if own.status == Status.OK:
            for row, out, lse in zip(request.tensors[0].tolist(), *tensors, strict=True):
                results.add(Tile(*row[:8]), out, lse)
        below = request.tensors[-1].tolist() if asked.peers else []
        # Others have as much to compute, and may have begun when this rank ended.
        for part in self._await(asked.merge, below, self._patience_s + own.extra / 1e9):
            out, lse, table_of_part, reported = part.tensors
            results.add_flat(table_of_part.tolist(), out, lse)
            rows += reported.tolist()
        table, (outs, lses) = results.result()
        header = own._replace(
            status=Status.OK,
            tiles=len(table),
            parts=len(rows),
            q_elements=elements(outs),
            lse_elements=elements(lses),
            dtype=dtype_code(outs[0].dtype) if table else own.dtype,
        )
        told = torch.tensor(table, dtype=torch.int64).view(len(table), TILE_FIELDS)
        return header, (outs, lses, told, torch.tensor(rows))

    def stop(self) -> None:
        """No rank is waited for any more."""
        for peer in list(self._peers.values()):
            peer.lost = True
        self._loop.wake()

    def close(self) -> None:
        """Ends all links to other ranks."""
        self.stop()
        for peer in list(self._peers.values()):
            peer.close()

    def _peer(self, number: int) -> _Peer:
        return self._peers.setdefault(number, _Peer(number))

    def _await(self, merge: int, numbers: Sequence[int], patience_s: float) -> list[Message]:
        """The parts that come, of those that these ranks should send."""
        found, deadline = [], time.monotonic() + patience_s
        for number in numbers:
            while not self._is_settled(merge, number) and (now := time.monotonic()) < deadline:
                until = min(deadline, now + STEP_S)
                self._loop.wait(partial(self._is_settled, merge, number), partial(float, until))
                self._step()
            part = self._parts.get((merge, number))
            if part is not None and _is_whole(part):
                found.append(part)
        self._over = merge
        for call in [call for call in list(self._parts) if call[0] <= merge]:
            self._parts.pop(call, None)  # others may come meanwhile
        return found

    def _is_settled(self, merge: int, number: int) -> bool:
        return (merge, number) in self._parts or number not in self._peers or self._peers[number].lost


class _Peer:
    """Another pool rank; what is sent to it before its link stands waits."""

    def __init__(self, number: int) -> None:
        self.number, self.lost = number, False
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._waiting: list[tuple[Header, Payload]] = []
        self._closed = False

    def stands(self, link: Link) -> None:
        """Its link is there."""
        with self._lock:
            late = self._closed
            if not late:
                self._link = link
                for header, tensors in self._waiting:
                    self._transmit(link, header, tensors)
                self._waiting.clear()
        if late:
            link.close()

    def send(self, header: Header, tensors: Payload) -> None:
        """Sends, or keeps for later."""
        with self._lock:
            if self._link is not None:
                self._transmit(self._link, header, tensors)
            elif not (self.lost or self._closed):
                self._waiting.append((header, tensors))
            link = self._link
        if link is not None:
            link.drain(_UNSENT)

    def close(self) -> None:
        """Ends the link, now or once it stands."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            link, self._link = self._link, None
        if link is not None:
            link.close()  # waits for who polls, and that may wait for this lock

    def _transmit(self, link: Link, header: Header, tensors: Payload) -> None:
        try:
            link.send(header, tensors)
        except LinkLost as error:
            link.fail(str(error))


def _is_whole(part: Message) -> bool:
    """Whether a part has the elements that its table tells of."""
    tiles = [Tile(*row[:8]) for row in part.tensors[2].tolist()] if len(part.tensors) > 2 else []
    ranges = [ends for tile in tiles for ends in zip(tile[::2], tile[1::2], strict=True)]
    rows = sum(tile.lanes * (tile.q_stop - tile.q_start) for tile in tiles) * part.header.group
    sizes = rows * part.header.v_head_dim, rows
    return all(0 <= low < high for low, high in ranges) and sizes == (part.header.q_elements, part.header.lse_elements)


def _check_part(header: Header) -> None:
    """Held against what another pool rank sends, before its body is received."""
    _, nbytes = rooms(header)
    if header.op != Op.ATTEND or header.status != Status.OK or not header.merge or nbytes > _PART_BYTES:
        raise LinkLost(f"another pool rank sent op {header.op} with {nbytes} bytes")
