"""What came of simulated traffic: when each request was answered, who computed, and who had which rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from typing import NamedTuple

import numpy as np

from fapool_plugin.plan.arrivals import Request


class Served(NamedTuple):
    """When a request was answered: seconds to its first token, and for each token after it."""

    request: Request
    first_s: float
    token_s: float
    long: bool


class Lent(NamedTuple):
    """A job had a rank."""

    job: int
    rank: int
    start: float
    stop: float


class Busy(NamedTuple):
    """A job computed without a pause."""

    job: int
    start: float
    stop: float


@dataclass
class Outcome:
    """What came of it."""

    served: list[Served] = field(default_factory=list)
    refused: int = 0
    """Requests whose keys do not even fit alone, or found no room in ten thousand tries."""
    seconds: float = 0.0
    """Until the last token."""
    busy: list[Busy] = field(default_factory=list)
    lent: list[Lent] = field(default_factory=list)
    leases: int = 0
    grown: int = 0
    """Leases that got ranks again, or more."""
    unleased: int = 0
    """Long prompts that found no rank."""
    waited_s: float = 0.0
    """Of all jobs, for ranks that others had."""
    base_losses: int = 0
    losses: int = 0
    """Leased ranks that were lost."""
    replays: int = 0
    """Sequences whose keys were computed again."""
    evicted: int = 0
    """Of them those that went back to the queue, for want of room."""
    lost_s: float = 0.0
    """Of all jobs, by lost ranks: forwards that were abandoned, the time until a loss is known, and replays but for
    those of sequences that went back."""

    @property
    def base_busy_s(self) -> float:
        """Of all jobs."""
        return sum(one.stop - one.start for one in self.busy)

    @property
    def leased_s(self) -> float:
        """Of all ranks."""
        return sum(one.stop - one.start for one in self.lent)


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Of 50, 95 and 99 %; nan of none."""
    p50, p95, p99 = np.percentile(values, (50, 95, 99)) if values else (nan, nan, nan)
    return float(p50), float(p95), float(p99)
