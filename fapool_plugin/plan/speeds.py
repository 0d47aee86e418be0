"""What forwards take in a simulation: the planner's predictions at sizes of two significant bits, and in straight
lines between them.

Asked for many sizes, so what was predicted once is kept. Knows nothing of traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import ceil
from typing import NamedTuple, Protocol

from fapool_plugin.plan.cluster import Cluster
from fapool_plugin.plan.context_parallel import keys_divided_s, ring_s, ulysses_s
from fapool_plugin.plan.hardware import Kind


class Speeds(Protocol):
    """What forwards take, and how many tokens' keys GPUs hold. ``far``: some of the ranks are under other leaf
    switches than the base."""

    def prompt_s(self, tokens: int, ranks: int, far: bool) -> float:
        """Prefill of one prompt with ``ranks`` pool ranks; 0: the base alone."""

    def step_s(self, rows: int, tokens: float, ranks: int, far: bool) -> float:
        """A step of ``rows`` sequences of ``tokens`` tokens in the mean."""

    def room(self, ranks: int) -> float:
        """Tokens whose keys base and ranks hold."""


class _Size(NamedTuple):
    kind: Kind
    rows: int
    tokens: int
    ranks: int
    far: bool


@dataclass(frozen=True)
class _Between:
    """Straight lines between the sizes at which ``at`` is asked."""

    at: Callable[[_Size], float]
    _known: dict[_Size, float] = field(default_factory=dict)

    def __call__(self, kind: Kind, rows: int, tokens: float, ranks: int, far: bool) -> float:
        low, high = _bounds(tokens)
        first = self._at(_Size(kind, rows, low, ranks, far))
        if low == high:
            return first
        return first + (tokens - low) / (high - low) * (self._at(_Size(kind, rows, high, ranks, far)) - first)

    def _at(self, size: _Size) -> float:
        if size not in self._known:
            self._known[size] = self.at(size)
        return self._known[size]


@dataclass(frozen=True)
class Planned:
    """A base with pool ranks, or alone where that is faster. ``oversubscription`` slows ranks that are far."""

    cluster: Cluster
    oversubscription: float = 1.0

    def prompt_s(self, tokens: int, ranks: int, far: bool = False) -> float:
        return self._between("prefill", 1, tokens, ranks, far and self.oversubscription > 1)

    def step_s(self, rows: int, tokens: float, ranks: int, far: bool = False) -> float:
        return self._between("decode", _bounds(rows)[1], tokens, ranks, far and self.oversubscription > 1)

    def room(self, ranks: int) -> float:
        gpu = self.cluster.hardware
        return _room(self.cluster) + ranks * (gpu.memory_bytes - gpu.reserve_bytes) / _position(self.cluster)

    @cached_property
    def _between(self) -> _Between:
        far = replace(self.cluster, oversubscription=self.oversubscription)

        def at(size: _Size) -> float:
            cluster, forward = far if size.far else self.cluster, (size.kind, size.rows, size.tokens)
            alone = cluster.alone_s(*forward)
            return min(alone, cluster.pooled(*forward, size.ranks).seconds) if size.ranks else alone

        return _Between(at)


@dataclass(frozen=True)
class Divided:
    """No pool: ``groups`` bases with copies of the weights divide every prompt and every sequence's keys between them,
    by context parallelism; of a ring and Ulysses the faster."""

    cluster: Cluster
    groups: int

    def prompt_s(self, tokens: int, ranks: int, far: bool = False) -> float:
        return self._between("prefill", 1, tokens, 0, False)

    def step_s(self, rows: int, tokens: float, ranks: int, far: bool = False) -> float:
        return self._between("decode", _bounds(rows)[1], tokens, 0, False)

    def room(self, ranks: int) -> float:
        return self.groups * _room(self.cluster)

    @cached_property
    def _between(self) -> _Between:
        cluster, groups = self.cluster, self.groups

        def at(size: _Size) -> float:
            if size.kind == "decode":
                return keys_divided_s(cluster, size.rows, size.tokens, groups)
            ways = [ring_s] if cluster.shape().heads % groups else [ring_s, ulysses_s]
            return min(way(cluster, size.tokens, groups) for way in ways)

        return _Between(at)


def _room(cluster: Cluster) -> float:
    """Tokens whose keys one base holds beside its weights."""
    gpu, shape = cluster.hardware, cluster.shape()
    free = gpu.memory_bytes - gpu.reserve_bytes - shape.parameters * shape.element_bytes
    return cluster.base * max(0, free) / _position(cluster)


def _position(cluster: Cluster) -> int:
    """Bytes of a token's keys on all base ranks."""
    shape = cluster.shape()
    return shape.layers * shape.kv_heads * 2 * shape.head_dim * shape.element_bytes * cluster.base


def _bounds(number: float) -> tuple[int, int]:
    """The nearest numbers of two significant bits, below and above."""
    least = 1 << max(0, int(number).bit_length() - 2)
    low = int(number) // least * least
    return max(1, low), max(1, ceil(number / least) * least)
