"""A pool rank: holds no weights, receives tiles with their queries and new keys, answers with (out, lse).

    receive ── compute, band by band ── sent                                      on a CPU
    receive ── launch ── copy begun ── the next one launched ── copy awaited ── sent     on a device

It serves one job at a time, over as many links as the job has base ranks; which, its lease says. It knows links,
prefixes and kernels, but no model, no plan and no weights; how it works together with other pool ranks is in exchange.
When its links or its parent are gone it ends.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.devices.clock import Clock, Moment
from fapool_plugin.devices.copies import Copies, Staged, brought, sendable
from fapool_plugin.devices.cudart import Cudart
from fapool_plugin.devices.gpu import identity
from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.kernels.band import exact_dtype
from fapool_plugin.kernels.forward import attend
from fapool_plugin.kernels.lanes import Rectangle, attend_all, can_attend_together
from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.bands import Bands
from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.lease import Lease
from fapool_plugin.pool.report import Report
from fapool_plugin.pool.request import TileRequest, check_header, fetched, stored
from fapool_plugin.pool.store import CallStore, KeptTile
from fapool_plugin.store.prefixes import PrefixStore
from fapool_plugin.wire.link import Link, first_line
from fapool_plugin.wire.messages import (
    PROTOCOL_VERSION,
    Header,
    LinkLost,
    Message,
    Op,
    Payload,
    Status,
    elements,
)
from fapool_plugin.wire.sockets import caller
from fapool_plugin.wire.window import Window

_UNSENT = 8
"""Replies that may wait to be sent while the next request is computed."""


class _Leaving(NamedTuple):
    """An answer on its way from a device."""

    link: Link
    header: Header
    payload: Staged
    began: Moment
    ended: Moment
    bands: int
    """Launched until it was."""


class Worker:
    """Serves requests from ``inbox`` until every link is gone.

    Args:
        inbox: what all links receive ahead into.
        memory_limit: bytes of keys and values it may hold.
        device: where it computes.
        block: positions by which its storage grows.
        node: number of the node it is on.
        report: where it tells of itself.
    """

    def __init__(
        self, inbox: Inbox, memory_limit: int, device: torch.device, block: int = 256, node: int = 0,
        report: Report | None = None,
    ) -> None:  # fmt: skip
        self._report = report or Report()
        self.inbox, self.device, self.node = inbox, device, node
        self.prefixes = PrefixStore(memory_limit, block)
        self.calls = CallStore(self.prefixes)
        self.lease = Lease(self._report.is_leaving)
        self._at_work = False
        self.window: Callable[[float], Window] | None = None
        inbox.refusal = self._refusal
        self.clock, self.copies = Clock(device), Copies() if device.type == "cuda" else None
        self._span: tuple[Moment, Moment] | None = None
        """When the last answer's computation began and ended."""
        self._bands, self._leaving = Bands(self.clock, inbox.step), list[_Leaving]()
        self._kept_for: dict[Link, set[int]] = {}
        """Sequences of which calls are kept, by who asked for it."""

    def link(self, sock: socket.socket, silence_s: float) -> Link:
        """A base rank's, or another pool rank's, connection; lost when it is silent for so long."""
        link = Link(
            sock, self.inbox.loop, name=caller(sock), timeout_s=silence_s, asks=False, into=self.inbox.put,
            steps=lambda: self.inbox.steps, wishes=self.lease.wishes,
            check=lambda header: check_header(header, self.prefixes.limit_bytes), window=self.window,
        )  # fmt: skip
        link.terms.device = Cudart.of(self.device)
        return link

    def serve(self, links: Iterable[Link], *, stay: bool = False) -> None:
        """Answers requests until every one of ``links`` has ended; with ``stay`` until the process does."""
        alive = set(links)
        self._report.tell(self.lease.job, self.prefixes.nbytes)
        while alive or stay:
            if not self.inbox.has_work:
                self._let_leave()
            link, item = self.inbox.get()
            self._at_work = True
            if isinstance(item, LinkLost):
                alive.discard(link)
                self._leave(link)
            elif link.lost is None:
                began = time.perf_counter_ns()
                try:
                    self._handle(link, item)
                except torch.AcceleratorError:
                    raise  # nothing that is asked of the device would be done any more: the process ends
                except Exception as error:
                    # Whatever it was about, the base learns that this was not computed, and others are served on.
                    link.fail(first_line(error))
                self.inbox.steps += 1
                if item.header.token == self.lease.token:
                    self.lease.used()
                if item.header.op in (Op.ATTEND, Op.BACKWARD):
                    self._report.answered(time.perf_counter_ns() - began)
            self._at_work = False
            self._report.tell(self.lease.job, self.prefixes.nbytes)
            del item  # a body that waits for the next message would be kept

    def _handle(self, link: Link, message: Message) -> None:
        header = message.header
        if header.merge or header.op not in (Op.ATTEND, Op.BACKWARD):
            self._let_leave()
        if header.op == Op.HELLO:
            self._greeted(link, message, self._hello(link, header))
        elif header.token != self.lease.token:
            # What goes to another rank is missed there; the base has not asked for it.
            if header.op in (Op.ATTEND, Op.BACKWARD, Op.FETCH) and not header.peer:
                link.send(header._replace(status=Status.STALE))
        elif header.op in (Op.ATTEND, Op.BACKWARD):
            if header.op == Op.ATTEND and header.keep == 2:
                self._kept_for.setdefault(link, set()).add(header.sequence)
            self._answer(link, message)
            link.drain(_UNSENT)
        elif header.op == Op.FETCH:
            asked, keys = self.fetch(message)
            link.send(asked, sendable(self.copies, keys, link.carrier.takes))
        elif header.op == Op.STORE:
            self.store(message)
        elif header.op == Op.SELECT:
            self.prefixes.select(header.sequence, header.layer, message.tensors[0].tolist())
        elif header.op == Op.FREE:
            self.prefixes.free(header.sequence)
            self.calls.free(header.sequence)
            self._kept_for.get(link, set()).discard(header.sequence)
        elif header.op == Op.RELEASE:
            self._leave(link)

    def _answer(self, link: Link, message: Message) -> None:
        """Answers the base, or the pool rank that merges this answer with its own."""
        asked = message.header
        try:
            header, payload = (self.backward if asked.op == Op.BACKWARD else self.attend)(message)
        except torch.OutOfMemoryError:
            # What is held stays, and the base computes this itself.
            header, payload = asked._replace(status=Status.FULL, extra=0), ()
        if asked.merge:
            self._answer_merged(link, message, header, payload)
            return
        leaving = self._copied(link, header, payload) if payload and self.copies is not None else None
        self._let_leave()
        if leaving is not None:
            self._leaving.append(leaving)
        else:
            link.send(header, payload)

    def _answer_merged(self, link: Link, message: Message, header: Header, payload: Payload) -> None:
        asked, exchange = message.header, self.inbox.exchange(link)
        if payload and self.copies is not None:
            # Tile by tile, as it is merged with others' parts.
            leaving = self._copied(link, header, [x for part in payload for x in part], merged=True)
            header, there = self._arrived(leaving)
            payload = there[: len(there) // 2], there[len(there) // 2 :]
        merged = exchange.merged(message, header, payload)
        if asked.peer:
            exchange.send(asked.peer - 1, *merged)
        else:
            link.send(*merged)

    def _copied(self, link: Link, header: Header, payload: Payload, *, merged: bool = False) -> _Leaving:
        """Begins to copy an answer from the device, unless its carrier does; what is merged here comes to the host."""
        assert self._span is not None
        assert self.copies is not None
        staged = self.copies.start(payload) if merged else self.copies.start(payload, link.carrier.takes)
        return _Leaving(link, header, staged, *self._span, self._bands.launched)

    def _arrived(self, leaving: _Leaving) -> tuple[Header, list[Tensor]]:
        """Waits for an answer, band by band; it says then what it took."""
        self._bands.count(leaving.bands)
        took_ns = round(leaving.ended.waited_since(leaving.began) * 1e9)
        return leaving.header._replace(extra=took_ns), leaving.payload.wait()

    def _let_leave(self) -> None:
        """Sends what is on its way from the device."""
        while self._leaving:
            leaving = self._leaving.pop(0)
            try:
                leaving.link.send(*self._arrived(leaving))
                leaving.link.drain(_UNSENT)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                leaving.link.fail(first_line(error))

    def _refusal(self, link: Link, asked: Header) -> Header | None:
        """Asked for by the loop while this computes."""
        # Of the lease that it had the job may have said the end just before.
        if asked.version != PROTOCOL_VERSION or self.lease.has(link):
            return None
        return self.lease.refusal(link, asked, at_work=self._at_work or self.inbox.has_work)

    def _greeted(self, link: Link, message: Message, answer: Header) -> None:
        """Answers HELLO, with what is agreed on of how bodies travel."""
        made = name = None
        if answer.status == Status.OK:
            theirs = message.tensors[0] if message.header.address else None
            keep, name, made = link.terms.answered(message.header.keep, theirs, message.attached)
            answer = answer._replace(keep=keep, address=0 if name is None else len(name))
        link.send(answer, () if name is None else [name], made)

    def _hello(self, link: Link, header: Header) -> Header:
        if header.version != PROTOCOL_VERSION:
            return Header(op=Op.HELLO, status=Status.VERSION)
        if (refused := self.lease.refusal(link, header)) is not None:
            return refused
        if self.lease.token not in (None, header.token):
            for holder in self.lease.recall():
                self._leave(holder)
        self.lease.grant(link, header)
        limit, clock = self.prefixes.limit_bytes, time.perf_counter_ns()
        answer = Header(op=Op.HELLO, status=Status.OK, token=header.token, extra=limit, clock=clock)
        return answer._replace(number=self.node, peer=identity(self.device))

    def _leave(self, link: Link) -> None:
        """One base rank gives the lease back; with the last one everything it left here goes."""
        free = self.lease.leave(link)
        self.inbox.leave(link)
        for sequence in self._kept_for.pop(link, ()):
            self.calls.free(sequence)
        if free:
            self.prefixes.clear()
            self.calls.clear()

    def attend(self, message: Message) -> tuple[Header, Payload]:
        """Computes a request's tiles. STALE, with no tensors, if a prefix or a kept call it assumes is not here."""
        began, asked = self.clock.now(), message.header
        if asked.keep == 2 and asked.extra:
            if not asked.tiles:  # the same call once more
                known = self.calls.get(asked.sequence, asked.extra)
                return self._attended(asked, known, began) if known else (asked._replace(status=Status.STALE), ())
            self.calls.pop(asked.sequence, asked.extra)
        request, keys = TileRequest(message, self.device, self.copies), list[tuple[Tensor, Tensor]]()
        where = asked.sequence, asked.layer
        for tile, key_start, key_stop, capacity in request.entries:
            new_k, new_v = request.keys(tile, key_stop - key_start)
            if asked.keep not in (1, 3):
                there = slice(tile.k_start - key_start, tile.k_stop - key_start)
                keys.append((new_k[:, :, there], new_v[:, :, there]))
                continue
            owned = asked.keep == 3
            stored = key_stop == key_start or self.prefixes.put(
                *where, tile, new_k, new_v, key_start, capacity, owned=owned
            )
            if not stored or self.prefixes.length(*where, tile) < max(tile.k_stop, key_start):
                full = owned and not stored and (not key_start or self.prefixes.length(*where, tile) >= key_start)
                return asked._replace(status=Status.FULL if full else Status.STALE), ()
        tiles = [tile for tile, *_ in request.entries]
        queries = [request.queries(tile).transpose(1, 2) for tile in tiles]
        if asked.keep in (1, 3):
            dims = asked.head_dim, asked.v_head_dim
            if len(tiles) > 1 and can_attend_together(queries[0], *dims, request.softcap):
                self.prefixes.together(*where, tiles)
            keys = [self.prefixes.get(*where, tile) for tile in tiles]
        parts = [
            Rectangle(q, k.transpose(1, 2), v.transpose(1, 2), tile.q_start - tile.k_start)
            for tile, q, (k, v) in zip(tiles, queries, keys, strict=True)
        ]
        alone = partial(self._attend, request)
        found = attend_all(parts, softmax_scale=request.scale, softcap=request.softcap, alone=alone)
        computed = [KeptTile(*part[:3], *one) for part, one in zip(parts, found, strict=True)]
        if asked.keep == 2 and not self.calls.put(asked.sequence, asked.call, computed):
            asked = asked._replace(keep=0)
        return self._attended(asked, computed, began)

    def fetch(self, message: Message) -> tuple[Header, Payload]:
        """The keys and values that a request names, tile behind tile. STALE, with no tensors, if any is not here."""
        asked, ks, vs = message.header, list[Tensor](), list[Tensor]()
        for tile, *_ in fetched(message):
            where = asked.sequence, asked.layer, tile
            if self.prefixes.length(*where) < tile.k_stop:
                return asked._replace(status=Status.STALE), ()
            k, v = self.prefixes.get(*where)
            ks.append(k)
            vs.append(v)
        return asked._replace(status=Status.OK, k_elements=elements(ks), v_elements=elements(vs)), (ks, vs)

    def store(self, message: Message) -> None:
        """Keeps a copy of what another rank owns; nothing of it any more, where memory does not suffice for all."""
        asked = message.header
        try:
            for (tile, start, _, capacity), k, v in stored(message):
                k, v = brought(self.copies, (k, v), self.device)
                if not self.prefixes.put(asked.sequence, asked.layer, tile, k, v, start, capacity, owned=True):
                    raise torch.OutOfMemoryError
        except torch.OutOfMemoryError:
            self.prefixes.free(asked.sequence)

    def backward(self, message: Message) -> tuple[Header, Payload]:
        """Gradients of a request's tiles: for each tile (dq, dk, dv), in fp32 (fp64), or as their kernel rounded them.
        STALE, with no tensors, if a kept call it assumes is not here."""
        began, asked = self.clock.now(), message.header
        request = TileRequest(message, self.device, self.copies)
        kept = self.calls.pop(asked.sequence, asked.extra) if asked.keep else []
        if kept is None or (asked.keep and len(kept) != len(request.entries)):
            return asked._replace(status=Status.STALE), ()
        dqs, dks, dvs = [], [], []
        for index, (tile, *_) in enumerate(request.entries):
            if asked.keep:
                q, k, v, out, lse = kept[index]
                if q.shape[:3] != tuple(request.sizes(tile)[at] for at in (0, 2, 1)):
                    raise LinkLost(f"asked for gradients of {tile}, and the call that is kept has others")
            else:
                keys = request.keys(tile, tile.k_stop - tile.k_start)
                q, k, v = (x.transpose(1, 2) for x in (request.queries(tile), *keys))
            if asked.keep < 2:
                out, lse = request.results(tile)
            dq, dk, dv = self._attend_backward(request, tile, request.dout(tile), q, k, v, out, lse)
            # Heads first, as all that travels.
            dqs.append(dq.transpose(1, 2))
            dks.append(dk.transpose(1, 2))
            dvs.append(dv.transpose(1, 2))
        # What a kernel has rounded is as exact in half the bytes.
        rounded = all(x.dtype.itemsize == 2 for x in dqs)
        if not rounded:
            dqs, dks, dvs = ([x.to(exact_dtype(x.dtype)) for x in parts] for parts in (dqs, dks, dvs))
        sizes = zip(("q_elements", "k_elements", "v_elements"), map(elements, (dqs, dks, dvs)), strict=True)
        header = asked._replace(status=Status.OK, keep=int(rounded), **dict(sizes))
        return self._timed(header, began), (dqs, dks, dvs)

    def _attended(self, asked: Header, tiles: list[KeptTile], began: Moment) -> tuple[Header, Payload]:
        """The reply to ATTEND with the results of these tiles."""
        outs, lses = [tile.out for tile in tiles], [tile.lse for tile in tiles]
        header = asked._replace(status=Status.OK, q_elements=elements(outs), lse_elements=elements(lses))
        return self._timed(header, began), (outs, lses)

    def _timed(self, header: Header, began: Moment) -> Header:
        """A reply with what it took; a device says so when it is there."""
        self._span = began, (ended := self.clock.now())
        return header._replace(extra=round((ended.since(began) or 0.0) * 1e9), clock=began.ns)

    def _attend(self, request: TileRequest, part: Rectangle) -> tuple[Tensor, Tensor]:
        """(out, lse) of a tile, in bands of queries."""
        (q, k, v, q_offset), outs, lses = part, list[Tensor](), list[Tensor]()
        for band in self._bands.cut(q.shape[1], 2 * (q.numel() // q.shape[1]) * (k.shape[1] + v.shape[1])):
            out, lse = attend(
                q if band.stop - band.start == q.shape[1] else q[:, band], k, v,
                softmax_scale=request.scale, causal=True, q_offset=q_offset + band.start, softcap=request.softcap,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, dim=1), torch.cat(lses, dim=2))

    def _attend_backward(
        self, request: TileRequest, tile: Tile, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv) of a tile, in bands of queries."""
        dqs, sums = list[Tensor](), list[Tensor]()
        for band in self._bands.cut(q.shape[1], 10 * q[:, 0].numel() * k.shape[1]):
            dq, dk, dv = attend_backward(
                dout[:, band], q[:, band], k, v, out[:, band], lse[:, :, band],
                softmax_scale=request.scale, causal=True, q_offset=tile.q_start - tile.k_start + band.start,
                softcap=request.softcap,
            )  # fmt: skip
            dqs.append(dq)
            # Of several bands the sum is exact, and rounded once, as that of a kernel.
            known = [x.to(exact_dtype(x.dtype)) for x in sums]
            sums = [x.add_(y) for x, y in zip(known, (dk, dv), strict=True)] if sums else [dk, dv]
        dtype = dqs[0].dtype
        return dqs[0] if len(dqs) == 1 else torch.cat(dqs, dim=1), sums[0].to(dtype), sums[1].to(dtype)
