"""A pool rank that dies or falls silent, at any point of a message, changes no token and is named once."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import Message
from tests.models import eager, load_pooled, random_ids
from tests.strikes import OWN_S, STANDING_STILL

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

LAYERS, PROMPT, NEW = 2, 200, 10  # long enough for a body beside the frame, either way
PREFILL_CALL, DECODE_CALL = 2, 8


def pids(manager: ResourceManager) -> dict[int, int]:
    pool = manager.leases.pool
    assert isinstance(pool, LocalPool)
    return pool.pids()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    """What the model says without the plugin."""
    return generate(eager(folder))


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    model = load_pooled(folder, pool_ranks=2, timeout_s=1.0)
    with model.fa_pool:
        yield model


def generate(model: Any) -> Tensor:
    ids = random_ids(1, PROMPT)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    assert tokens.shape[1] == PROMPT + NEW
    return tokens


def strike(monkeypatch: pytest.MonkeyPatch, method: str, at_call: int, victim: Callable[[PoolRank], None]) -> None:
    """Calls ``victim`` with rank 0 just before its ``at_call``-th "ask" or "answer"."""
    original = getattr(PoolRank, method)
    seen = 0

    def wrapped(self: PoolRank, *args: Any) -> Any:
        nonlocal seen
        if self.number == 0:
            seen += 1
            if seen == at_call:
                victim(self)
        return original(self, *args)

    monkeypatch.setattr(PoolRank, method, wrapped)


def generate_with_one_fault(model: Any, expected: Tensor, pid: Callable[[], int]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = generate(model)
    assert torch.equal(got, expected)
    stats = model.fa_pool.stats()
    assert stats["faults"] == 1
    named = [str(w.message) for w in caught if "pool rank" in str(w.message)]
    assert len(named) == 1, named
    assert f"pool rank 0 (pid {pid()}) lost" in named[0]
    assert [e["reason"] for e in stats["events"] if e["kind"] == "fault"] == [named[0].removeprefix("fa_pool: ")]
    assert not psutil.pid_exists(pid()), "a lost rank is ended, a stopped one too"
    assert stats["ranks"][1]["calls"] == LAYERS * NEW, "the other rank works on"


@pytest.mark.parametrize("call", [PREFILL_CALL, DECODE_CALL], ids=["prefill", "decode"])
@pytest.mark.parametrize("moment", ["ask", "answer"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_changes_no_token(
    model: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch, how: signal.Signals, moment: str, call: int
) -> None:
    struck: list[int] = []

    def victim(rank: PoolRank) -> None:
        struck.append(pids(model.fa_pool)[rank.number])
        os.kill(struck[0], how)

    strike(monkeypatch, moment, call, victim)
    generate_with_one_fault(model, expected, lambda: struck[0])


def test_a_rank_killed_in_the_middle_of_a_message_changes_no_token(
    model: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is out, and then the other end is gone before the body."""
    struck: list[int] = []

    class Dying:
        """A socket that loses its peer after one header."""

        def __init__(self, sock: Any, pid: int) -> None:
            self.sock, self.pid = sock, pid

        def sendmsg(self, buffers: Sequence[Any], rights: Any) -> int:
            if not struck:
                self.sock.sendall(buffers[0])
                struck.append(self.pid)
                os.kill(self.pid, signal.SIGKILL)
                return len(buffers[0])
            return int(self.sock.sendmsg(buffers, rights))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    def victim(rank: PoolRank) -> None:
        dying = Dying(rank.link._socket, pids(model.fa_pool)[rank.number])
        monkeypatch.setattr(rank.link._outgoing, "_socket", dying)

    strike(monkeypatch, "ask", PREFILL_CALL, victim)
    generate_with_one_fault(model, expected, lambda: struck[0])


def test_a_rank_killed_in_the_middle_of_its_reply_changes_no_token(
    model: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck: list[int] = []

    def victim(rank: PoolRank) -> None:
        link, take = rank.link, rank.link._take

        def halved() -> int:
            if link._header is None or struck:
                return take()
            struck.append(pids(model.fa_pool)[rank.number])
            os.kill(struck[0], signal.SIGKILL)
            raise ConnectionResetError("half a reply has come")

        monkeypatch.setattr(link, "_take", halved)

    strike(monkeypatch, "ask", PREFILL_CALL, victim)
    generate_with_one_fault(model, expected, lambda: struck[0])


def test_a_rank_whose_main_thread_stands_still_changes_no_token(
    model: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeats are answered all the time."""
    monkeypatch.setenv("PYTHONPATH", str(STANDING_STILL), prepend=os.pathsep)
    struck: list[int] = []

    def victim(rank: PoolRank) -> None:
        struck.append(pids(model.fa_pool)[rank.number])
        os.kill(struck[0], signal.SIGUSR1)

    strike(monkeypatch, "ask", DECODE_CALL, victim)
    began = time.monotonic()
    generate_with_one_fault(model, expected, lambda: struck[0])
    took = time.monotonic() - began
    assert took < 3 * 2.0 + OWN_S, f"it held the base for {took:.1f} s"
    (reason,) = [event["reason"] for event in model.fa_pool.stats()["events"] if event["kind"] == "fault"]
    assert "it does not get on" in reason, reason


def test_all_ranks_lost_and_the_next_lease_has_new_ones(
    model: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: dict[int, int] = {}

    def victim(rank: PoolRank) -> None:
        before.update(pids(model.fa_pool))
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        # Both are known to be lost before either is asked: in one and the same forward.
        for lost in model.fa_pool.ranks:
            assert lost.link.loop.wait(lambda link=lost.link: link.lost)

    strike(monkeypatch, "ask", DECODE_CALL, victim)
    with pytest.warns(RuntimeWarning, match="lost"):
        assert torch.equal(generate(model), expected)
    assert model.fa_pool.stats()["faults"] == 2
    assert torch.equal(generate(model), expected)
    after = pids(model.fa_pool)
    assert set(after) == {0, 1}
    assert not set(after.values()) & set(before.values())
    stats = model.fa_pool.stats()
    assert (stats["faults"], stats["activations"]) == (2, 2)


def test_a_rank_lost_while_idle_is_replaced_at_the_next_lease(model: Any, expected: Tensor) -> None:
    assert torch.equal(generate(model), expected)
    before = pids(model.fa_pool)
    process = psutil.Process(before[1])
    process.kill()  # the system may collect it before the next line
    psutil.wait_procs([process], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert torch.equal(generate(model), expected)
    after = pids(model.fa_pool)
    assert after[0] == before[0]
    stats = model.fa_pool.stats()
    assert stats["prefill"]["local_calls"] == stats["decode"]["local_calls"] == 0


def test_a_wrong_answer_would_be_noticed(model: Any, expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above compare tokens: they must differ when a pool rank's part is wrong."""
    original = PoolRank.answer

    def lying(self: PoolRank, call: int) -> Message:
        message = original(self, call)
        for tensor in message.tensors:
            tensor.neg_()
        return message

    monkeypatch.setattr(PoolRank, "answer", lying)
    assert not torch.equal(generate(model), expected)
