"""Ends of links that die, stop, stand still, say nothing or are another user's: noticed in time."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import (
    Header,
    LinkLost,
    Op,
)
from fapool_plugin.wire.sockets import Listener, connect, listen, pair
from fapool_plugin.wire.watch import watch_process
from tests.thread_pool import link_pair

_PEER = """
import socket, sys, time
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
time.sleep(120)
"""

_PEER = """
import socket, sys, time
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
link = Link(socket.socket(fileno=int(sys.argv[1])), Loop(), name="peer", timeout_s=60, asks=False)
time.sleep(120)
"""


@pytest.mark.processes
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("how", "limit_s"), [(signal.SIGKILL, 1.0), (signal.SIGSTOP, 4.0)])
def test_a_dead_or_stopped_end_is_noticed_in_time(
    loops: tuple[Loop, Loop], how: signal.Signals, limit_s: float
) -> None:
    mine, its = pair()
    with subprocess.Popen([sys.executable, "-c", _PEER, str(its.fileno())], pass_fds=[its.fileno()]) as peer:
        its.close()
        try:
            base = Link(mine, loops[0], name="test", timeout_s=1.5, asks=True)
            base.wait_until_heard(30)
            time.sleep(0.5)
            assert base.lost is None
            os.kill(peer.pid, how)
            began = time.monotonic()
            with pytest.raises(LinkLost):
                base.receive()
            took = time.monotonic() - began
            assert took < limit_s, f"noticed after {took:.2f} s"
        finally:
            peer.kill()
    base.close()


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_dead_process_is_noticed_though_its_child_has_the_socket(loops: tuple[Loop, Loop]) -> None:
    """As with a DataLoader's workers that were forked in C."""
    mine, its = pair()
    script = "import os, subprocess, sys, time\nsubprocess.Popen(['sleep', '60'], close_fds=False)\ntime.sleep(60)"
    os.set_inheritable(its.fileno(), True)
    with subprocess.Popen([sys.executable, "-c", script], close_fds=False, start_new_session=True) as peer:
        its.close()
        base = Link(mine, loops[0], name="test", timeout_s=60, asks=True)
        watch_process(loops[0], peer.pid, lambda: base.fail("its process has ended"))
        try:
            time.sleep(0.5)
            os.kill(peer.pid, signal.SIGKILL)
            with pytest.raises(LinkLost, match="process has ended"):
                base.receive(10.0)
        finally:
            os.killpg(peer.pid, signal.SIGKILL)
    base.close()


@pytest.mark.timeout(60)
def test_a_forked_child_does_not_keep_a_connection(loops: tuple[Loop, Loop]) -> None:
    base, pool = link_pair(*loops)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.read(read, 1)  # it lives until the test is over
        os._exit(0)
    try:
        loops[0].remove(base)
        base._socket.close()  # as when this process dies: a shutdown would end it in the child, too
        with pytest.raises(LinkLost, match="connection ended"):
            pool.receive(5.0)
        pool.close()
    finally:
        os.write(write, b"x")
        assert os.waitpid(child, 0)[1] == 0
        os.close(read)
        os.close(write)


def test_an_end_that_answers_and_does_not_get_on_is_lost(loops: tuple[Loop, Loop]) -> None:
    one, other = pair()
    done = [0]
    base = Link(one, loops[0], name="test", timeout_s=0.5, asks=True)
    pool = Link(other, loops[1], name="test", timeout_s=5, asks=False, steps=lambda: done[0])
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(0.1):
            done[0] += 1

    worker = threading.Thread(target=work)
    worker.start()
    threading.Timer(2.0, stop.set).start()
    began = time.monotonic()
    with pytest.raises(LinkLost, match="does not get on"):
        base.receive(0.8)
    took = time.monotonic() - began
    assert 2.0 < took < 4.0, f"it stood still for 0.8 s after 2 s of work, and was lost after {took:.2f} s"
    worker.join()
    base.close()
    pool.close()


def test_an_idle_link_stays_up_longer_than_its_timeouts(loops: tuple[Loop, Loop]) -> None:
    base, pool = link_pair(*loops, timeout_s=0.5)
    time.sleep(2.0)
    base.send(Header(op=Op.HELLO, token=7))
    assert pool.receive().header.token == 7
    assert (base.lost, pool.lost) == (None, None)
    base.close()
    pool.close()


@pytest.mark.timeout(30)
def test_an_end_that_never_speaks_is_not_waited_for_for_ever(loops: tuple[Loop, Loop]) -> None:
    mine, silent = pair()
    base = Link(mine, loops[0], name="alone", timeout_s=1.0, asks=True)
    began = time.monotonic()
    with silent, pytest.raises(LinkLost, match="was not ready within 1 s"):
        base.wait_until_heard(1.0)
    took = time.monotonic() - began
    assert took < 5, f"waited {took:.1f} s"
    base.close()


def test_a_caller_that_comes_and_says_nothing_is_sent_away(loops: tuple[Loop, Loop]) -> None:
    mine, silent = pair()
    pool = Link(mine, loops[0], name="test", timeout_s=0.5, asks=False)
    with silent, pytest.raises(LinkLost, match="no heartbeat"):
        pool.receive()
    pool.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_who_listens_is_reached(loops: tuple[Loop, Loop], tmp_path: Any, kind: str) -> None:
    listener, address = listen(f"unix:{tmp_path}/rank" if kind == "unix" else "tcp:127.0.0.1:0")
    accepted: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
    handler = Listener(listener, loops[1], accepted.put)
    base = Link(connect(address, 5.0), loops[0], name="test", timeout_s=5, asks=True)
    pool = Link(accepted.get(timeout=5), loops[1], name="test", timeout_s=5, asks=False)
    base.send(Header(op=Op.HELLO, token=9))
    assert pool.receive().header.token == 9
    assert base.is_local == (kind == "unix")
    for end in (base, pool):
        end.close()
    loops[1].remove(handler)
    listener.close()


def test_another_user_is_not_let_in(loops: tuple[Loop, Loop], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    listener, address = listen(f"unix:{tmp_path}/rank")
    assert os.stat(tmp_path / "rank").st_mode & 0o777 == 0o600
    accepted: list[socket.socket] = []
    handler = Listener(listener, loops[1], accepted.append)
    monkeypatch.setattr(os, "geteuid", itertools.repeat(4321).__next__)
    with pytest.raises(PermissionError, match="4321"):
        connect(address, 5.0)
    time.sleep(0.2)
    assert not accepted
    loops[1].remove(handler)
    listener.close()
