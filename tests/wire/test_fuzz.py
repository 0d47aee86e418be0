"""Messages that were not meant: none ends a process, none is believed, and none takes memory that it does not bring."""

from __future__ import annotations

import gc
import random
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest
import torch

from fapool_plugin.base.lease import Outstanding, expected
from fapool_plugin.plan.line import Tile
from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.request import check_header
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import (
    HEADER_BYTES,
    TILE_FIELDS,
    Header,
    LinkLost,
    Op,
    Status,
    dtype_code,
    float_bits,
    header_bytes,
    header_of,
    packed,
    rooms,
)
from fapool_plugin.wire.ring import Ring
from fapool_plugin.wire.sockets import pair
from tests.thread_pool import two_loops

D, KEYS = 4, 12
LIMIT, RING = 2**24, 2**16
VALUES = (0, 1, 2, 3, 5, 7, 9, 64, 2**20, 2**31, 2**40, 2**62, -1, -2, -(2**62))
FULL = pytest.mark.full


def computed(token: int, random_: random.Random) -> tuple[Header, list[torch.Tensor]]:
    """A request that is right, for two tiles of new keys."""
    tiles = [Tile(0, 1, 0, 1, KEYS - 2, KEYS, 0, KEYS), Tile(0, 1, 1, 2, KEYS - 2, KEYS, 0, KEYS)]
    table = torch.tensor([[*tile, 0, KEYS, 0] for tile in tiles])
    header = Header(
        op=random_.choice((Op.ATTEND, Op.ATTEND, Op.BACKWARD)), token=token, call=random_.randrange(9),
        sequence=random_.randrange(3), keep=random_.choice((0, 1, 2, 3)), tiles=2, q_elements=4 * D,
        k_elements=2 * KEYS * D, v_elements=2 * KEYS * D, group=1, head_dim=D, v_head_dim=D,
        dtype=dtype_code(torch.float32), scale_bits=float_bits(1.0),
    )  # fmt: skip
    parts = [table, torch.randn(4 * D), torch.randn(2 * KEYS * D), torch.randn(2 * KEYS * D)]
    if header.op == Op.BACKWARD:
        header = header._replace(keep=0, lse_elements=4)
        parts += [torch.randn(4 * D), torch.randn(4), torch.randn(4 * D)]
    return header, parts


def request(token: int, random_: random.Random) -> tuple[Header, list[torch.Tensor]]:
    """One that is right, for two tiles of new keys or of what may be asked of them."""
    header, parts = computed(token, random_)
    if random_.random() < 0.8:
        return header, parts
    sequence, table, dtype = random_.randrange(3), parts[0], dtype_code(torch.float32)
    op = random_.choice((Op.FETCH, Op.SELECT, Op.STORE))
    asked = Header(op=op, token=token, sequence=sequence, dtype=dtype)
    if op == Op.SELECT:
        return asked._replace(peers=2), [torch.tensor([random_.randrange(-2, 3) for _ in range(2)])]
    if op == Op.FETCH:
        return asked._replace(tiles=2), [table]
    sizes = {"k_elements": 2 * KEYS * D, "v_elements": 2 * KEYS * D, "head_dim": D, "v_head_dim": D}
    return asked._replace(tiles=2, **sizes), [table, torch.randn(2 * KEYS * D), torch.randn(2 * KEYS * D)]


def mutated(header: Header, random_: random.Random) -> Header:
    fields = list(header)
    for _ in range(random_.choice((1, 1, 2, 5))):
        at = random_.randrange(1, len(fields))
        fields[at] = random_.choice((*VALUES, fields[at] + 1, fields[at] * 2, random_.getrandbits(63)))
        fields[at] = max(-(2**63), min(fields[at], 2**63 - 1))
    return Header(*fields)


@pytest.mark.parametrize("count", [20_000, pytest.param(200_000, marks=FULL)])
def test_headers_are_taken_or_refused_and_nothing_else(count: int) -> None:
    random_ = random.Random(count)
    outstanding, asked = Outstanding(), computed(1, random_)[0]._replace(op=Op.ATTEND, call=1)
    tiles = [Tile(0, 1, 0, 1, 0, 2, 0, KEYS)]
    answers = refused = 0
    for _ in range(count):
        header = mutated(asked._replace(status=random_.choice((Status.REQUEST, Status.OK))), random_)
        header = header_of(header_bytes(header))
        outstanding.expect(1, 1, expected(asked, tiles))
        for check in (lambda header: check_header(header, LIMIT), outstanding):
            try:
                check(header)
                _, nbytes = rooms(header)
                assert nbytes < 4 * LIMIT + 2**27, f"{header} would have taken {nbytes} bytes"
                answers += check is outstanding and header.status == Status.OK
            except LinkLost:
                refused += 1
    assert refused > count / 2
    assert answers == 0, "an answer of another size was taken"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [500, pytest.param(5_000, marks=FULL)])
def test_a_worker_outlives_every_message(count: int) -> None:
    """Each stranger has a link of its own, says HELLO and then a message with changed fields, table or length."""
    random_ = random.Random(count)
    with two_loops() as (base_loop, pool_loop):
        inbox = Inbox(pool_loop, 0.2)
        worker = Worker(inbox, LIMIT, torch.device("cpu"))
        mine, its = pair()
        honest = Link(mine, base_loop, name="honest", timeout_s=30, asks=True)
        thread = threading.Thread(target=worker.serve, args=([worker.link(its, 30.0)],), daemon=True)
        thread.start()
        honest.send(Header(op=Op.HELLO, token=1))
        assert honest.receive(20.0).header.status == Status.OK
        process = psutil.Process()
        gc.collect()
        before = process.memory_info().rss
        for number in range(count):
            stranger, other = pair()
            worker.link(other, 30.0)
            with suppress(OSError):  # it was cut off
                _say(stranger, random_)
            stranger.close()
            if number % 50 == 0:
                _is_served(honest, random_)
        _is_served(honest, random_)
        deadline = time.monotonic() + 30
        while len(pool_loop._handlers) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(pool_loop._handlers) == 1, "links of strangers that have gone are kept"
        gc.collect()
        grown = (process.memory_info().rss - before) / 2**20
        assert grown < 64, f"the process grew by {grown:.0f} MiB"
        honest.close()
        thread.join(20)
        assert not thread.is_alive()


def _say(stranger: socket.socket, random_: random.Random) -> None:
    header, parts = request(1, random_)
    if random_.random() < 0.4:
        _write(stranger, header, parts, random_)
        return
    right = b"".join(bytes(buffer) for buffer in packed(header, parts).buffers)
    message = bytearray(right)
    how: Callable[[], None] = random_.choice(
        (
            lambda: message.__setitem__(slice(0, HEADER_BYTES), header_bytes(mutated(header, random_))),
            lambda: message.__setitem__(slice(HEADER_BYTES, None), _table(message, random_)),
            lambda: message.__delitem__(slice(random_.randrange(len(message)), None)),
            lambda: message.extend(random_.randbytes(random_.randrange(1, 600))),
        )
    )
    how()
    stranger.setblocking(False)
    stranger.send(header_bytes(Header(op=Op.HELLO, token=random_.choice((1, 2)))))
    stranger.send(message)
    if random_.random() < 0.3:
        stranger.send(message)


def _write(stranger: socket.socket, header: Header, parts: list[torch.Tensor], random_: random.Random) -> None:
    """Bodies through memory that was agreed on, and wrong words about where they are."""
    _, made = Ring.made(RING)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, made.fileno().to_bytes(4, "little"))]
    stranger.settimeout(10)
    stranger.sendmsg([header_bytes(Header(op=Op.HELLO, token=1))], rights)
    came: list[tuple[int, int, bytes]] = []
    while not came:  # the first word is a heartbeat
        _, came, _, _ = stranger.recvmsg(HEADER_BYTES, socket.CMSG_SPACE(4))
    theirs = Ring(Descriptor(int.from_bytes(came[0][2][:4], "little")))
    body = b"".join(bytes(buffer) for buffer in packed(header, parts).buffers[1:])
    at = 64 * random_.randrange((RING - len(body)) // 64)
    theirs.part(at, len(body))[:] = list(body)
    first = random_.choice((len(body), random_.randrange(1, len(body))))
    room = {"answer_slot": 64 * random_.randrange(8), "answer_bytes": random_.choice((0, RING // 64, RING // 4))}
    said = [header._replace(slot=at, piece=first, **room)]
    said.append(Header(op=Op.PIECE, token=1, call=header.call, slot=at + first, piece=len(body) - first))
    said.append(Header(op=Op.CREDIT, extra=random_.randrange(9), status=random_.choice(list(Status)[:2])))
    wrong = random_.randrange(len(said) + 1)  # or none
    for index, one in enumerate(said):
        if index == wrong or (one.op == Op.CREDIT and random_.random() < 0.5):
            told = list(mutated(one, random_))
            place = random_.randrange(-4, 0)
            told[place] = random_.choice((*VALUES, RING, RING - 1, -64))
            one = Header(*told)
        stranger.send(header_bytes(one))


def _table(message: bytearray, random_: random.Random) -> bytes:
    body = bytearray(message[HEADER_BYTES:])
    at = 8 * random_.randrange(2 * TILE_FIELDS)
    body[at : at + 8] = (random_.choice(VALUES) % 2**64).to_bytes(8, "little")
    return bytes(body)


def _is_served(honest: Link, random_: random.Random) -> None:
    header, parts = computed(1, random_)
    header = header._replace(op=Op.ATTEND, keep=0, lse_elements=0, call=77)
    honest.send(header, parts[:4])
    answer = honest.receive(30.0)
    assert (answer.header.status, answer.header.call) == (Status.OK, 77)
    q, k, v = parts[1].view(2, 2, D), parts[2].view(2, KEYS, D), parts[3].view(2, KEYS, D)
    scores = q @ k.transpose(1, 2)
    scores[:, 0, -1] = -torch.inf
    difference = (answer.tensors[0].view(2, 2, D) - scores.softmax(-1) @ v).abs().max().item()
    assert difference < 1e-5, f"largest difference {difference:.2e}"


def test_a_base_is_not_flooded_by_replies_that_it_did_not_ask_for() -> None:
    with two_loops() as (base_loop, _):
        mine, evil = pair()
        base = Link(mine, base_loop, name="base", timeout_s=5, asks=True)
        Outstanding.of(base).expect(1, 1, expected(Header(op=Op.ATTEND, v_head_dim=D, group=1), []))
        before = psutil.Process().memory_info().rss
        large = Header(op=Op.ATTEND, status=Status.OK, token=1, call=1, q_elements=2**30, lse_elements=2**28)
        evil.settimeout(10)
        try:
            evil.sendall(header_bytes(large))
            for _ in range(64):
                evil.sendall(bytes(2**20))
        except OSError:
            pass  # it was cut off
        with pytest.raises(LinkLost, match="answered call 1"):
            base.receive(5.0)
        grown = (psutil.Process().memory_info().rss - before) / 2**20
        assert grown < 64, f"{grown:.0f} MiB were taken"
        base.close()
        evil.close()
