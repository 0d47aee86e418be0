"""What one kind of GPU takes: tables made from public measurements, for any model's shape.

Attention, products of matrices and all-reduces have steps in them, so they are tables, and interpolated. Beyond them
they are scaled, and :meth:`Hardware.marks` says so. Nothing here knows who computes what, nor of models beyond their
numbers.
"""

from __future__ import annotations

import json
import os
from math import exp, log
from pathlib import Path
from typing import Literal, NamedTuple, Self

from pydantic import Field, ValidationError

from fapool_plugin.plan.attention_table import AttentionTable, Kind, Positive, Table, between
from fapool_plugin.plan.profile import ProfileError

__all__ = ["ELEMENT_BYTES", "Cost", "GemmTable", "Hardware", "Kind", "Link"]

ELEMENT_BYTES = 2
"""Tables are of bf16."""
_MEMORY_USED = 0.8
_LAUNCH_S = 3e-6
"""What aiconfigurator takes for a kernel that only moves bytes: part of the memory's bandwidth, and a launch."""


class Cost(NamedTuple):
    """Seconds of one layer's attention of a batch: ``a`` a call, ``b`` and ``c`` for each sequence."""

    a: float
    b: float
    c: float


class GemmTable(Table):
    """Microseconds of [m, k] x [k, n], by m, n and k."""

    m: list[int]
    n: list[int]
    k: list[int]
    micros: list[list[list[Positive]]]

    def seconds(self, m: float, n: float, k: float) -> float:
        """Between sides in a straight line of logarithms, beyond them in proportion."""
        beyond = 1.0
        weights: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for value, known in ((m, self.m), (n, self.n), (k, self.k)):
            inside = min(max(value, known[0]), known[-1])
            beyond *= max(1.0, value / inside)
            weights = [
                ((*at, index), weight * part) for at, weight in weights for index, part in between(inside, known)
            ]
        logs = sum(weight * log(self.micros[i][j][o]) for (i, j, o), weight in weights)
        return beyond * exp(logs) * 1e-6


class Link(Table):
    """One GPU's way to others: one direction's bytes a second, and what a message takes beside them."""

    bytes_per_s: Positive
    latency_s: float = Field(ge=0)
    source: str


class Hardware(Table):
    """One kind of GPU, with where its numbers are from."""

    version: Literal[1] = 1
    name: str
    device: str
    source: str
    licence: str
    date: str
    measured: list[str]
    extrapolated: list[str]
    errors: dict[str, dict[str, dict[str, float]]] = Field(
        description="Relative differences from measured points that were left out."
    )
    memory_bytes: int = Field(ge=1)
    reserve_bytes: int = Field(ge=0, description="What libraries and the driver take of it.")
    memory_bytes_per_s: Positive
    attention: list[AttentionTable] = Field(min_length=1)
    gemm: GemmTable
    all_reduce: dict[int, list[tuple[Positive, Positive]]] = Field(description="(bytes, seconds), by GPUs.")
    links: dict[str, Link]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file. Raises ProfileError if there is none or it is damaged."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"hardware {os.fspath(path)} cannot be read ({error})") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its text"
            raise ProfileError(f"hardware {os.fspath(path)} is damaged at {where}: {first['msg']}") from None

    def save(self, path: Path) -> None:
        """Writes it, as short as it goes."""
        values = self.model_dump(mode="json", exclude_defaults=True) | {"version": self.version}
        path.write_text(json.dumps(values, separators=(",", ":")) + "\n", encoding="utf-8")

    def attention_s(self, kind: Kind, heads: int, kv_heads: int, head_dim: int, batch: float, tokens: float) -> float:
        """One layer's attention of a batch. A shape without a table is taken from the nearest with as many query heads
        for each KV head if there is one, as so much more or less of a batch; another head dim in proportion."""
        table = self._nearest(heads, kv_heads, head_dim)
        return head_dim / table.head_dim * table.seconds(kind, batch * heads / table.heads, tokens)

    def attention_cost(self, kind: Kind, heads: int, kv_heads: int, head_dim: int, batch: float, tokens: float) -> Cost:
        """The same as a polynomial of the length, through ``tokens`` and half as many."""
        whole, half = (self.attention_s(kind, heads, kv_heads, head_dim, batch, n) for n in (tokens, tokens / 2))
        if kind == "decode":
            call = min(max(0.0, 2 * half - whole), whole)
            return Cost(call, (whole - call) / tokens / batch, 0.0)
        call = min(half, whole, self.attention_s(kind, heads, kv_heads, head_dim, batch, 1))
        square = min(max(0.0, whole + call - 2 * half) * 2, whole - call) / tokens**2
        return Cost(call, (whole - call - square * tokens**2) / tokens / batch, square / batch)

    def marks(self, kind: Kind, heads: int, kv_heads: int, head_dim: int, batch: int, longest: int) -> list[str]:
        """What of such an attention is not in the tables."""
        table, found = self._nearest(heads, kv_heads, head_dim), []
        if table.head_dim != head_dim:
            found.append(f"head dim {head_dim} has no table: scaled from {table.head_dim}")
        if (table.heads, table.kv_heads) != (heads, kv_heads):
            found.append(
                f"{heads} query and {kv_heads} KV heads have no table: scaled from {table.heads} and {table.kv_heads}"
            )
        points = table.points(kind)
        limit, most = points.longest, points.most * table.heads // heads
        if longest > limit:
            found.append(f"{kind} of more than {limit} tokens is extrapolated")
        if batch * longest > most and longest <= limit:
            found.append(
                f"{kind} of more than {most} {'tokens' if kind == 'prefill' else 'keys'} in all is extrapolated"
            )
        return found

    def gemm_s(self, m: float, n: float, k: float) -> float:
        """A product of matrices."""
        return self.gemm.seconds(m, n, k)

    def all_reduce_s(self, gpus: int, nbytes: float) -> float:
        """An all-reduce of so many bytes within a node; 0 for one GPU.

        Raises:
            ValueError: there is no table for so many GPUs.
        """
        if gpus == 1:
            return 0.0
        if gpus not in self.all_reduce:
            raise ValueError(
                f"{self.name} has all-reduces of {', '.join(map(str, self.all_reduce))} GPUs, none of {gpus}; give as "
                "many base ranks"
            )
        sizes, seconds = zip(*self.all_reduce[gpus], strict=True)
        inside = min(max(nbytes, sizes[0]), sizes[-1])
        logs = sum(weight * log(seconds[index]) for index, weight in between(inside, sizes))
        return max(1.0, nbytes / inside) * exp(logs)

    def moving_s(self, nbytes: float) -> float:
        """A kernel that reads and writes so many bytes and computes next to nothing."""
        return _LAUNCH_S + nbytes / (_MEMORY_USED * self.memory_bytes_per_s)

    def _nearest(self, heads: int, kv_heads: int, head_dim: int) -> AttentionTable:
        group = heads // kv_heads
        return min(
            self.attention,
            key=lambda one: (
                abs(log(one.head_dim / head_dim)),
                abs(log(one.heads // one.kv_heads / group)),
                abs(log(one.kv_heads / kv_heads)),
            ),
        )
