"""Traffic on a cluster, event by event: jobs with a base each, which lease ranks of one standing pool.

    job   wait ─ prefill of the oldest ─ steps of all in the batch ... until a prompt waits or a sequence ends
    pool  free ─ leased by a job when a long sequence comes ─ free when the last long one ends

Prompts come first and whole, one at a time; steps are counted together up to the next thing that happens. What forwards
take is asked of ``Speeds``, which asks the planner. Lost ranks and a pool that grows are not known here.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil, nan
from typing import NamedTuple, Protocol

import numpy as np

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.hardware import Kind


class Request(NamedTuple):
    """A prompt of ``prompt`` tokens that comes at ``at_s``; ``new`` tokens are generated."""

    at_s: float
    prompt: int
    new: int


class Served(NamedTuple):
    """When a request was answered: seconds to its first token, and for each token after it."""

    request: Request
    first_s: float
    token_s: float
    long: bool


class Speeds(Protocol):
    """What forwards take, and how many tokens' keys GPUs hold."""

    def prompt_s(self, tokens: int, ranks: int) -> float:
        """Prefill of one prompt with ``ranks`` pool ranks; 0: the base alone."""

    def step_s(self, rows: int, tokens: float, ranks: int) -> float:
        """A step of ``rows`` sequences of ``tokens`` tokens in the mean."""

    def room(self, ranks: int) -> float:
        """Tokens whose keys base and ranks hold."""


@dataclass(frozen=True)
class Planned:
    """The planner's, at sizes of two significant bits and in straight lines between them."""

    cluster: Cluster
    _known: dict[tuple[Kind, int, int, int], float] = field(default_factory=dict, init=False, repr=False)

    def prompt_s(self, tokens: int, ranks: int) -> float:
        return self._between("prefill", 1, tokens, ranks)

    def step_s(self, rows: int, tokens: float, ranks: int) -> float:
        return self._between("decode", _bounds(rows)[1], tokens, ranks)

    def room(self, ranks: int) -> float:
        cluster, gpu, shape = self.cluster, self.cluster.hardware, self.cluster.shape()
        position = shape.layers * shape.kv_heads * 2 * shape.head_dim * shape.element_bytes * cluster.base
        rank = gpu.memory_bytes - gpu.reserve_bytes
        weights = shape.parameters * shape.element_bytes
        return (cluster.base * max(0, rank - weights) + ranks * rank) / position

    def _between(self, kind: Kind, rows: int, tokens: float, ranks: int) -> float:
        low, high = _bounds(tokens)
        first = self._at(kind, rows, low, ranks)
        if low == high:
            return first
        return first + (tokens - low) / (high - low) * (self._at(kind, rows, high, ranks) - first)

    def _at(self, kind: Kind, rows: int, tokens: int, ranks: int) -> float:
        key = kind, rows, tokens, ranks
        if key not in self._known:
            seconds = self.cluster.alone_s(kind, rows, tokens)
            if ranks:
                seconds = min(seconds, self.cluster.pooled(kind, rows, tokens, ranks).seconds)
            self._known[key] = seconds
        return self._known[key]


def _bounds(number: float) -> tuple[int, int]:
    """The nearest numbers of two significant bits, below and above."""
    least = 1 << max(0, int(number).bit_length() - 2)
    low = int(number) // least * least
    return max(1, low), max(1, ceil(number / least) * least)


@dataclass(frozen=True)
class Setting:
    """Jobs and the pool that they share. A job leases ``lease`` ranks or none; a prompt of more than ``threshold``
    tokens asks for them, and waits ``activation_s`` for those it gets."""

    jobs: int
    pool: int
    lease: int
    threshold: int
    activation_s: float = 0.001


@dataclass
class Outcome:
    """What came of it."""

    served: list[Served] = field(default_factory=list)
    refused: int = 0
    """Requests whose keys do not even fit alone."""
    seconds: float = 0.0
    """Until the last token."""
    base_busy_s: float = 0.0
    """Of all jobs."""
    leased_s: float = 0.0
    """Of all ranks: seconds under lease."""
    leases: int = 0
    unleased: int = 0
    """Long prompts that found the pool leased to others."""


@dataclass
class _Active:
    request: Request
    first_at: float
    left: int

    @property
    def keys(self) -> int:
        return self.request.prompt + self.request.new - self.left


@dataclass
class _Job:
    queue: deque[Request]
    active: list[_Active] = field(default_factory=list)
    ranks: int = 0
    since: float = 0.0


def simulate(requests: Iterable[Request], setting: Setting, speeds: Speeds) -> Outcome:
    """Serves all requests; they go to jobs in turn.

    Raises:
        ValueError: there is no request or no job, or a lease is larger than the pool.
    """
    ordered = sorted(requests)
    if not ordered or setting.jobs < 1 or not 0 <= setting.lease <= setting.pool:
        raise ValueError(
            f"{len(ordered)} requests, {setting.jobs} jobs, leases of {setting.lease} of {setting.pool} pool ranks; "
            "give at least 1 request and 1 job, and leases no larger than the pool"
        )
    return _Run(setting, speeds, [_Job(deque(ordered[number :: setting.jobs])) for number in range(setting.jobs)]).all()


@dataclass
class _Run:
    setting: Setting
    speeds: Speeds
    jobs: list[_Job]
    free: int = 0
    events: list[tuple[float, int]] = field(default_factory=list)
    """When which job goes on."""
    waiting: list[int] = field(default_factory=list)
    """Jobs that go on when ranks come back."""
    found: Outcome = field(default_factory=Outcome)

    def all(self) -> Outcome:
        self.free, events = self.setting.pool, self.events
        events += [(job.queue[0].at_s, number) for number, job in enumerate(self.jobs) if job.queue]
        heapq.heapify(events)
        while events:
            now, number = heapq.heappop(events)
            job = self.jobs[number]
            waits = bool(job.queue) and job.queue[0].at_s <= now
            self._release(job, now, waits)
            spent = self._prompt(job, now) if waits else None
            if spent is None and job.active:
                spent = self._steps(job, now, waits)
            if spent is not None:
                self.found.base_busy_s += spent
                self.found.seconds = max(self.found.seconds, now + spent)
                heapq.heappush(events, (now + spent, number))
            elif waits:
                self.waiting.append(number)
            elif job.queue:
                heapq.heappush(events, (job.queue[0].at_s, number))
        return self.found

    def _is_long(self, request: Request) -> bool:
        return request.prompt > self.setting.threshold

    def _release(self, job: _Job, now: float, waits: bool) -> None:
        """Gives ranks back if nothing long is left."""
        longs = any(self._is_long(one.request) for one in job.active)
        if job.ranks and not longs and not (waits and self._is_long(job.queue[0])):
            self.found.leased_s += (now - job.since) * job.ranks
            self.free, job.ranks = self.free + job.ranks, 0
            while self.waiting:
                heapq.heappush(self.events, (now, self.waiting.pop()))

    def _prompt(self, job: _Job, now: float) -> float | None:
        """Seconds of the oldest prompt; None if it has to wait for room."""
        request, setting = job.queue[0], self.setting
        long = self._is_long(request)
        wanted = setting.lease if long and not job.ranks else 0
        taken = wanted if self.free >= wanted else 0
        keys = request.prompt + request.new + sum(one.request.prompt + one.request.new for one in job.active)
        if keys > self.speeds.room(job.ranks + taken):
            if job.active or keys <= self.speeds.room(job.ranks + wanted):
                return None
            job.queue.popleft()
            self.found.refused += 1
            return 0.0
        job.queue.popleft()
        spent = 0.0
        if taken:
            job.ranks, job.since, self.free = taken, now, self.free - taken
            self.found.leases, spent = self.found.leases + 1, setting.activation_s
        self.found.unleased += bool(wanted and not taken)
        spent += self.speeds.prompt_s(request.prompt, job.ranks if long else 0)
        job.active.append(_Active(request, now + spent, request.new - 1))
        self._end(job, now + spent)
        return spent

    def _steps(self, job: _Job, now: float, waits: bool) -> float:
        """Seconds of steps of the batch, until a sequence ends or a prompt comes."""
        rows, ranks = len(job.active), job.ranks
        a_step = self.speeds.step_s(rows, sum(one.keys for one in job.active) / rows, ranks)
        steps = min(one.left for one in job.active)
        if job.queue and not waits:
            steps = max(1, min(steps, ceil((job.queue[0].at_s - now) / a_step)))
        for one in job.active:
            one.left -= steps
        self._end(job, now + steps * a_step)
        return steps * a_step

    def _end(self, job: _Job, now: float) -> None:
        for one in job.active:
            if one.left == 0:
                request, after = one.request, max(1, one.request.new - 1)
                first_s, token_s = one.first_at - request.at_s, (now - one.first_at) / after
                self.found.served.append(Served(request, first_s, token_s, self._is_long(request)))
        job.active = [one for one in job.active if one.left]


def arrivals(rate: float, seconds: float, seed: int, *, long_part: float = 0.05, bursts: float = 1.0) -> list[Request]:
    """Poisson arrivals in the shape of public traces: mostly short prompts, a tail of long ones.

    Short prompts are log-normal about 800 tokens, long ones even in logarithms from 16,384 to 131,072; answers are
    log-normal about 150.

    Args:
        rate: requests a second.
        seconds: how long they come.
        seed: the same gives the same.
        long_part: part of them that is long.
        bursts: requests that come at once, in the mean of a geometric distribution.
    """
    draw = np.random.default_rng(seed)
    times = np.cumsum(draw.exponential(bursts / rate, size=max(1, int(2 * rate * seconds / bursts) + 20)))
    times = np.repeat(times, draw.geometric(1 / bursts, size=len(times)))
    times = times[times < seconds]
    prompts = np.clip(draw.lognormal(np.log(800), 1.0, len(times)), 16, 16_384)
    long = draw.random(len(times)) < long_part
    prompts[long] = 2 ** draw.uniform(14, 17, int(long.sum()))
    new = np.clip(draw.lognormal(np.log(150), 0.8, len(times)), 1, 2048)
    return [Request(float(t), int(p), int(n)) for t, p, n in zip(times, prompts, new, strict=True)]


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Of 50, 95 and 99 %; nan of none."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99)) if values else (nan, nan, nan)
    return float(p50), float(p95), float(p99)
