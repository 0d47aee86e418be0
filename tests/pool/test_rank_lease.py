"""Who has a pool rank, who waits for it, and what each of them is told."""

from __future__ import annotations

import pytest

from fapool_plugin.pool import lease as module
from fapool_plugin.pool.lease import Lease
from fapool_plugin.wire.messages import Header, Op, Status
from fapool_plugin.wire.wishes import Wishes


class End:
    """A job's end of a link."""

    def __init__(self) -> None:
        self.lost: str | None = None
        self.silent_s, self.beats = 0.0, 0

    def beat(self) -> None:
        self.beats += 1


class Clock:
    now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def asks(
    lease: Lease, link: End, token: int, has: int = 0, idle_s: float = 0, silent_s: float = 0, *, at_work: bool = False
) -> float | None:
    """For how long another job has it; None: this one has it now."""
    hello = Header(op=Op.HELLO, token=token, peers=has, extra=round(idle_s * 1e9), clock=round(silent_s * 1e9))
    refused = lease.refusal(link, hello, at_work=at_work)  # type: ignore[arg-type]
    if refused is not None:
        assert (refused.op, refused.status, refused.token) == (Op.HELLO, Status.BUSY, token)
        return refused.extra / 1e9
    if lease.token not in (None, token):
        lease.recall()
    lease.grant(link, hello)  # type: ignore[arg-type]
    return None


def test_one_job_has_it_over_several_links(clock: Clock) -> None:
    lease, one, two, other = Lease(), End(), End(), End()
    assert asks(lease, one, 7) is None
    assert asks(lease, two, 7) is None
    clock.now += 3.5
    assert asks(lease, other, 8) == 3.5
    assert not lease.leave(one)  # type: ignore[arg-type]
    assert asks(lease, other, 8) == 3.5
    assert lease.leave(two)  # type: ignore[arg-type]
    assert lease.token is None
    assert asks(lease, other, 8) is None


def test_who_has_least_is_next_and_then_who_has_waited_longest(clock: Clock) -> None:
    lease, holder, ends = Lease(), End(), [End() for _ in range(3)]
    assert asks(lease, holder, 7) is None
    for has, end, token in zip((1, 0, 0), ends, (1, 2, 3), strict=True):
        clock.now += 0.1
        assert asks(lease, end, token, has) is not None
    assert lease.wishes(holder) == Wishes(waiting=3)  # type: ignore[arg-type]
    lease.leave(holder)  # type: ignore[arg-type]
    assert asks(lease, holder, 9) is not None, "who had it last waits, too"
    assert asks(lease, ends[0], 1, 1) is not None
    assert asks(lease, ends[2], 3) is not None
    assert asks(lease, ends[1], 2) is None
    assert lease.wishes(ends[1]) == Wishes(waiting=3)  # type: ignore[arg-type]
    ends[2].lost = "closed"
    clock.now += 1.0
    assert asks(lease, ends[0], 1, 1) is not None
    clock.now += 1.5
    assert lease.wishes(ends[1]) == Wishes(waiting=1, least=1), "who does not ask any more does not wait"  # type: ignore[arg-type]


def test_a_rank_that_leaves_takes_no_new_lease_and_says_so(clock: Clock) -> None:
    leaves = [False]
    lease, holder, other = Lease(lambda: leaves[0]), End(), End()
    assert asks(lease, holder, 7) is None
    leaves[0] = True
    assert asks(lease, other, 8) is not None
    assert lease.wishes(holder) == Wishes(leaving=1), "no job waits for a rank that leaves"  # type: ignore[arg-type]
    assert asks(lease, holder, 7) is None, "who has it has it"
    assert asks(lease, End(), 7) is not None, "not over another link, or base ranks would pass it to and fro"
    lease.leave(holder)  # type: ignore[arg-type]
    assert asks(lease, other, 8) == 0.0


@pytest.mark.parametrize("why", ["idle", "silent"])
def test_it_is_recalled_if_it_is_not_used_and_another_asks(clock: Clock, why: str) -> None:
    lease, holder, other = Lease(), End(), End()
    assert asks(lease, holder, 7, idle_s=60.0, silent_s=5.0) is None
    clock.now += 59.0
    lease.used()
    clock.now += 59.0
    assert asks(lease, other, 8) is not None
    clock.now, holder.silent_s = (clock.now + 1.5, 0.0) if why == "idle" else (clock.now, 5.1)
    assert lease.token == 7, "not before another asks"
    assert asks(lease, other, 8, at_work=True) is not None, "not in the middle of a request"
    assert asks(lease, other, 8) is None
    assert (holder.beats, lease.wishes(holder)) == (1, Wishes(recalled=7))  # type: ignore[arg-type]
    assert lease.wishes(other) == Wishes()  # type: ignore[arg-type]
    assert not lease.leave(holder)  # type: ignore[arg-type]
    assert asks(lease, holder, 7) is not None
    lease.leave(other)  # type: ignore[arg-type]
    assert asks(lease, holder, 7) is None
    assert lease.wishes(holder) == Wishes(), "it has it again"  # type: ignore[arg-type]


def test_what_a_job_leaves_behind_that_has_ended_is_recalled_too(clock: Clock) -> None:
    lease, holder, other = Lease(), End(), End()
    assert asks(lease, holder, 7) is None
    assert (lease.has(holder), lease.has(other)) == (True, False)  # type: ignore[arg-type]
    holder.lost = "killed"
    assert asks(lease, other, 8) is None
    assert (lease.has(holder), lease.has(other)) == (False, True)  # type: ignore[arg-type]


def test_it_is_not_recalled_of_a_job_of_which_one_link_is_heard(clock: Clock) -> None:
    lease, one, two, other = Lease(), End(), End(), End()
    for link in (one, two):
        assert asks(lease, link, 7, silent_s=5.0) is None
    one.silent_s, clock.now = 9.0, clock.now + 1e6
    assert asks(lease, other, 8) is not None, "0 is never"
    two.silent_s = 9.0
    assert asks(lease, other, 8) is None
