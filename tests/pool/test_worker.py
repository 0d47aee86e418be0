"""A pool rank's manners: one job at a time, several links, no wrong answers, and no life after its base."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire import PROTOCOL_VERSION
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import Header, LinkLost, Message, Op, Status, dtype_code, float_bits
from fapool_plugin.wire.sockets import pair
from tests.thread_pool import two_loops

D = 4


@pytest.fixture
def bases() -> Iterator[tuple[list[Link], Worker]]:
    """Two base ends of one worker's links."""
    with two_loops() as (base_loop, pool_loop):
        worker = Worker(Inbox(pool_loop, 1.0), 2**20, torch.device("cpu"))
        ends = [pair() for _ in range(2)]
        links = [Link(one, base_loop, name="base", timeout_s=5, asks=True) for one, _ in ends]
        thread = threading.Thread(target=worker.serve, args=([worker.link(other, 5.0) for _, other in ends],))
        thread.start()
        yield links, worker
        for base in links:
            base.close()
        thread.join(10)
        assert not thread.is_alive(), "a worker must end when all its links have ended"


def hello(link: Link, token: int, version: int = PROTOCOL_VERSION) -> Header:
    link.send(Header(op=Op.HELLO, token=token, version=version))
    return link.receive().header


def ask(
    link: Link, token: int, *, held: int, keys: int, keep: int = 1, sequence: int = 5, **merge: int
) -> tuple[Message, torch.Tensor]:
    """Asks for one query against ``keys`` keys of which the rank is believed to hold ``held``."""
    torch.manual_seed(keys)
    k, v = torch.randn(keys, D), torch.randn(keys, D)
    q = torch.randn(1, D)
    tiles = torch.tensor([[0, 1, 0, 1, keys - 1, keys, 0, keys, held, keys, 0]])
    header = Header(
        op=Op.ATTEND, token=token, call=9, sequence=sequence, keep=keep, tiles=1, group=1, head_dim=D, v_head_dim=D,
        q_elements=D, k_elements=(keys - held) * D, v_elements=(keys - held) * D, dtype=dtype_code(q.dtype),
        scale_bits=float_bits(1.0), **merge,
    )  # fmt: skip
    link.send(header, (tiles, q.flatten(), k[held:].flatten(), v[held:].flatten()))
    return link.receive(), torch.softmax(q @ k.T, -1) @ v


def test_a_request_is_answered_with_out_and_lse(bases: tuple[list[Link], Worker]) -> None:
    (link, _), worker = bases
    assert hello(link, 1).extra == 2**20
    answer, want = ask(link, 1, held=0, keys=7)
    assert answer.header.status == Status.OK
    assert answer.header.call == 9
    difference = (answer.tensors[0].view(1, D) - want).abs().max().item()
    assert difference < 1e-6, f"largest difference {difference:.2e}"
    assert 5 in worker.prefixes


def test_keys_that_are_not_to_be_kept_are_not(bases: tuple[list[Link], Worker]) -> None:
    (link, _), worker = bases
    hello(link, 1)
    answer, want = ask(link, 1, held=0, keys=7, keep=0)
    assert torch.allclose(answer.tensors[0].view(1, D), want, atol=1e-6)
    assert 5 not in worker.prefixes


def test_an_assumption_that_does_not_hold_is_answered_stale(bases: tuple[list[Link], Worker]) -> None:
    (link, _), _ = bases
    hello(link, 1)
    assert ask(link, 1, held=3, keys=7)[0].header.status == Status.STALE
    assert ask(link, 1, held=0, keys=7)[0].header.status == Status.OK
    assert ask(link, 1, held=7, keys=7)[0].header.status == Status.OK
    assert ask(link, 1, held=8, keys=8)[0].header.status == Status.STALE


def test_what_a_rank_owns_makes_way_for_none_and_can_be_fetched(bases: tuple[list[Link], Worker]) -> None:
    (link, _), worker = bases
    hello(link, 1)
    assert ask(link, 1, held=0, keys=20_000, keep=3)[0].header.status == Status.OK
    assert ask(link, 1, held=0, keys=15_000, sequence=6)[0].header.status == Status.STALE, "what is owned made way"
    # 2**20 bytes are 32,768 positions.
    assert ask(link, 1, held=20_000, keys=40_000, keep=3)[0].header.status == Status.FULL
    assert ask(link, 1, held=30_000, keys=30_000, keep=3)[0].header.status == Status.STALE, "it never had so many"
    answer, want = ask(link, 1, held=20_000, keys=20_000, keep=3)
    assert torch.allclose(answer.tensors[0].view(1, D), want, atol=1e-6)
    for count, status in ((20_000, Status.OK), (20_001, Status.STALE)):
        header = Header(op=Op.FETCH, token=1, call=3, sequence=5, tiles=1, dtype=dtype_code(want.dtype))
        link.send(header, [torch.tensor([[0, 1, 0, 1, 0, 1, 0, count, 0, 0, 0]])])
        fetched = link.receive()
        assert fetched.header.status == status
        if status == Status.OK:
            torch.manual_seed(20_000)
            assert torch.equal(fetched.tensors[0].view(count, D), torch.randn(count, D))
            assert fetched.tensors[1].numel() == count * D
    link.send(Header(op=Op.FREE, token=1, sequence=5))
    assert ask(link, 1, held=0, keys=15_000, sequence=6)[0].header.status == Status.OK
    assert 5 not in worker.prefixes


def test_a_rank_serves_one_job_over_several_links(bases: tuple[list[Link], Worker]) -> None:
    (one, two), worker = bases
    assert hello(one, 1).status == hello(two, 1).status == Status.OK
    for link, sequence in ((one, 5), (two, 6)):
        answer, want = ask(link, 1, held=0, keys=5, sequence=sequence)
        assert torch.allclose(answer.tensors[0].view(1, D), want, atol=1e-6)
    one.send(Header(op=Op.RELEASE, token=1))
    assert ask(two, 1, held=5, keys=5, sequence=6)[0].header.status == Status.OK, "the other base still holds the lease"
    two.send(Header(op=Op.RELEASE, token=1))
    assert ask(two, 1, held=0, keys=5)[0].header.status == Status.STALE, "no base holds a lease"
    assert worker.prefixes.nbytes == 0


def test_a_job_that_gives_its_lease_back_and_asks_again_is_not_refused_on_the_way(
    bases: tuple[list[Link], Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the rank still computes, and knows of neither."""
    (link, _), worker = bases
    hello(link, 1)
    computes, real = threading.Event(), worker._handle

    def handle(*given: Any) -> None:
        assert computes.wait(10)
        real(*given)

    monkeypatch.setattr(worker, "_handle", handle)
    link.send(Header(op=Op.RELEASE, token=1))
    link.send(Header(op=Op.HELLO, token=2))
    time.sleep(0.2)  # the loop has both
    computes.set()
    assert link.receive(10.0).header.status == Status.OK
    assert worker.lease.token == 2


def test_another_job_finds_it_busy_until_the_lease_is_given_back(bases: tuple[list[Link], Worker]) -> None:
    (one, two), _ = bases
    assert hello(one, 1).status == Status.OK
    assert hello(two, 2).status == Status.BUSY
    assert ask(two, 2, held=0, keys=5)[0].header.status == Status.STALE
    one.send(Header(op=Op.RELEASE, token=1))
    assert ask(one, 1, held=0, keys=5)[0].header.status == Status.STALE
    assert hello(two, 2).status == Status.OK


def test_a_lost_link_frees_its_lease(bases: tuple[list[Link], Worker]) -> None:
    (one, two), _ = bases
    hello(one, 1)
    one.close()
    deadline = time.monotonic() + 5
    while hello(two, 2).status != Status.OK:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_request_to_work_with_unknown_ranks_ends_the_link(bases: tuple[list[Link], Worker]) -> None:
    """The base learns of it, and other links go on."""
    (one, two), _ = bases
    hello(one, 1)
    hello(two, 1)
    with pytest.raises(LinkLost, match="connection ended"):
        ask(one, 1, held=0, keys=5, merge=1)
    assert ask(two, 1, held=0, keys=5)[0].header.status == Status.OK


def again(link: Link, sequence: int, call: int = 9) -> Message:
    """Asks for the results of a kept call once more."""
    link.send(Header(op=Op.ATTEND, token=1, sequence=sequence, keep=2, extra=call), ([], [], [], []))
    return link.receive()


def gradients(link: Link, sequence: int, call: int = 9) -> Message:
    """Asks for the gradients of a kept call of seven keys, with dout alone."""
    table = torch.tensor([[0, 1, 0, 1, 6, 7, 0, 7, 0, 7, 0]])
    header = Header(
        op=Op.BACKWARD, token=1, sequence=sequence, keep=2, extra=call, tiles=1, group=1, head_dim=D, v_head_dim=D,
        lse_elements=1, scale_bits=float_bits(1.0),
    )  # fmt: skip
    link.send(header, (table, [], [], [], [], [], torch.ones(D)))
    return link.receive()


def test_a_call_is_kept_until_its_gradients_are_asked_for(bases: tuple[list[Link], Worker]) -> None:
    (link, _), worker = bases
    hello(link, 1)
    answer, want = ask(link, 1, held=0, keys=7, keep=2)
    assert (answer.header.status, answer.header.keep) == (Status.OK, 2)
    assert torch.allclose(answer.tensors[0].view(1, D), want, atol=1e-6)
    assert 5 not in worker.prefixes
    for wrong in ((6, 9), (5, 8)):
        assert again(link, *wrong).header.status == Status.STALE
    repeated = again(link, 5)
    assert (repeated.header.status, repeated.header.keep) == (Status.OK, 2)
    assert all(torch.equal(a, b) for a, b in zip(repeated.tensors, answer.tensors, strict=True))
    reply = gradients(link, 5)
    assert reply.header.status == Status.OK
    torch.manual_seed(7)
    k, v, q = torch.randn(7, D), torch.randn(7, D), torch.randn(1, D, requires_grad=True)
    (dq,) = torch.autograd.grad((torch.softmax(q @ k.T, -1) @ v).sum(), q)
    difference = (reply.tensors[0].view(1, D) - dq).abs().max().item()
    assert difference < 1e-5, f"largest difference {difference:.2e}"
    assert again(link, 5).header.status == gradients(link, 5).header.status == Status.STALE
    assert worker.prefixes.reserved == 0


def test_a_call_that_does_not_fit_is_answered_and_not_kept(bases: tuple[list[Link], Worker]) -> None:
    (link, _), worker = bases
    hello(link, 1)
    ask(link, 1, held=0, keys=7, sequence=6)
    worker.prefixes.limit_bytes = worker.prefixes.nbytes + 100
    answer, want = ask(link, 1, held=0, keys=7, keep=2)
    assert (answer.header.status, answer.header.keep) == (Status.OK, 0)
    assert torch.allclose(answer.tensors[0].view(1, D), want, atol=1e-6)
    assert 6 in worker.prefixes, "nothing makes way for it"
    assert again(link, 5).header.status == Status.STALE


def test_kept_calls_go_with_their_sequence_their_base_and_the_lease(bases: tuple[list[Link], Worker]) -> None:
    (one, two), worker = bases
    for link, sequences in ((one, (5, 6)), (two, (7,))):
        hello(link, 1)
        for sequence in sequences:
            ask(link, 1, held=0, keys=7, keep=2, sequence=sequence)
    one.send(Header(op=Op.FREE, token=1, sequence=5))
    assert again(one, 5).header.status == Status.STALE
    assert again(one, 6).header.status == Status.OK
    one.close()
    deadline = time.monotonic() + 5
    while again(two, 6).header.status != Status.STALE:
        assert time.monotonic() < deadline, "what a base left stays"
        time.sleep(0.01)
    assert again(two, 7).header.status == Status.OK
    two.send(Header(op=Op.RELEASE, token=1))
    assert hello(two, 1).status == Status.OK
    assert again(two, 7).header.status == Status.STALE
    assert worker.prefixes.reserved == 0


def test_hello_names_the_node(bases: tuple[list[Link], Worker]) -> None:
    (link, _), worker = bases
    worker.node = 3
    assert hello(link, 1).number == 3


def test_another_protocol_version_is_named(bases: tuple[list[Link], Worker]) -> None:
    reply = hello(bases[0][0], 1, version=PROTOCOL_VERSION + 1)
    assert (reply.status, reply.version) == (Status.VERSION, PROTOCOL_VERSION)


_BASE = """
import sys, time
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.ranks.local import LocalPool
pool = LocalPool(FAPoolConfig(pool_ranks=2, memory_limit_mib=16))
pool.acquire(print)
print(*pool.pids().values(), flush=True)
time.sleep(60)
"""


@pytest.mark.processes
@pytest.mark.timeout(90)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_pool_rank_outlives_its_base(how: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", _BASE], stdout=subprocess.PIPE, text=True) as base:
        try:
            assert base.stdout is not None
            base.stdout.readline()
            pids = [int(pid) for pid in base.stdout.readline().split()]
            assert len(pids) == 2
            assert all(psutil.pid_exists(pid) for pid in pids)
            os.kill(base.pid, how)
            base.wait(10)
            deadline = time.monotonic() + 10
            while any(psutil.pid_exists(pid) for pid in pids):
                assert time.monotonic() < deadline, f"{pids} live on"
                time.sleep(0.05)
        finally:
            base.kill()
