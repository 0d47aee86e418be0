"""NIXL itself, from host memory to host memory of two processes: what arrives is what was sent, an end that is killed
or stands still in the middle of a write costs the link and no more, and a new link works."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.sockets import listen
from fapool_plugin.wire.window import Window, agents
from tests.bodies import flat, request

pytestmark = [
    pytest.mark.processes,
    pytest.mark.full,
    pytest.mark.timeout(180),
    pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed"),
]
SIZE = 2**22
_RANK = """
import os, signal, sys
from functools import partial
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import LinkLost, Status
from fapool_plugin.wire.sockets import connect
from fapool_plugin.wire.window import Window, agents
from tests.greetings import hear

made, dies = partial(Window, agents(), int(sys.argv[2])), int(sys.argv[3])
link = Link(connect(sys.argv[1], 30.0), Loop(), name="base", timeout_s=30, asks=False, window=made)
hear(link)
while True:
    try:
        message = link.receive()
    except LinkLost:
        os._exit(0)
    x = message.tensors[1]
    if message.header.call == dies:
        begin = Window.begin
        def dying(self, *place):
            writing = begin(self, *place)
            os.kill(os.getpid(), signal.SIGKILL)
        Window.begin = dying
    link.send(message.header._replace(status=Status.OK, k_elements=0, v_elements=0), [x, x[:0]])
"""


@contextmanager
def linked(loop: Loop, *, timeout_s: float = 20.0, dies: int = 0, by: str = "") -> Iterator[tuple[Link, Any]]:
    """(the base's end, the rank's process); ``by``: what UCX may use."""
    listener, address = listen("tcp:127.0.0.1:0")
    environment = os.environ | ({"UCX_TLS": by} if by else {})
    with listener:
        peer = subprocess.Popen([sys.executable, "-c", _RANK, address, str(SIZE), str(dies)], env=environment)
        listener.settimeout(90.0)
        sock, _ = listener.accept()
    base = Link(sock, loop, name="rank", timeout_s=timeout_s, asks=True, window=partial(Window, agents(), SIZE))
    try:
        base.wait_until_heard(30.0)
        PoolRank(0, base, 1, RankCounters(0)).open()
        assert base.carrier.name == "nixl", base.terms.notes
        base.check = lambda header: None
        yield base, peer
    finally:
        base.close()
        peer.kill()
        peer.wait()


def ask(base: Link, calls: range, nbytes: int) -> None:
    """All are asked before an answer is taken."""
    for call in calls:
        header, tensors = request(call, nbytes)
        base.send(header, tensors, answer_bytes=4 * header.q_elements)
    for call in calls:
        got = base.receive(30.0).tensors[0]
        assert torch.equal(got, flat(request(call, nbytes)[1][1])), f"call {call} brought other bytes"


def send_on(base: Link) -> None:
    """Nothing is answered."""
    for call in range(2, 100):
        base.send(*request(call, SIZE // 2))


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.mark.parametrize("by", ["", "tcp,self"], ids=["any", "tcp"])
def test_what_arrives_is_what_was_sent(loop: Loop, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by:
        monkeypatch.setenv("UCX_TLS", by)
    with linked(loop, by=by) as (base, _):
        for nbytes in (3 * 2**16, SIZE // 2, 3 * SIZE):
            ask(base, range(1, 7), nbytes)
        assert base.lost is None


def test_an_end_that_is_killed_in_the_middle_is_lost_and_a_new_link_works(loop: Loop) -> None:
    """While it writes its answer, and while it is written to."""
    for dies in (2, 0):
        with linked(loop, timeout_s=5.0, dies=dies) as (base, peer):
            ask(base, range(1, 2), SIZE)
            if not dies:
                killer = threading.Timer(0.1, os.kill, (peer.pid, signal.SIGKILL))
                killer.start()
            began = time.monotonic()
            with pytest.raises(LinkLost):
                ask(base, range(2, 100), SIZE)
            assert time.monotonic() - began < 15.0
            assert peer.wait(10) == -signal.SIGKILL
    with linked(loop) as (base, _):
        ask(base, range(1, 4), SIZE)


def test_an_end_that_stands_still_is_lost_within_the_links_patience(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP, where the other end takes part in every write."""
    monkeypatch.setenv("UCX_TLS", "tcp,self")
    with linked(loop, timeout_s=3.0, by="tcp,self") as (base, peer):
        ask(base, range(1, 2), SIZE)
        os.kill(peer.pid, signal.SIGSTOP)
        began = time.monotonic()
        with pytest.raises(LinkLost, match=r"not done within 3 s|no heartbeat|nothing done"):
            send_on(base)
        took = time.monotonic() - began
        assert took < 10.0, f"noticed after {took:.1f} s"
    with linked(loop) as (base, _):
        ask(base, range(1, 3), SIZE)


def test_a_forked_child_ends(loop: Loop) -> None:
    """It has its parent's agents, and none of their threads."""
    with linked(loop) as (base, _):
        ask(base, range(1, 2), SIZE)
        child = os.fork()
        if not child:
            base.terms.close()
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        ask(base, range(2, 3), SIZE)
