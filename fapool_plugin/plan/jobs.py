"""Jobs in a simulation: what all of them are given, and what each has at a time.

    queue ─ prompt ─ batch ─ served         a sequence; a loss may send it ``again`` to where it begins
    up ─ lost ─ up                          a base: it takes all keys of its job with it

When what happens is not known here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import ceil, inf, nan

from fapool_plugin.plan.arrivals import Request
from fapool_plugin.plan.lending import Pool, Rank, Wear

_BASES = 1 << 32
"""The number of the first base, among those whose losses are drawn."""


@dataclass(frozen=True)
class Setting:
    """Jobs, and pools of ``pool`` ranks which they share. A job leases up to ``lease`` ranks or none; a prompt of more
    than ``threshold`` tokens asks for them, and waits ``activation_s`` for those it gets. ``waits``: where fewer are
    free it also waits for more, as long as they would save at most."""

    jobs: int
    pool: int
    lease: int
    threshold: int
    activation_s: float = 0.001
    waits: bool = False
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
    """GPUs of each job; each that is lost takes the job with it. ..."""
    base_wear: Wear = field(default_factory=Wear)
    leaf: int = 1 << 40
    """... How many GPUs are under one leaf switch."""

    def __post_init__(self) -> None:
        most = self.pool + sum(ranks for _, ranks in self.joins)
        if self.jobs < 1 or not 0 <= self.lease <= most:
            raise ValueError(
                f"{self.jobs} jobs, leases of {self.lease} of {most} pool ranks; give at least 1 job, and leases no "
                "larger than the pool"
            )
        if not 1 <= self.pools <= self.jobs:
            raise ValueError(f"{self.pools} pools for {self.jobs} jobs; give at least 1, and a job for each")
        for who, wear, gpus in (("ranks", self.wear, 1), ("bases", self.base_wear, self.base)):
            if not (0 <= wear.detect_s <= wear.restart_s < wear.mtbf_s / gpus and wear.restart_s > 0):
                raise ValueError(
                    f"{who} are lost after {wear.mtbf_s / gpus:g} s in the mean, missed after {wear.detect_s:g} s and "
                    f"back after {wear.restart_s:g} s; give times above 0, and a mean that is longer than the way back"
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

    def lives(self, job: int) -> Iterator[float]:
        """Seconds that a job's base is up, time after time: until the first of its GPUs is lost."""
        return replace(self.base_wear, mtbf_s=self.base_wear.mtbf_s / self.base).lives(_BASES + job)


@dataclass(slots=True, eq=False)
class Active:
    """A sequence that is computed, or was."""

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
class Job:
    """A base, the ranks that it has, and its sequences."""

    number: int
    pool: Pool
    leaf: int
    queue: deque[Request]
    lives: Iterator[float]
    again: deque[Active] = field(default_factory=deque)
    """Sequences that come before the queue: they have been there."""
    filling: Active | None = None
    active: list[Active] = field(default_factory=list)
    ranks: list[Rank] = field(default_factory=list)
    far: bool = False
    lost_at: float = inf
    """When the first of its ranks is lost."""
    down_at: float = inf
    """When its base is lost, ..."""
    up_at: float = 0.0
    """... and since when, or from when on, it is there."""
    due: float = nan
    waiting: bool = False
    asked_at: float = nan
    """Since when its next prompt waits for ranks, ..."""
    until: float = -inf
    """... and until when that may pay."""
    busy_since: float = nan

    def __post_init__(self) -> None:
        self.down_at = next(self.lives)

    @property
    def away(self) -> list[Active]:
        """Sequences whose keys ranks have."""
        return [one for one in (*self.active, self.filling) if one and one.long and one.computed]

    def changed(self) -> None:
        """Its ranks are others."""
        self.far = any(rank.leaf != self.leaf for rank in self.ranks)
        self.lost_at = min((rank.lost_at for rank in self.ranks), default=inf)
