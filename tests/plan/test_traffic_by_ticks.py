"""Simulated traffic against the same rules walked tick by tick, with nothing planned ahead: every tick asks who was
lost, what has ended, and who may go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fapool_plugin.plan.arrivals import Request
from fapool_plugin.plan.jobs import Setting
from fapool_plugin.plan.lending import Wear
from fapool_plugin.plan.outcome import Lent
from fapool_plugin.plan.traffic import simulate

TICK = 24
"""Every duration is a multiple of it, and nothing that begins by itself shares a remainder: no ties by chance."""
MOST = 3000 * TICK
_BASES = 1 << 32


@dataclass(frozen=True)
class Speeds:
    """A token of a prompt takes 4 ticks alone, and 4 over 1 + ranks together; a step 6, and with ranks 3."""

    each: float = inf
    """Tokens that a base holds, and a rank."""

    def prompt_s(self, tokens: int, ranks: int, far: bool = False) -> float:
        return -(-4 * tokens // (1 + ranks)) * TICK

    def step_s(self, rows: int, tokens: float, ranks: int, far: bool = False) -> float:
        return (3 if ranks else 6) * TICK

    def room(self, ranks: int) -> float:
        return self.each * (1 + ranks)


@dataclass(frozen=True)
class Told(Wear):
    """Lives as they are told, then for ever."""

    told: tuple[tuple[int, ...], ...] = ()

    def lives(self, rank: int) -> Iterator[float]:
        yield from self.told[rank % _BASES] if rank % _BASES < len(self.told) else ()
        while True:
            yield inf

    def downs(self, number: int) -> list[float]:
        """When it is lost."""
        found, at = [], 0.0
        for life in self.told[number] if number < len(self.told) else ():
            found.append(at + life)
            at += life + self.restart_s
        return found


@dataclass
class Seq:
    request: Request
    long: bool
    left: int
    computed: int = 0
    first: float | None = None
    tries: int = 0

    @property
    def whole(self) -> int:
        return self.request.prompt + self.request.new

    @property
    def known(self) -> int:
        return self.whole - self.left


@dataclass
class Job:
    number: int
    queue: list[Seq]
    falls: list[float]
    active: list[Seq] = field(default_factory=list)
    filling: Seq | None = None
    ranks: list[int] = field(default_factory=list)
    gone: dict[int, float] = field(default_factory=dict)
    """Those that were lost and are not known to be, and when."""
    doing: str = ""
    began: float = 0.0
    ends: float = inf
    down: float = -inf
    fell: float = -inf
    blocked: bool = False
    asked: float | None = None
    since: float | None = None
    until: float = -inf
    due: bool = False

    def uses(self) -> bool:
        return self.doing in ("step", "again") or (self.doing == "prompt" and bool(self.filling and self.filling.long))


class Walk:
    """One pool; ``again`` is the front of a job's queue."""

    def __init__(self, requests: list[Request], made: Setting, speeds: Speeds, lent: list[Lent]) -> None:
        """``lent`` says which of the free ranks a job took; how many is found here."""
        self.made, self.speeds, self.lent, self.t = made, speeds, lent, 0.0
        assert isinstance(made.wear, Told)
        assert isinstance(made.base_wear, Told)
        base = made.base_wear
        ordered = sorted(requests)
        self.jobs = [
            Job(n, [Seq(r, r.prompt > made.threshold, r.new) for r in ordered[n :: made.jobs]], base.downs(n))
            for n in range(made.jobs)
        ]
        self.downs = [made.wear.downs(rank) for rank in range(made.pool)]
        self.free, self.served, self.refused, self.waited = set(range(made.pool)), list[tuple[Any, ...]](), 0, 0.0

    def dead(self, rank: int) -> bool:
        return any(at <= self.t < at + self.made.wear.restart_s for at in self.downs[rank])

    def all(self) -> None:
        for tick in range(MOST):
            self.t = float(tick)
            for job in self.jobs:
                self.losses_of(job)
            for job in self.jobs:
                self.ended(job)
            self.decide()
            if all(not (job.queue or job.active or job.filling) for job in self.jobs):
                return
        raise AssertionError("not done")

    def losses_of(self, job: Job) -> None:
        base = self.made.base_wear
        if self.t in job.falls:
            back = [*job.active, *([job.filling] if job.filling else [])]
            for one in back:
                one.computed = 0
            job.queue[:0] = back
            job.active, job.filling, job.doing, job.ends = [], None, "", inf
            job.down, job.fell, job.blocked = self.t + base.restart_s, self.t, False
            self.got(job)
        if self.t == job.fell + base.detect_s:
            self.give(job)
        job.due |= self.t == job.down
        lost = {rank: self.t for rank in job.ranks if self.t in self.downs[rank]}
        job.gone |= lost
        job.ranks = [rank for rank in job.ranks if rank not in lost]
        self.free |= lost.keys()  # and down for a time
        if lost and job.uses():
            job.doing, job.ends = "stalled", inf
        if job.doing == "stalled":
            self.stall(job)

    def stall(self, job: Job) -> None:
        """Until all that is gone is known: then what is left goes on."""
        job.gone = {rank: at for rank, at in job.gone.items() if self.t < at + self.made.wear.detect_s}
        held = [*job.active, *([job.filling] if job.filling else [])]
        while sum(one.whole for one in held) > self.speeds.room(len(job.ranks) + len(job.gone)):
            out = next((one for one in reversed(held) if one.long), held[-1])
            held.remove(out)
            out.computed = 0
            job.queue.insert(0, out)
        job.active = [one for one in job.active if one in held]
        job.filling = job.filling if job.filling in held else None
        if job.gone:
            return
        away = [one for one in job.active if one.long]
        takes = sum(self.speeds.prompt_s(one.computed, len(job.ranks)) for one in away)
        if job.filling:
            takes += self.speeds.prompt_s(job.filling.known, len(job.ranks))
        job.doing, job.ends, job.blocked = ("prompt" if job.filling else "again"), max(self.t, job.began) + takes, False
        if not takes:
            job.doing, job.ends, job.due = "", inf, True

    def ended(self, job: Job) -> None:
        if job.ends != self.t:
            return
        if job.doing == "prompt" and job.filling:
            one, job.filling = job.filling, None
            one.computed, one.left = one.known + 1, one.left - 1
            one.first = self.t if one.first is None else one.first
            job.active.append(one)
        elif job.doing == "step":
            for one in job.active:
                one.left, one.computed = one.left - 1, one.computed + 1
        for one in [one for one in job.active if not one.left]:
            self.served.append((one.request, one.first, self.t))
            job.active.remove(one)
            job.blocked = False
        job.doing, job.ends = "", inf
        if job.gone:
            job.doing = "stalled"
            self.stall(job)
        job.due = not job.doing

    def decide(self) -> None:
        """Those that waited longest first, and again whenever ranks come back."""
        for job in self.jobs:
            arrived = bool(job.queue) and job.queue[0].request.at_s == self.t
            job.due |= not job.doing and self.t >= job.down and (arrived or job.until == self.t)
        if any(at + self.made.wear.restart_s == self.t for rank in self.free for at in self.downs[rank]):
            self.wake()
        for _ in range(10 * len(self.jobs)):
            due = [job for job in self.jobs if job.due and not job.doing and self.t >= job.down]
            if not due:
                return
            job = min(due, key=lambda one: (inf if one.since is None else one.since, one.number))
            job.due = False
            self.go_on(job)
        raise AssertionError("nothing settles")

    def go_on(self, job: Job) -> None:
        head = job.queue[0] if job.queue and (job.queue[0].request.at_s <= self.t) else None
        if job.ranks and not any(one.long for one in job.active):
            others = any(one is not job and one.since is not None for one in self.jobs)
            if head is None or not head.long or others:
                self.give(job)
            if head is not None and head.long and others:
                job.due = True
                return
        if head is not None and not (job.blocked and job.active and self.t >= job.until) and self.begin(job, head):
            return
        if job.active:
            job.doing, job.ends = "step", self.t + self.speeds.step_s(1, 1, len(job.ranks))
        elif head is not None and job.queue and not job.due:
            if job.since is None:
                job.since = self.t
            self.give(job)

    def begin(self, job: Job, one: Seq) -> bool:
        made = self.made
        missing = made.lease - len(job.ranks) if one.long else 0
        new = min(missing, sum(not self.dead(rank) for rank in self.free))
        have, keys = len(job.ranks) + new, one.whole + sum(other.whole for other in job.active)
        if keys > self.speeds.room(have):
            if not job.active and keys > self.speeds.room(len(job.ranks) + missing):
                job.queue.remove(one)
                self.refused += 1
                self.got(job)
                job.due = True
                return True
            job.blocked = True
            return False
        saved = self.speeds.prompt_s(one.known, have) - self.speeds.prompt_s(one.known, made.lease)
        if made.waits and new < missing:
            job.asked = self.t if job.asked is None else job.asked
            job.since = self.t if job.since is None else job.since
            job.until = job.asked + saved
            if self.t < job.until:
                job.blocked = False
                return False
        self.got(job)
        job.queue.remove(one)
        taken = {span.rank for span in self.lent if (span.job, span.start) == (job.number, self.t)}
        assert len(taken) == new, f"{taken} leased at {self.t}, not {new}"
        assert taken <= self.free, f"{taken} leased, free were {self.free}"
        assert not any(map(self.dead, taken)), f"{taken} leased at {self.t}: lost"
        self.free -= taken
        job.ranks += sorted(taken)
        job.filling, job.doing = one, "prompt"
        job.began = self.t + made.activation_s * bool(taken)
        job.ends = job.began + self.speeds.prompt_s(one.known, len(job.ranks) * one.long)
        return True

    def got(self, job: Job) -> None:
        self.waited += self.t - job.asked if job.asked is not None else 0
        job.asked, job.since, job.until = None, None, -inf

    def give(self, job: Job) -> None:
        if job.ranks or job.gone:
            self.free |= set(job.ranks)
            job.ranks, job.gone = [], {}
            self.wake()

    def wake(self) -> None:
        for job in self.jobs:
            job.due |= job.since is not None and not job.doing


@st.composite
def traffic(draw) -> list[Request]:
    made = []
    for n in range(draw(st.integers(1, 9))):
        at = draw(st.integers(0, 40)) * TICK + n
        made.append(Request(at, draw(st.sampled_from([1, 2, 5, 8, 12])), draw(st.integers(1, 5))))
    return made


@st.composite
def wear(draw, first: int, most: int) -> Told:
    """``first``: the first remainder of losses."""
    told = []
    for n in range(draw(st.integers(0, most))):
        first_life = draw(st.integers(0, 90)) * TICK + first + 2 * n
        told.append((first_life, draw(st.integers(1, 90)) * TICK + 1))
    detect = draw(st.integers(0, 8))
    return Told(1e9, (detect + draw(st.integers(1, 20))) * TICK, 0, detect * TICK, tuple(told))


SETTINGS = st.builds(
    Setting,
    jobs=st.integers(1, 3),
    pool=st.integers(2, 4),
    lease=st.integers(1, 2),
    threshold=st.sampled_from([0, 4]),
    activation_s=st.sampled_from([0, TICK]),
    waits=st.booleans(),
    wear=wear(9, 4),
    base_wear=wear(17, 3),
)


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None)
@given(traffic(), SETTINGS, st.sampled_from([inf, 40, 20]))
def test_it_is_what_a_walk_tick_by_tick_gives(requests: list[Request], made: Setting, room: float) -> None:
    speeds = Speeds(room)
    found = simulate(requests, made, speeds)
    walk = Walk(requests, made, speeds, found.lent)
    walk.all()
    first = sorted((one.request, one.request.at_s + one.first_s) for one in found.served)
    assert first == sorted((request, at) for request, at, _ in walk.served)
    ends = sorted((one.request, one.token_s * max(1, one.request.new - 1)) for one in found.served)
    for (request, took), (same, began, end) in zip(ends, sorted(walk.served), strict=True):
        assert request == same
        assert took == pytest.approx(end - began), f"{request} took {took}, not {end - began}"
    assert (found.refused, found.waited_s) == (walk.refused, walk.waited)
