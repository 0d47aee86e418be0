"""A row of a cluster's plan: a pool's time and memory, and beside it what the same b + p GPUs could do without one.

Each alternative holds the weights once for each group of GPUs that computes by itself, and is given the pool's link
between groups. Formulas, with c groups of b GPUs:

- *replicas*: c models, each with its part of the batch; a single prompt gains nothing but its place in the queue.
- *data parallel*: every GPU a whole model with its part of the batch, no all-reduce.
- context parallelism, by plan/context_parallel.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil
from typing import NamedTuple

from fapool_plugin.plan.cluster import Cluster, Pooled
from fapool_plugin.plan.context_parallel import keys_divided_s, ring_s, ulysses_s
from fapool_plugin.plan.hardware import ELEMENT_BYTES, Kind
from fapool_plugin.plan.memory import Room, fits


class Other(NamedTuple):
    """What an alternative takes."""

    name: str
    seconds: float
    """Of a step; of a prompt: until it is done, with replicas divided by their number, as if so many waited."""
    holds: bool
    """Whether its GPUs' memory holds weights and keys."""
    copies: int
    """Of the weights."""


class Memory(NamedTuple):
    """Bytes of one GPU, what libraries reserve among them."""

    alone: int
    """A base rank without a pool, or with one and ``kv_home: "base"``."""
    base: int
    """A base rank with ``kv_home: "pool"``."""
    rank: int
    """A pool rank."""
    holds: bool
    """Whether base and pool together hold each key once."""


@dataclass(frozen=True)
class Outlook:
    """One forward on a cluster with ``ranks`` pool ranks: ``batch`` sequences' step, or one prompt at a time."""

    cluster: Cluster
    kind: Kind
    batch: int
    tokens: int
    ranks: int

    @property
    def rows(self) -> int:
        """Sequences of one forward."""
        return 1 if self.kind == "prefill" else self.batch

    @cached_property
    def alone_s(self) -> float:
        return self.cluster.alone_s(self.kind, self.rows, self.tokens)

    @cached_property
    def linear_s(self) -> float:
        """What of it is not attention."""
        return self.cluster.linear_s(self.tokens if self.kind == "prefill" else self.rows, self.rows)

    @cached_property
    def pooled(self) -> Pooled | None:
        return self.cluster.pooled(self.kind, self.rows, self.tokens, self.ranks) if self.ranks else None

    @property
    def alone_holds(self) -> bool:
        """Whether the base alone holds the batch's keys."""
        return self.memory.alone <= self.cluster.hardware.memory_bytes

    @cached_property
    def memory(self) -> Memory:
        """For the keys of the whole batch, in prefill too: it decodes next."""
        gpu, base = self.cluster.hardware, self.cluster.base
        fixed, keys = self._weights(base) + gpu.reserve_bytes, self._keys(base, self.batch)
        room = [max(0, gpu.memory_bytes - gpu.reserve_bytes)] * self.ranks
        free = max(0, gpu.memory_bytes - fixed)
        shape = self.cluster.shape(1)
        if base > shape.kv_heads:  # copies of a KV head are keys like others
            shape = shape.model_copy(update={"kv_heads": base})
        holds = fits(shape, self.batch, self.tokens, Room(room, free * base))
        shared = keys * base / (base + self.ranks)
        share = self.pooled.base_share if self.pooled and self.kind == "decode" else None
        mine = keys * share if share is not None else shared
        # A base rank gives what it has no room for.
        mine = min(mine, free)
        rank = (keys - mine) * base / self.ranks if self.ranks else 0
        return Memory(fixed + keys, round(fixed + mine), round(rank) + gpu.reserve_bytes * bool(self.ranks), holds)

    def marks(self) -> list[str]:
        """What of it is not measured."""
        shape = self.cluster.shape()
        return self.cluster.hardware.marks(
            self.kind, shape.heads, shape.kv_heads, shape.head_dim, self.rows, self.tokens
        )

    def others(self) -> list[Other]:
        """Alternatives that exist for these numbers."""
        cluster, base, gpus = self.cluster, self.cluster.base, self.cluster.base + self.ranks
        groups = gpus // base
        each = ceil(self.batch / groups)
        found = []
        if groups > 1 and self.kind == "prefill":
            found.append(Other("replicas", self.alone_s / groups, self._holds(base, each), groups))
            found.append(
                Other("ring", ring_s(cluster, self.tokens, groups), self._holds(base, self.batch, groups), groups)
            )
            if cluster.shape().heads % groups == 0:
                seconds = ulysses_s(cluster, self.tokens, groups)
                found.append(Other("ulysses", seconds, self._holds(base, self.batch, groups), groups))
        elif groups > 1:
            seconds = cluster.alone_s("decode", each, self.tokens)
            found.append(Other("replicas", seconds, self._holds(base, each), groups))
            seconds, holds = (
                keys_divided_s(cluster, self.batch, self.tokens, groups),
                self._holds(base, self.batch, groups),
            )
            found.append(Other("keys divided", seconds, holds, groups))
        if self.kind == "decode":
            each = ceil(self.batch / gpus)
            found.append(
                Other("data parallel", cluster.alone_s("decode", each, self.tokens, 1), self._holds(1, each), gpus)
            )
        return found

    def _weights(self, gpus: int) -> int:
        return self.cluster.model.parameters * ELEMENT_BYTES // gpus

    def _keys(self, gpus: int, batch: int) -> int:
        """Bytes of one of ``gpus`` that share the heads."""
        shape = self.cluster.shape(gpus)
        return batch * self.tokens * shape.layers * shape.kv_heads * 2 * shape.head_dim * ELEMENT_BYTES

    def _holds(self, gpus: int, batch: int, parts: int = 1) -> bool:
        gpu = self.cluster.hardware
        return self._weights(gpus) + self._keys(gpus, batch) / parts + gpu.reserve_bytes <= gpu.memory_bytes
