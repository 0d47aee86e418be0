"""Ranks of a standing pool in a simulation: where they are, when they are lost and back again, which are free.

    free ── leased ── free                       given back
      └───────┴── lost ── down, restart_s ── free

A rank is lost after an exponential time, leased or free. Each draws from a stream of its own: the same seed loses the
same ranks at the same times, whatever jobs do with them. A rank that joins later is down until then. Time is the
caller's; jobs and models are not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from math import inf

import numpy as np

_DRAWN_AT_ONCE = 8


@dataclass(frozen=True)
class Wear:
    """How ranks, or the GPUs of a base, are lost: after ``mtbf_s`` in the mean, for ``restart_s`` each time. Who works
    with them knows of it after ``detect_s``."""

    mtbf_s: float = inf
    restart_s: float = 60.0
    seed: int = 0
    detect_s: float = 0.0

    def lives(self, rank: int) -> Iterator[float]:
        """Seconds that a rank of this number is up, time after time."""
        draw = np.random.default_rng((self.seed, rank)) if self.mtbf_s < inf else None
        while True:
            yield from draw.exponential(self.mtbf_s, _DRAWN_AT_ONCE).tolist() if draw else (inf,)


@dataclass(slots=True, eq=False)
class Rank:
    """One GPU of a pool."""

    number: int
    leaf: int
    """Under which leaf switch it is."""
    up_at: float
    """From when on it is there, ..."""
    lost_at: float
    """... and until when."""
    lives: Iterator[float]
    since: float = 0.0
    """When it was leased."""


@dataclass
class Pool:
    """The ranks of one pool. Those near a job, under its leaf, are lent first."""

    wear: Wear
    free: dict[int, list[Rank]] = field(default_factory=dict)
    """By leaf."""
    waiting: dict[int, float] = field(default_factory=dict)
    """Jobs that go on when ranks are there again, and since when they wait for them."""

    def join(self, number: int, leaf: int, at_s: float) -> None:
        """A rank that is there from ``at_s`` on."""
        lives = self.wear.lives(number)
        self.back([Rank(number, leaf, at_s, at_s + next(lives), lives)])

    def back(self, ranks: Iterable[Rank]) -> None:
        """Ranks that a job does not need any more."""
        for rank in ranks:
            self.free.setdefault(rank.leaf, []).append(rank)

    def lose(self, rank: Rank) -> None:
        """A leased rank is lost, and down for a time."""
        self._wear(rank)
        self.back([rank])

    def lease(self, now: float, wanted: int, leaf: int) -> list[Rank]:
        """Up to so many ranks that are free and up."""
        taken: list[Rank] = []
        down: list[Rank] = []
        for place in chain((leaf,), (other for other in self.free if other != leaf)):
            ranks = self.free.get(place, [])
            while ranks and len(taken) < wanted:
                rank = ranks.pop()
                self._pass(rank, now)
                (taken if rank.up_at <= now else down).append(rank)
            if len(taken) == wanted:
                break
        self.back(down)
        for rank in taken:
            rank.since = now
        return taken

    def next_up(self, now: float) -> float:
        """When the next free rank that is down is up again; inf: none is down."""
        for ranks in self.free.values():
            for rank in ranks:
                self._pass(rank, now)
        return min((one.up_at for ranks in self.free.values() for one in ranks if one.up_at > now), default=inf)

    def _pass(self, rank: Rank, now: float) -> None:
        """What happened to a free rank until now."""
        while rank.lost_at <= now:
            self._wear(rank)

    def _wear(self, rank: Rank) -> None:
        rank.up_at = rank.lost_at + self.wear.restart_s
        rank.lost_at = rank.up_at + next(rank.lives)


def places(jobs: int, base: int, pool: int, leaf: int, first: int = 0) -> tuple[list[int], list[int], int]:
    """Leaves of ``jobs`` bases of ``base`` GPUs and of the ``pool`` ranks that they share, laid out from GPU ``first``
    on: each base, whole under a leaf of ``leaf`` GPUs, and beside it its part of the ranks; and the next free GPU."""
    at, bases, ranks = first, [], []
    for job in range(jobs):
        if at % leaf + base > leaf:
            at += leaf - at % leaf
        bases.append(at // leaf)
        at += base
        beside = (job + 1) * pool // jobs - job * pool // jobs
        ranks += [(at + one) // leaf for one in range(beside)]
        at += beside
    return bases, ranks, at
