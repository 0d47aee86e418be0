"""Traffic on a cluster, event by event: jobs with a base each, which lease ranks of standing pools.

    job   wait ─ prefill of the oldest ─ steps of all in the batch ... until a prompt waits or a sequence ends
    pool  free ─ leased by a job when a long sequence comes ─ free when the last long one ends
    loss       ... forward ╳ the lease shrinks ─ keys of long sequences are computed again ─ the forward begins again

Prompts come first, one at a time, whole or in chunks with a step between; steps are counted together up to the next
thing that happens. What forwards take is asked of ``Speeds``, which asks the planner. A lease grows again at the next
long prompt. Lost bases are not known here, nor how long it takes to notice a loss.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, isnan, nan

from fapool_plugin.plan.arrivals import Request
from fapool_plugin.plan.lending import Pool, Rank, Wear, places
from fapool_plugin.plan.outcome import Busy, Lent, Outcome, Served
from fapool_plugin.plan.speeds import Speeds

_MOST_TRIES = 10_000


@dataclass(frozen=True)
class Setting:
    """Jobs, and pools of ``pool`` ranks which they share. A job leases up to ``lease`` ranks or none; a prompt of more
    than ``threshold`` tokens asks for them, and waits ``activation_s`` for those it gets."""

    jobs: int
    pool: int
    lease: int
    threshold: int
    activation_s: float = 0.001
    pools: int = 1
    """Each for as many jobs."""
    fixed: bool = False
    """Jobs have their ranks from the beginning to the end, and others never get them."""
    joins: tuple[tuple[float, int], ...] = ()
    """(when, how many) ranks come to each pool later."""
    wear: Wear = field(default_factory=Wear)
    chunk: int = 0
    """Tokens of a prompt between two steps; 0: prompts are computed whole."""
    base: int = 1
    """GPUs of each job, ..."""
    leaf: int = 1 << 40
    """... and how many GPUs are under one leaf switch."""

    def __post_init__(self) -> None:
        most = self.pool + sum(ranks for _, ranks in self.joins)
        if self.jobs < 1 or not 0 <= self.lease <= most:
            raise ValueError(
                f"{self.jobs} jobs, leases of {self.lease} of {most} pool ranks; give at least 1 job, and leases no "
                "larger than the pool"
            )
        if not 1 <= self.pools <= self.jobs:
            raise ValueError(f"{self.pools} pools for {self.jobs} jobs; give at least 1, and a job for each")
        if not 0 < self.wear.restart_s < self.wear.mtbf_s:
            raise ValueError(
                f"ranks are lost after {self.wear.mtbf_s:g} s in the mean and back after {self.wear.restart_s:g} s; "
                "give times above 0, and a mean that is longer than the way back"
            )
        if self.leaf < self.base or self.chunk < 0 or any(at < 0 or ranks < 1 for at, ranks in self.joins):
            raise ValueError(
                f"{self.leaf} GPUs under a leaf switch, {self.base} of a base, chunks of {self.chunk} tokens, joins "
                f"{list(self.joins)}; give leaves that hold a base, and nothing below 0"
            )
        if self.fixed and self.lease > self.each:
            raise ValueError(
                f"{self.jobs} jobs cannot have {self.lease} ranks each for good, of {self.pools} pools of {self.pool}; "
                f"give at most {self.each}"
            )

    @property
    def each(self) -> int:
        """Ranks that every job could have at a time."""
        return self.pool // ceil(self.jobs / self.pools)


@dataclass(slots=True, eq=False)
class _Active:
    request: Request
    long: bool
    left: int
    first_at: float = nan
    computed: int = 0
    """Tokens that have keys."""
    tries: int = 0

    @property
    def known(self) -> int:
        return self.request.prompt + self.request.new - self.left

    @property
    def whole(self) -> int:
        return self.request.prompt + self.request.new


@dataclass(slots=True, eq=False)
class _Job:
    number: int
    pool: Pool
    leaf: int
    queue: deque[Request]
    again: deque[_Active] = field(default_factory=deque)
    """Sequences that come before the queue: they have been there."""
    filling: _Active | None = None
    active: list[_Active] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    far: bool = False
    lost_at: float = inf
    """When the first of its ranks is lost."""
    due: float = nan
    waiting: bool = False
    busy_since: float = nan

    @property
    def away(self) -> list[_Active]:
        """Sequences whose keys ranks have."""
        return [one for one in (*self.active, self.filling) if one and one.long and one.computed]

    def changed(self) -> None:
        """Its ranks are others."""
        self.far = any(rank.leaf != self.leaf for rank in self.ranks)
        self.lost_at = min((rank.lost_at for rank in self.ranks), default=inf)


def simulate(requests: Iterable[Request], setting: Setting, speeds: Speeds) -> Outcome:
    """Serves all requests; they go to jobs in turn.

    Raises:
        ValueError: there is no request.
    """
    ordered = sorted(requests)
    if not ordered:
        raise ValueError("there are 0 requests; give at least 1")
    run = _Run(setting, speeds)
    first = numbers = 0
    for number in range(setting.pools):
        members = range(number * setting.jobs // setting.pools, (number + 1) * setting.jobs // setting.pools)
        pool = Pool(setting.wear)
        bases, leaves, first = places(len(members), setting.base, setting.pool, setting.leaf, first)
        # What joins later stands behind all others.
        later = [at for at, ranks in setting.joins for _ in range(ranks)]
        standing = [
            *((leaf, 0.0) for leaf in leaves),
            *(((first + i) // setting.leaf, at) for i, at in enumerate(later)),
        ]
        first += len(later)
        for rank, (leaf, at) in enumerate(standing, numbers):
            pool.join(rank, leaf, at)
        numbers += len(standing)
        run.jobs += [
            _Job(job, pool, leaf, deque(ordered[job :: setting.jobs])) for job, leaf in zip(members, bases, strict=True)
        ]
    return run.all()


@dataclass
class _Run:
    setting: Setting
    speeds: Speeds
    jobs: list[_Job] = field(default_factory=list)
    events: list[tuple[float, int]] = field(default_factory=list)
    """When which job goes on."""
    found: Outcome = field(default_factory=Outcome)

    def all(self) -> Outcome:
        for job in self.jobs:
            if self.setting.fixed:
                job.ranks = job.pool.lease(0.0, self.setting.lease, job.leaf)
                job.changed()
            if job.queue:
                self._later(job, job.queue[0].at_s)
        while self.events:
            now, number = heapq.heappop(self.events)
            job = self.jobs[number]
            if job.waiting or job.due == now:
                job.waiting = False
                self._go_on(job, now)
        for job in self.jobs:
            self._idle_losses(job, self.found.seconds)
            self._back(job, self.found.seconds)
        return self.found

    def _idle_losses(self, job: _Job, now: float) -> None:
        while job.lost_at <= now:
            self._lose(job, job.lost_at)

    def _go_on(self, job: _Job, now: float) -> None:
        self._idle_losses(job, now)
        waits = bool(job.filling or job.again or (job.queue and job.queue[0].at_s <= now))
        self._release(job, now, waits)
        end = self._prompt(job, now) if waits else None
        if end is None and job.active:
            end = self._steps(job, now, inf if waits or not job.queue else job.queue[0].at_s)
        if end is not None:
            self.found.seconds = max(self.found.seconds, end)
            if not job.busy_since <= now:
                job.busy_since = now
            self._later(job, end)
            return
        if job.busy_since <= now:
            self.found.busy.append(Busy(job.number, job.busy_since, now))
            job.busy_since = nan
        if waits:
            self._wait(job, now)
        elif job.queue:
            self._later(job, job.queue[0].at_s)

    def _later(self, job: _Job, at: float) -> None:
        job.due = at
        heapq.heappush(self.events, (at, job.number))

    def _wait(self, job: _Job, now: float) -> None:
        """Until ranks are there. It holds none meanwhile, or two that wait would wait for each other."""
        if not self.setting.fixed:
            self._back(job, now)
        job.waiting = True
        job.pool.waiting.append(job.number)
        up = job.pool.next_up(now)
        if up < inf:
            heapq.heappush(self.events, (up, job.number))

    def _release(self, job: _Job, now: float, waits: bool) -> None:
        """Gives ranks back if nothing long is left."""
        if not job.ranks or self.setting.fixed or any(one.long for one in job.active):
            return
        head = job.filling or (job.again[0] if job.again else None)
        long = head.long if head else waits and self._is_long(job.queue[0])
        if not long:
            self._back(job, now)

    def _back(self, job: _Job, now: float) -> None:
        if not job.ranks:
            return
        self.found.lent += [Lent(job.number, rank.number, rank.since, now) for rank in job.ranks]
        job.pool.back(job.ranks)
        job.ranks = []
        job.changed()
        for number in job.pool.waiting:
            heapq.heappush(self.events, (now, number))
        job.pool.waiting.clear()

    def _is_long(self, request: Request) -> bool:
        return request.prompt > self.setting.threshold

    def _prompt(self, job: _Job, now: float) -> float | None:
        """When the oldest prompt, or a chunk of it and a step, is done; None if it has to wait for room."""
        if job.filling is None:
            began = self._admit(job, now)
            if began is None or job.filling is None:
                return began
            now = began
        one, chunk = job.filling, self.setting.chunk
        target = min(one.known, one.computed + chunk) if chunk else one.known
        end = self._compute(job, now, one, target) if one.long else now + self._piece_s(job, one, target)
        if job.filling is not one:
            return end
        one.computed = target
        if one.computed == one.known:
            job.filling, one.left = None, one.left - 1
            one.computed += 1
            one.first_at = end if isnan(one.first_at) else one.first_at
            job.active.append(one)
            self._end(job, end)
        elif job.active:
            end = self._steps(job, end, 0.0)
        # While the base computes a short prompt alone, no call tells of a loss.
        return self._compute(job, end) if job.lost_at <= end else end

    def _admit(self, job: _Job, now: float) -> float | None:
        """When the oldest prompt may begin, with its ranks; None if it has to wait for room."""
        again, setting = bool(job.again), self.setting
        if again:
            one = job.again[0]
        else:
            request = job.queue[0]
            one = _Active(request, self._is_long(request), request.new)
        missing = setting.lease - len(job.ranks) if one.long else 0
        taken = job.pool.lease(now, missing, job.leaf) if missing else []
        keys = one.whole + sum(other.whole for other in job.active)
        if keys > self.speeds.room(len(job.ranks) + len(taken)):
            job.pool.back(taken)
            one.tries += not job.active
            waits = job.active or (keys <= self.speeds.room(len(job.ranks) + missing) and one.tries < _MOST_TRIES)
            if waits and again:
                return None
            if not again:
                job.queue.popleft()
            if waits:
                job.again.append(one)
                return None
            if again:
                job.again.popleft()
            self.found.refused += 1
            return now
        (job.again if again else job.queue).popleft()
        job.filling = one
        if taken:
            self.found.grown += bool(job.ranks)
            self.found.leases += not job.ranks
            job.ranks += taken
            job.changed()
        self.found.unleased += bool(missing and not job.ranks)
        return now + setting.activation_s * bool(taken)

    def _compute(
        self, job: _Job, at: float, one: _Active | None = None, target: int = 0, lost: Sequence[_Active] = ()
    ) -> float:
        """When keys of a long prompt, if there is any, are computed up to ``target``. Each time that a rank is lost it
        begins again, with what is ``lost``, the keys of all long sequences; without room for them the youngest go back
        to the queue, it may be this one."""
        while True:
            again_s = sum(self._prompt_s(job, other, other.computed) for other in lost)
            end = at + again_s + (self._piece_s(job, one, target) if one else 0.0)
            if job.lost_at > end:
                break
            at = self._lose(job, at)
            if job.filling is not one:
                one = None
            lost = job.away
        self.found.replays += len(lost)
        self.found.lost_s += again_s
        return end

    def _piece_s(self, job: _Job, one: _Active, target: int) -> float:
        """A prompt from where it is to there."""
        done_s = self._prompt_s(job, one, one.computed) if one.computed else 0.0
        return self._prompt_s(job, one, target) - done_s

    def _prompt_s(self, job: _Job, one: _Active, tokens: int) -> float:
        return self.speeds.prompt_s(tokens, len(job.ranks) if one.long else 0, job.far)

    def _lose(self, job: _Job, begun: float) -> float:
        """The first rank to be lost is, in a forward that began then; from when on it is known."""
        rank = min(job.ranks, key=lambda one: one.lost_at)
        at = max(begun, rank.lost_at)
        self.found.losses += 1
        self.found.lost_s += at - begun
        self.found.lent.append(Lent(job.number, rank.number, rank.since, rank.lost_at))
        job.ranks.remove(rank)
        job.pool.lose(rank)
        job.changed()
        for number in job.pool.waiting:
            heapq.heappush(self.events, (rank.up_at, number))
        held = [*job.active, *([job.filling] if job.filling else [])]
        room, keys = self.speeds.room(len(job.ranks)), sum(one.whole for one in held)
        while keys > room:
            youngest = next((one for one in reversed(held) if one.long), held[-1])
            held.remove(youngest)
            keys -= youngest.whole
            youngest.computed = 0
            if youngest is job.filling:
                job.filling = None
            else:
                job.active.remove(youngest)
                self.found.replays += 1
            job.again.appendleft(youngest)
            self.found.evicted += 1
        return at

    def _steps(self, job: _Job, now: float, until: float) -> float:
        """When steps of the batch are done: until a sequence ends, or those that begin before ``until``, but one."""
        rows = len(job.active)
        a_step = self.speeds.step_s(rows, sum(one.computed for one in job.active) / rows, len(job.ranks), job.far)
        steps = min(one.left for one in job.active)
        if until < inf:
            steps = max(1, min(steps, ceil((until - now) / a_step)))
        end = now + steps * a_step
        lost = job.lost_at <= end
        if lost:
            steps = max(0, int((job.lost_at - now) / a_step))
            end = now + steps * a_step
        for one in job.active:
            one.left -= steps
            one.computed += steps
        self._end(job, end)
        return self._compute(job, self._lose(job, end), lost=job.away) if lost else end

    def _end(self, job: _Job, now: float) -> None:
        for one in job.active:
            if one.left == 0:
                request, after = one.request, max(1, one.request.new - 1)
                first_s, token_s = one.first_at - request.at_s, (now - one.first_at) / after
                self.found.served.append(Served(request, first_s, token_s, one.long))
        job.active = [one for one in job.active if one.left]
