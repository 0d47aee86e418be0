"""Traffic on a cluster, event by event: jobs with a base each, which lease ranks of standing pools.

    job   wait ─ prefill of the oldest ─ steps of all in the batch ... until a prompt waits or a sequence ends
    pool  free ─ leased by a job when a long sequence comes ─ free when the last long one ends
    loss       ... forward ╳ ─ known ─ the lease shrinks ─ keys of long sequences are computed again ─ the forward again
    base lost  ... forward ╳ ─ known: its ranks are free ─ up: all its sequences begin again

Prompts come first, one at a time, whole or in chunks with a step between; steps are counted together up to the next
thing that happens. What forwards take is asked of ``Speeds``, which asks the planner. A lease grows again at the next
long prompt. Who waits longest gets ranks first, and a job whose last long sequence has ended asks for its next one
behind those that wait. To wait at most as long as ranks would save is never twice as long as not to wait, and needs no
guess of when they come (ski rental: Karlin, Manasse, Rudolph and Sleator 1988).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, inf, isnan, nan

from fapool_plugin.plan.arrivals import Request
from fapool_plugin.plan.jobs import Active, Job, Setting
from fapool_plugin.plan.lending import Pool, Rank, places
from fapool_plugin.plan.outcome import Busy, Lent, Outcome, Served
from fapool_plugin.plan.speeds import Speeds

_MOST_TRIES = 10_000


class _BaseLost(Exception):
    """In the forward that is computed."""


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
            Job(job, pool, leaf, deque(ordered[job :: setting.jobs]), setting.lives(job))
            for job, leaf in zip(members, bases, strict=True)
        ]
    return run.all()


@dataclass
class _Run:
    setting: Setting
    speeds: Speeds
    jobs: list[Job] = field(default_factory=list)
    events: list[tuple[float, float, int]] = field(default_factory=list)
    """When which job goes on, those first that waited longest."""
    now: float = 0.0
    found: Outcome = field(default_factory=Outcome)

    def all(self) -> Outcome:
        for job in self.jobs:
            if self.setting.fixed:
                job.ranks = job.pool.lease(0.0, self.setting.lease, job.leaf)
                job.changed()
            if job.queue:
                self._later(job, job.queue[0].at_s)
        while self.events:
            self.now, _, number = heapq.heappop(self.events)
            job = self.jobs[number]
            if job.waiting or job.due == self.now:
                job.waiting = False
                self._go_on(job, self.now)
        for job in self.jobs:
            self._fallen(job, self.found.seconds)
            self._idle_losses(job, self.found.seconds)
            self._back(job, self.found.seconds)
        return self.found

    def _idle_losses(self, job: Job, now: float) -> None:
        detect_s = self.setting.wear.detect_s
        while job.lost_at + detect_s <= now:
            self._lose(job, job.lost_at + detect_s)

    def _go_on(self, job: Job, now: float) -> None:
        if self._fallen(job, now):
            return
        self._idle_losses(job, now)
        waits = bool(job.filling or job.again or (job.queue and job.queue[0].at_s <= now))
        if self._release(job, now, waits):
            self._later(job, now)
            return
        try:
            end = self._prompt(job, now) if waits else None
            if end is None and job.active:
                until = inf if waits or not job.queue else job.queue[0].at_s
                end = self._steps(job, now, now if now < job.until else until)
        except _BaseLost:
            end = job.down_at
        if end is not None:
            if not job.busy_since <= now:
                job.busy_since = now
            self._later(job, end)
            return
        if job.busy_since <= now:
            self._pause(job, now)
        if waits:
            self._wait(job, now)
        elif job.queue:
            self._later(job, job.queue[0].at_s)

    def _pause(self, job: Job, now: float) -> None:
        self.found.busy.append(Busy(job.number, job.busy_since, now))
        job.busy_since = nan

    def _later(self, job: Job, at: float) -> None:
        job.due = at
        heapq.heappush(self.events, (at, inf, job.number))

    def _wake(self, pool: Pool, at: float) -> None:
        for number, since in pool.waiting.items():
            heapq.heappush(self.events, (max(at, self.now), since, number))

    def _wait(self, job: Job, now: float) -> None:
        """Until ranks are there. It holds none meanwhile, or two that wait would wait for each other."""
        if not self.setting.fixed:
            self._back(job, now)
        job.waiting = True
        since = job.pool.waiting.setdefault(job.number, now)
        for at in (job.pool.next_up(now), job.until, job.down_at):
            if now < at < inf:
                heapq.heappush(self.events, (at, since, job.number))

    def _fallen(self, job: Job, now: float) -> bool:
        """Whether its base is not there. All keys went with it, and its ranks are free once that is known."""
        wear = self.setting.base_wear
        while job.down_at <= now:
            if job.busy_since <= job.down_at:
                self._pause(job, job.down_at)
            self.found.base_losses += 1
            self._asked(job, job.down_at)
            for one in reversed([*job.active, *([job.filling] if job.filling else [])]):
                self.found.replays += bool(one.computed)
                one.computed = 0
                job.again.appendleft(one)
            job.active, job.filling = [], None
            job.up_at = job.down_at + wear.restart_s
            job.down_at = job.up_at + next(job.lives)
        known_at = job.up_at - wear.restart_s + wear.detect_s
        if now >= job.up_at:
            return False
        # Ranks that are lost meanwhile are others' as soon as they are back.
        for rank in [one for one in job.ranks if one.lost_at <= known_at]:
            self._drop(job, rank)
        if now >= known_at and not self.setting.fixed:
            self._back(job, now)
        self._later(job, known_at if now < known_at else job.up_at)
        return True

    def _survives(self, job: Job, end: float) -> None:
        if job.down_at <= end:
            raise _BaseLost

    def _release(self, job: Job, now: float, waits: bool) -> bool:
        """Gives ranks back if nothing long is left; whether that lets others ask before this job's next prompt does."""
        if not job.ranks or self.setting.fixed or any(one.long for one in (*job.active, job.filling) if one):
            return False
        long = waits and not job.filling and (job.again[0].long if job.again else self._is_long(job.queue[0]))
        others = job.pool.waiting.keys() - {job.number}
        if not long or others:
            self._back(job, now)
        return bool(long and others)

    def _back(self, job: Job, now: float) -> None:
        if not job.ranks:
            return
        self.found.lent += [Lent(job.number, rank.number, rank.since, min(now, rank.lost_at)) for rank in job.ranks]
        job.pool.back(job.ranks)
        job.ranks = []
        job.changed()
        self._wake(job.pool, now)

    def _is_long(self, request: Request) -> bool:
        return request.prompt > self.setting.threshold

    def _prompt(self, job: Job, now: float) -> float | None:
        """When the oldest prompt, or a chunk of it and a step, is done; None if it has to wait for room."""
        if job.filling is None:
            began = self._admit(job, now)
            if began is None or job.filling is None:
                return began
            now = began
        one, chunk = job.filling, self.setting.chunk
        target = min(one.known, one.computed + chunk) if chunk else one.known
        end = self._compute(job, now, one, target) if one.long else now + self._piece_s(job, one, target)
        self._survives(job, end)
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

    def _admit(self, job: Job, now: float) -> float | None:
        """When the oldest prompt may begin, with its ranks; None if it has to wait for room, or for ranks."""
        again, setting = bool(job.again), self.setting
        if again:
            one = job.again[0]
        else:
            request = job.queue[0]
            one = Active(request, self._is_long(request), request.new)
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
            self._asked(job, now)
            return now
        (job.again if again else job.queue).popleft()
        if len(taken) < missing and self._pays(job, now, one, len(job.ranks) + len(taken)):
            job.pool.back(taken)
            job.again.appendleft(one)
            return None
        self._asked(job, now)
        job.filling = one
        if taken:
            self.found.grown += bool(job.ranks)
            self.found.leases += not job.ranks
            job.ranks += taken
            job.changed()
        self.found.unleased += bool(missing and not job.ranks)
        return now + setting.activation_s * bool(taken)

    def _pays(self, job: Job, now: float, one: Active, have: int) -> bool:
        """Whether to wait for more ranks."""
        if not self.setting.waits:
            return False
        full, less = (self.speeds.prompt_s(one.known, ranks, job.far) for ranks in (self.setting.lease, have))
        job.pool.waiting.setdefault(job.number, now)
        if isnan(job.asked_at):
            job.asked_at = now
        job.until = job.asked_at + max(0.0, less - full)
        return now < job.until

    def _asked(self, job: Job, now: float) -> None:
        """Its next prompt waits for ranks no more."""
        job.pool.waiting.pop(job.number, None)
        if not isnan(job.asked_at):
            self.found.waited_s += now - job.asked_at
        job.asked_at, job.until = nan, -inf

    def _compute(
        self, job: Job, at: float, one: Active | None = None, target: int = 0, lost: Sequence[Active] = ()
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
        self._survives(job, end)
        self.found.replays += len(lost)
        self.found.lost_s += again_s
        return end

    def _piece_s(self, job: Job, one: Active, target: int) -> float:
        """A prompt from where it is to there."""
        done_s = self._prompt_s(job, one, one.computed) if one.computed else 0.0
        return self._prompt_s(job, one, target) - done_s

    def _prompt_s(self, job: Job, one: Active, tokens: int) -> float:
        return self.speeds.prompt_s(tokens, len(job.ranks) if one.long else 0, job.far)

    def _lose(self, job: Job, begun: float) -> float:
        """The first rank to be lost is, in a forward that began then; from when on it is known."""
        at = max(begun, job.lost_at + self.setting.wear.detect_s)
        self._survives(job, at)
        rank = min(job.ranks, key=lambda one: one.lost_at)
        self.found.lost_s += at - begun
        self._drop(job, rank)
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

    def _drop(self, job: Job, rank: Rank) -> None:
        self.found.losses += 1
        self.found.lent.append(Lent(job.number, rank.number, rank.since, rank.lost_at))
        job.ranks.remove(rank)
        job.pool.lose(rank)
        job.changed()
        self._wake(job.pool, rank.up_at)

    def _steps(self, job: Job, now: float, until: float) -> float:
        """When steps of the batch are done: until a sequence ends, or those that begin before ``until``, but one."""
        rows = len(job.active)
        a_step = self.speeds.step_s(rows, sum(one.computed for one in job.active) / rows, len(job.ranks), job.far)
        steps = min(one.left for one in job.active)
        if until < inf:
            steps = max(1, min(steps, ceil((until - now) / a_step)))
        end = now + steps * a_step
        lost_at = min(job.lost_at, job.down_at)
        lost = lost_at <= end
        if lost:
            steps = max(0, int((lost_at - now) / a_step))
            end = now + steps * a_step
        for one in job.active:
            one.left -= steps
            one.computed += steps
        self._end(job, end)
        return self._compute(job, self._lose(job, end), lost=job.away) if lost else end

    def _end(self, job: Job, now: float) -> None:
        for one in job.active:
            if one.left == 0:
                self.found.seconds = max(self.found.seconds, now)
                request, after = one.request, max(1, one.request.new - 1)
                first_s, token_s = one.first_at - request.at_s, (now - one.first_at) / after
                self.found.served.append(Served(request, first_s, token_s, one.long))
        job.active = [one for one in job.active if one.left]
