"""A pool rank's links to other pool ranks: results are merged on their way to the base.

What does not come in time is reported as missing: the base can compute everything itself. Knows links and parts; not
who asked for what, nor why.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.partial_results import PartialResults
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import TILE_FIELDS, Header, LinkLost, Message, Op, Status, dtype_code, elements

Arrived = tuple[Link, Message | LinkLost]
Payload = Sequence[torch.Tensor | Sequence[torch.Tensor]]
Connect = Callable[[str, Literal["base", "pool"], Callable[[Arrived], object]], Link]
"""Opens one end of a link with that name, which receives into the function given. Raises RuntimeError if the other
end does not come."""

_UNSETTLED = 8
"""Messages to one rank that may be under way."""


def connect_at(host: str, port: int, patience_s: float, bind: str | None = None) -> Connect:
    """Links that meet on the store at ``host``:``port`` and bind to ``bind`` (default: ``host``); the other end is
    waited for, and may be silent, for ``patience_s`` seconds."""

    def connect(name: str, side: Literal["base", "pool"], into: Callable[[Arrived], object]) -> Link:
        # A store's client waits under a lock: a link of its own must not wait for another.
        store = dist.TCPStore(host, port, None, False, timedelta(seconds=patience_s))
        return Link(store, name, side, timeout_s=patience_s, connect_timeout_s=patience_s, host=bind or host, into=into)

    return connect


class Inbox:
    """What a worker's links to base ranks receive into. Introductions are heeded at once, all else waits.

    Args:
        connect: opens links to other pool ranks.
        patience_s: seconds to wait for what they send.
    """

    def __init__(self, connect: Connect, patience_s: float) -> None:
        self._connect, self._patience_s = connect, patience_s
        self._waiting: queue.SimpleQueue[Arrived] = queue.SimpleQueue()
        self._exchanges: dict[Link, Exchange] = {}

    def put(self, arrived: Arrived) -> None:
        """Called by the links' readers."""
        link, item = arrived
        if isinstance(item, LinkLost):
            if link in self._exchanges:
                self._exchanges[link].stop()
        elif item.header.op == Op.PEER:
            self._introduce(link, item.header)
            return
        self._waiting.put(arrived)

    def get(self) -> Arrived:
        """The next thing for the worker."""
        return self._waiting.get()

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

    def _introduce(self, link: Link, header: Header) -> None:
        known = self._exchanges.get(link)
        if known is None or known.token != header.token:
            self.leave(link)
            known = self._exchanges[link] = Exchange(header.number, header.token, self._connect, self._patience_s)
        known.meet(header.peer, f"peer{header.extra}")


class Exchange:
    """What this pool rank and those that one base rank introduced give each other, during one lease.

    Args:
        number: this rank's, in its pool.
        token: the lease.
        connect: opens links to other pool ranks.
        patience_s: seconds to wait for what they send.
    """

    def __init__(self, number: int, token: int, connect: Connect, patience_s: float) -> None:
        self.number, self.token = number, token
        self._connect, self._patience_s = connect, patience_s
        self._peers: dict[int, _Peer] = {}
        self._changed = threading.Condition()
        self._parts: dict[tuple[int, int], Message] = {}
        self._over = 0
        """The last merged call that waits for nothing any more; what comes for it or earlier ones comes too late."""

    def meet(self, number: int, name: str) -> None:
        """Opens a link to another rank, without waiting for it."""
        peer = self._peer(number)
        side: Literal["base", "pool"] = "base" if self.number < number else "pool"
        threading.Thread(target=peer.open, args=(self._connect, name, side), name=f"fapool {name}", daemon=True).start()

    def came(self, peer: _Peer, item: Message | LinkLost) -> None:
        """Something arrived from another rank, or nothing will any more."""
        with self._changed:
            if isinstance(item, LinkLost):
                peer.lost = True
            elif item.header.merge > self._over:
                self._parts[item.header.merge, peer.number] = item
            self._changed.notify_all()

    def send(self, number: int, header: Header, tensors: Payload) -> None:
        """Sends to another rank, as soon as its link stands; what cannot be sent is missed at the other end."""
        self._peer(number).send(header, tensors)

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
        with self._changed:
            for peer in list(self._peers.values()):
                peer.lost = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ends all links to other ranks."""
        self.stop()
        for peer in list(self._peers.values()):
            peer.close()

    def _peer(self, number: int) -> _Peer:
        with self._changed:
            return self._peers.setdefault(number, _Peer(self, number))

    def _await(self, merge: int, numbers: Sequence[int], patience_s: float) -> list[Message]:
        """The parts that come, of those that these ranks should send."""
        found, deadline = [], time.monotonic() + patience_s
        with self._changed:
            for number in numbers:
                settled = partial(self._is_settled, merge, number)
                self._changed.wait_for(settled, max(0.0, deadline - time.monotonic()))
                if (merge, number) in self._parts:
                    found.append(self._parts[merge, number])
            self._end(merge)
        return found

    def _is_settled(self, merge: int, number: int) -> bool:
        return (merge, number) in self._parts or number not in self._peers or self._peers[number].lost

    def _end(self, merge: int) -> None:
        self._over = merge
        self._parts = {call: kept for call, kept in self._parts.items() if call[0] > merge}


class _Peer:
    """Another pool rank; what is sent to it before its link stands waits."""

    def __init__(self, exchange: Exchange, number: int) -> None:
        self.exchange, self.number, self.lost = exchange, number, False
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._waiting: list[tuple[Header, Payload]] = []
        self._closed = False

    def open(self, connect: Connect, name: str, side: Literal["base", "pool"]) -> None:
        """Waits for the other end."""
        try:
            link = connect(name, side, lambda arrived: self.exchange.came(self, arrived[1]))
        except RuntimeError as error:
            self.exchange.came(self, LinkLost(str(error)))
            return
        with self._lock:
            if self._closed:
                link.close()
                return
            self._link = link
            for header, tensors in self._waiting:
                self._transmit(link, header, tensors)
            self._waiting.clear()

    def send(self, header: Header, tensors: Payload) -> None:
        """Sends, or keeps for later; called by several threads."""
        with self._lock:
            if self._link is not None:
                self._transmit(self._link, header, tensors)
            elif not (self.lost or self._closed):
                self._waiting.append((header, tensors))

    def close(self) -> None:
        """Ends the link, now or once it stands."""
        with self._lock:
            self._closed = True
            self._waiting.clear()
            if self._link is not None:
                self._link.close()
            self._link = None

    def _transmit(self, link: Link, header: Header, tensors: Payload) -> None:
        try:
            link.send(header, tensors)
            link.settle(link.messages_sent - _UNSETTLED)
        except LinkLost as error:
            link.fail(str(error))
