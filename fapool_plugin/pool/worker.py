"""A pool rank: holds no weights, receives tiles with their queries and new keys, answers with (out, lse).

It owns its own lease: one job at a time, over as many links as the job has base ranks. It knows links, prefixes and
kernels, but no model, no plan and no weights; how it works together with other pool ranks is in exchange. When its
links or its parent are gone it ends.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.kernels.forward import attend
from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.exchange import Inbox, Payload, connect_at
from fapool_plugin.pool.process import run_to_end
from fapool_plugin.pool.store import CallStore, KeptTile, PrefixStore
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import PROTOCOL_VERSION, Header, LinkLost, Message, Op, Status, bits_float, elements
from fapool_plugin.wire.rendezvous import wait_for_link_request

_UNSETTLED = 8
"""Replies that may be under way while the next request is computed."""


class Worker:
    """Serves requests from ``inbox`` until every link is gone.

    Args:
        inbox: what all links receive ahead into.
        memory_limit: bytes of keys and values it may hold.
        device: where it computes.
        block: positions by which its storage grows.
        node: number of the node it is on.
    """

    def __init__(self, inbox: Inbox, memory_limit: int, device: torch.device, block: int = 256, node: int = 0) -> None:
        self.inbox, self.device, self.node = inbox, device, node
        self.prefixes = PrefixStore(memory_limit, block)
        self.calls = CallStore(self.prefixes)
        self.lease: int | None = None
        self._holders: set[Link] = set()
        self._kept_for: dict[Link, set[int]] = {}
        """Sequences of which calls are kept, by who asked for it."""

    def serve(self, links: Iterable[Link], *, stay: bool = False) -> None:
        """Answers requests until every one of ``links`` has ended; with ``stay`` until the process does."""
        alive = set(links)
        while alive or stay:
            link, item = self.inbox.get()
            if isinstance(item, LinkLost):
                alive.discard(link)
                self._leave(link)
            elif link.lost is None:
                try:
                    self._handle(link, item)
                except LinkLost:
                    # It may be the base's word that was broken, not the connection: the base must learn of it.
                    link.close()

    def _handle(self, link: Link, message: Message) -> None:
        header = message.header
        if header.op == Op.HELLO:
            link.send(self._hello(link, header))
        elif self.lease is None or header.token != self.lease:
            if header.op in (Op.ATTEND, Op.BACKWARD):
                link.send(header._replace(status=Status.STALE))
        elif header.op in (Op.ATTEND, Op.BACKWARD):
            if header.op == Op.ATTEND and header.keep == 2:
                self._kept_for.setdefault(link, set()).add(header.sequence)
            self._answer(link, message)
            link.settle(link.messages_sent - _UNSETTLED)
        elif header.op == Op.FREE:
            self.prefixes.free(header.sequence)
            self.calls.free(header.sequence)
            self._kept_for.get(link, set()).discard(header.sequence)
        elif header.op == Op.RELEASE:
            self._leave(link)

    def _answer(self, link: Link, message: Message) -> None:
        """Answers the base, or the pool rank that merges this answer with its own."""
        header = message.header
        compute = self.backward if header.op == Op.BACKWARD else self.attend
        if not header.merge:
            link.send(*compute(message))
            return
        exchange = self.inbox.exchange(link)
        merged = exchange.merged(message, *compute(message))
        if header.peer:
            exchange.send(header.peer - 1, *merged)
        else:
            link.send(*merged)

    def _hello(self, link: Link, header: Header) -> Header:
        if header.version != PROTOCOL_VERSION:
            return Header(op=Op.HELLO, status=Status.VERSION)
        if self.lease is not None and self.lease != header.token:
            return Header(op=Op.HELLO, status=Status.BUSY, token=header.token)
        self.lease = header.token
        self._holders.add(link)
        limit, clock = self.prefixes.limit_bytes, time.perf_counter_ns()
        answer = Header(op=Op.HELLO, status=Status.OK, token=header.token, extra=limit, clock=clock)
        return answer._replace(number=self.node)

    def _leave(self, link: Link) -> None:
        """One base rank gives the lease back; with the last one everything it left here goes."""
        self._holders.discard(link)
        self.inbox.leave(link)
        for sequence in self._kept_for.pop(link, ()):
            self.calls.free(sequence)
        if not self._holders:
            self.lease = None
            self.prefixes.clear()
            self.calls.clear()

    def attend(self, message: Message) -> tuple[Header, Payload]:
        """Computes a request's tiles. STALE, with no tensors, if a prefix or a kept call it assumes is not here."""
        began, asked = time.perf_counter_ns(), message.header
        if asked.keep == 2 and asked.extra:
            if not asked.tiles:  # the same call once more
                known = self.calls.get(asked.sequence, asked.extra)
                return _attended(asked, known, began) if known else (asked._replace(status=Status.STALE), ())
            self.calls.pop(asked.sequence, asked.extra)
        request, computed = _Request(message, self.device), []
        for *ranges, key_start, key_stop in message.tensors[0].tolist():
            tile = Tile(*ranges)
            new_k, new_v = request.keys(tile, key_stop - key_start)
            if asked.keep != 1:
                keys = slice(tile.k_start - key_start, tile.k_stop - key_start)
                k, v = new_k[:, :, keys], new_v[:, :, keys]
            else:
                where = asked.sequence, asked.layer, tile
                stored = key_stop == key_start or self.prefixes.put(*where, new_k, new_v, key_start, asked.capacity)
                if not stored or self.prefixes.length(*where) < max(tile.k_stop, key_start):
                    return asked._replace(status=Status.STALE), ()
                k, v = self.prefixes.get(*where)
            q, k, v = (x.transpose(1, 2) for x in (request.queries(tile), k, v))
            out, lse = attend(
                q, k, v,
                softmax_scale=request.scale, causal=True, q_offset=tile.q_start - tile.k_start, softcap=request.softcap,
            )  # fmt: skip
            computed.append(KeptTile(q, k, v, out, lse))
        if asked.keep == 2 and not self.calls.put(asked.sequence, asked.call, computed):
            asked = asked._replace(keep=0)
        return _attended(asked, computed, began)

    def backward(self, message: Message) -> tuple[Header, Payload]:
        """Gradients of a request's tiles: for each tile (dq, dk, dv) in one precision that can be summed. STALE, with
        no tensors, if a kept call it assumes is not here."""
        began, asked, table = time.perf_counter_ns(), message.header, message.tensors[0].tolist()
        kept = self.calls.pop(asked.sequence, asked.extra) if asked.keep else []
        if kept is None or (asked.keep and len(kept) != len(table)):
            return asked._replace(status=Status.STALE), ()
        request, dqs, dks, dvs = _Request(message, self.device), [], [], []
        for index, ranges in enumerate(table):
            tile = Tile(*ranges[:8])
            if asked.keep:
                q, k, v, out, lse = kept[index]
            else:
                keys = request.keys(tile, tile.k_stop - tile.k_start)
                q, k, v = (x.transpose(1, 2) for x in (request.queries(tile), *keys))
            if asked.keep < 2:
                out, lse = request.results(tile)
            dout = request.dout(tile)
            dq, dk, dv = attend_backward(
                dout, q, k, v, out, lse,
                softmax_scale=request.scale, causal=True, q_offset=tile.q_start - tile.k_start, softcap=request.softcap,
            )  # fmt: skip
            # Heads first, as all that travels.
            dqs.append(dq.transpose(1, 2))
            dks.append(dk.transpose(1, 2))
            dvs.append(dv.transpose(1, 2))
        header = asked._replace(
            status=Status.OK,
            q_elements=elements(dqs),
            k_elements=elements(dks),
            v_elements=elements(dvs),
            extra=time.perf_counter_ns() - began,
            clock=began,
        )
        return header, (dqs, dks, dvs)


def _attended(asked: Header, tiles: list[KeptTile], began: int) -> tuple[Header, Payload]:
    """The reply to ATTEND with the results of these tiles."""
    outs, lses = [tile.out for tile in tiles], [tile.lse for tile in tiles]
    took = time.perf_counter_ns() - began
    header = asked._replace(status=Status.OK, q_elements=elements(outs), lse_elements=elements(lses))
    return header._replace(extra=took, clock=began), (outs, lses)


class _Request:
    """Reads a request's flat payload tile by tile."""

    def __init__(self, message: Message, device: torch.device) -> None:
        self.header = message.header
        self._q, self._k, self._v = (tensor.to(device) for tensor in message.tensors[1:4])
        self._results = [tensor.to(device) for tensor in message.tensors[4:7]]
        self._q_at = self._k_at = self._v_at = self._row_at = self._dout_at = 0
        self.scale, self.softcap = bits_float(self.header.scale_bits), bits_float(self.header.softcap_bits)

    def queries(self, tile: Tile) -> Tensor:
        """The next tile's queries, (rows, H, S, D)."""
        rows, heads, length = self._sizes(tile)
        self._q_at, start = self._q_at + rows * heads * length * self.header.head_dim, self._q_at
        return self._q[start : self._q_at].view(rows, heads, length, self.header.head_dim)

    def results(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The next tile's outputs (rows, S, H, E) and LSEs (rows, H, S)."""
        (rows, heads, length), dim = self._sizes(tile), self.header.v_head_dim
        self._row_at, start = self._row_at + rows * heads * length, self._row_at
        out = self._results[0][start * dim : self._row_at * dim].view(rows, length, heads, dim)
        return out, self._results[1][start : self._row_at].view(rows, heads, length)

    def dout(self, tile: Tile) -> Tensor:
        """The gradients of the next tile's outputs, (rows, S, H, E)."""
        (rows, heads, length), dim = self._sizes(tile), self.header.v_head_dim
        self._dout_at, start = self._dout_at + rows * heads * length * dim, self._dout_at
        return self._results[2][start : self._dout_at].view(rows, length, heads, dim)

    def keys(self, tile: Tile, length: int) -> tuple[Tensor, Tensor]:
        """The next tile's new keys (rows, K, T, D) and values (rows, K, T, E)."""
        self._k_at, k_start = self._k_at + tile.lanes * length * self.header.head_dim, self._k_at
        self._v_at, v_start = self._v_at + tile.lanes * length * self.header.v_head_dim, self._v_at
        shape = tile.row_stop - tile.row_start, tile.head_stop - tile.head_start, length
        k = self._k[k_start : self._k_at].view(*shape, self.header.head_dim)
        return k, self._v[v_start : self._v_at].view(*shape, self.header.v_head_dim)

    def _sizes(self, tile: Tile) -> tuple[int, int, int]:
        """Rows, query heads, and queries of each."""
        heads = (tile.head_stop - tile.head_start) * self.header.group
        return tile.row_stop - tile.row_start, heads, tile.q_stop - tile.q_start


def end_with_parent(parent: int) -> None:
    """Ends this process once its parent is gone: its standard input closes, or it is adopted."""

    def read() -> None:
        while os.read(0, 1):
            pass
        os._exit(0)

    def poll() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    for target in (read, poll):
        threading.Thread(target=target, daemon=True).start()


def _accept(connect: Callable[[str], Link], store: dist.Store, name: str) -> None:
    """Opens every link that is asked for, until the store is gone."""

    def open_link(link: str) -> None:
        # Whoever asked and does not come learns it at the other end.
        with suppress(RuntimeError):
            connect(link)

    with suppress(RuntimeError):
        for number in count(1):
            link = wait_for_link_request(store, name, number)
            threading.Thread(target=open_link, args=(link,), name=f"fapool {link}", daemon=True).start()


def main(arguments: list[str] | None = None) -> None:
    """Entry of a pool rank's process."""
    parser = argparse.ArgumentParser(prog="python -m fapool_plugin.pool.worker", description=__doc__)
    parser.add_argument("--store", required=True, metavar="HOST:PORT", help="where base and pool ranks meet")
    parser.add_argument("--name", required=True, help="by which links to it are asked for")
    parser.add_argument("--bind", help="address for links; default: the store's host")
    parser.add_argument(
        "--stay", action="store_true", help="serve one base rank after the other; else end with the first"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads to compute with")
    parser.add_argument("--memory-limit", type=int, required=True, help="bytes of keys and values to hold at most")
    parser.add_argument("--block", type=int, default=256, help="positions by which storage grows")
    parser.add_argument(
        "--silence", type=float, default=30.0, help="seconds without a heartbeat after which a lease ends"
    )
    parser.add_argument("--patience", type=float, default=5.0, help="seconds to wait for what another pool rank sends")
    parser.add_argument("--node", type=int, default=0, help="number of the node this rank is on")
    parser.add_argument("--device", default="cpu", help="torch device to compute on")
    parser.add_argument("--parent", type=int, default=0, help="process id to end with; 0: none")
    options = parser.parse_args(arguments)
    if options.parent:
        end_with_parent(options.parent)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    host, port = options.store.rsplit(":", 1)
    bind, silence = options.bind or host, options.silence

    def client() -> dist.TCPStore:
        # A store's client waits under a lock: whoever waits has one of its own.
        return dist.TCPStore(host, int(port), None, False, timedelta(seconds=silence))

    def connect(name: str) -> Link:
        return Link(client(), name, "pool", timeout_s=silence, host=bind, into=inbox.put)

    inbox = Inbox(connect_at(host, int(port), options.patience, bind), options.patience)
    worker = Worker(inbox, options.memory_limit, torch.device(options.device), options.block, options.node)
    store = client()
    store.set(f"{options.name}/ready", str(os.getpid()))
    if options.stay:
        threading.Thread(target=_accept, args=(connect, store, options.name), daemon=True).start()
        worker.serve([], stay=True)
    else:
        worker.serve([connect(wait_for_link_request(store, options.name, 1))])


if __name__ == "__main__":
    run_to_end(main)
