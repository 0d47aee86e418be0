"""What an attention kernel takes for a batch of equal sequences: measured points, between them, and beyond them.

Points are kept as they were measured, since kernels take steps that no polynomial has. Between two lengths a prompt
follows the straight line of logarithms and a decode step the straight line; between two batches both follow the
straight line. Beyond the longest length measured,

    seconds(batch, 2 n) : seconds(w batch, n)  =  (seconds(batch, n) : seconds(w batch, n / 2)) ^ nearing

where w batches of half the length are as much work: 2 in decode, 4 in prefill. So a kernel that divides keys among
idle processors goes on doing so, and one that leaves them idle goes on leaving them. What a prompt costs for each token
counts for less with each doubling, as in (B + 2 C n) : (B + C n): there the proportion nears 1. Knows no models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import exp, log
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["prefill", "decode"]
Positive = Annotated[float, Field(gt=0)]


class Growth(NamedTuple):
    """How a kind of call grows with its length."""

    work: int
    """Times as much work in twice the length."""
    nearing: float
    straight: bool
    """Between two lengths: of seconds, not of their logarithms."""


GROWTH: dict[Kind, Growth] = {"prefill": Growth(4, 0.5, False), "decode": Growth(2, 1.0, True)}


class Table(BaseModel):
    """Part of a hardware file."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Points(Table):
    """Calls of one kind and shape: microseconds by batch, at the first so many of ``lengths``."""

    lengths: list[int] = Field(min_length=2)
    micros: dict[int, list[Positive]] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.lengths[0] < 1 or sorted(set(self.lengths)) != self.lengths:
            raise ValueError("lengths do not grow from 1 or more")
        for batch, row in self.micros.items():
            if batch < 1 or not 2 <= len(row) <= len(self.lengths):
                raise ValueError(f"batch {batch} has {len(row)} points at {len(self.lengths)} lengths; give 2 at least")
        return self

    @property
    def longest(self) -> int:
        """The longest length measured of any batch."""
        return max(map(self._end, self.micros))

    @property
    def most(self) -> int:
        """Tokens, or keys, of all sequences of the largest point."""
        return max(batch * self._end(batch) for batch in self.micros)

    def seconds(self, batch: float, length: float, growth: Growth) -> float:
        """One call: prompts of so many tokens, or sequences of so many keys with one query each."""
        return 1e-6 * self._beyond(batch, length, growth, 1.0)

    def _end(self, batch: int) -> int:
        return self.lengths[len(self.micros[batch]) - 1]

    def _beyond(self, batch: float, length: float, growth: Growth, power: float) -> float:
        longest = self.longest
        whole = max(known for known in self.micros if self._end(known) == longest)
        if length <= longest or (growth.straight and batch > whole):
            return self._between(batch, length, growth)
        more, power = growth.work * batch, power * growth.nearing
        proportion = self._between(batch, longest, growth) / self._between(more, longest / 2, growth)
        return proportion**power * self._beyond(more, length / 2, growth, power)

    def _between(self, batch: float, length: float, growth: Growth) -> float:
        """More than the largest batch is as much more work, less than the smallest takes as long."""
        known = sorted(one for one in self.micros if growth.straight or self._end(one) >= length)
        at = bisect_left(known, batch)
        if at == len(known):
            return self._row(known[-1], length, growth) * batch / known[-1]
        if at == 0 or known[at] == batch:
            return self._row(known[at], length, growth)
        low, high = known[at - 1], known[at]
        part = (batch - low) / (high - low)
        return (1 - part) * self._row(low, length, growth) + part * self._row(high, length, growth)

    def _row(self, batch: int, length: float, growth: Growth) -> float:
        """Beyond the row's end by the line through its last point and the fourth last: single points are noisy."""
        row, last = self.micros[batch], len(self.micros[batch]) - 1
        if length <= self.lengths[0]:
            return row[0]
        if not growth.straight:
            return exp(sum(weight * log(row[index]) for index, weight in between(length, self.lengths)))
        high = min(bisect_left(self.lengths, length), last)
        low = high - 1 if length <= self.lengths[last] else max(0, last - 3)
        part = (length - self.lengths[low]) / (self.lengths[high] - self.lengths[low])
        return max(row[low] + part * (row[high] - row[low]), min(row[low], row[high]))


class AttentionTable(Table):
    """Points of one shape."""

    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    prefill: Points
    decode: Points

    def points(self, kind: Kind) -> Points:
        return self.prefill if kind == "prefill" else self.decode

    def seconds(self, kind: Kind, batch: float, length: float) -> float:
        """One layer's attention of a batch."""
        return self.points(kind).seconds(batch, length, GROWTH[kind])


def between(value: float, known: Sequence[float]) -> list[tuple[int, float]]:
    """The one or two places of ``known`` beside a value between its ends, with their weights in logarithms."""
    at = bisect_left(known, value)
    if known[at] == value:
        return [(at, 1.0)]
    part = log(value / known[at - 1]) / log(known[at] / known[at - 1])
    return [(at - 1, 1 - part), (at, part)]
