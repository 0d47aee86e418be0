"""What one kind of GPU takes: fits and tables made from public measurements, for any model's shape.

Attention is fitted over lengths for each batch; products of matrices and all-reduces are tables with steps in them, so
they are interpolated. Beyond the tables both are scaled, and :meth:`Hardware.marks` says so. Nothing here knows who
computes what, nor of models beyond their numbers.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from math import exp, log
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fapool_plugin.plan.profile import Fit, ProfileError

ELEMENT_BYTES = 2
"""Tables are of bf16."""
_MEMORY_USED = 0.8
_LAUNCH_S = 3e-6
"""What aiconfigurator takes for a kernel that only moves bytes: part of the memory's bandwidth, and a launch."""

Kind = Literal["prefill", "decode"]
Positive = Annotated[float, Field(gt=0)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cost(NamedTuple):
    """Seconds of one layer's attention of a batch: ``a`` a call, ``b`` and ``c`` for each sequence."""

    a: float
    b: float
    c: float


class AttentionTable(_Table):
    """Fits of one shape over tokens (prefill) or keys (decode), whole batches, by batch."""

    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    prefill: dict[int, Fit] = Field(min_length=1)
    decode: dict[int, Fit] = Field(min_length=1)
    most: dict[Kind, int] = Field(description="Tokens, or keys, of all sequences of the largest point measured.")

    def fit(self, kind: Kind, batch: float) -> Fit:
        """A batch's: coefficients in a straight line between the two batches beside it; more than the largest is
        as much more work, less than the smallest as much less, for the same cost of a call."""
        fits = getattr(self, kind)
        known = sorted(fits)
        inside = min(max(batch, known[0]), known[-1])
        at = bisect_left(known, inside)
        if known[at] == inside:
            near, more = fits[known[at]], batch / inside
            return Fit(a=near.a, b=near.b * more, c=near.c * more)
        low, high = known[at - 1], known[at]
        part = (batch - low) / (high - low)
        return Fit(**{one: (1 - part) * getattr(fits[low], one) + part * getattr(fits[high], one) for one in "abc"})


class GemmTable(_Table):
    """Microseconds of [m, k] x [k, n], by m, n and k."""

    m: list[int]
    n: list[int]
    k: list[int]
    micros: list[list[list[Positive]]]


class Link(_Table):
    """One GPU's way to others: one direction's bytes a second, and what a message takes beside them."""

    bytes_per_s: Positive
    latency_s: float = Field(ge=0)
    source: str


class Hardware(_Table):
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
        description="Relative differences from the tables, of points that were fitted and of those held out."
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

    def attention_cost(self, kind: Kind, heads: int, kv_heads: int, head_dim: int, batch: float) -> Cost:
        """One layer's attention of a batch. A shape without a table is taken from the nearest with as many query heads
        for each KV head if there is one, as so much more or less of a batch."""
        table = self._nearest(heads, kv_heads, head_dim)
        alike = batch * heads / table.heads
        fit, wide = table.fit(kind, alike), head_dim / table.head_dim
        return Cost(fit.a, fit.b * wide / batch, fit.c * wide / batch)

    def marks(self, kind: Kind, heads: int, kv_heads: int, head_dim: int, batch: int, longest: int) -> list[str]:
        """What of such an attention is not in the tables."""
        table, found = self._nearest(heads, kv_heads, head_dim), []
        if table.head_dim != head_dim:
            found.append(f"head dim {head_dim} has no table: scaled from {table.head_dim}")
        if (table.heads, table.kv_heads) != (heads, kv_heads):
            found.append(
                f"{heads} query and {kv_heads} KV heads have no table: scaled from {table.heads} and {table.kv_heads}"
            )
        limit = {"prefill": 16_384, "decode": 131_072}[kind]
        if longest > limit:
            found.append(f"{kind} of more than {limit} tokens is extrapolated")
        most = table.most[kind] * table.heads // heads
        if batch * longest > most and longest <= limit:
            found.append(
                f"{kind} of more than {most} {'tokens' if kind == 'prefill' else 'keys'} in all is extrapolated"
            )
        return found

    def gemm_s(self, m: float, n: float, k: float) -> float:
        """A product of matrices: between the table's sides in a straight line of logarithms, beyond them in
        proportion."""
        table, beyond = self.gemm, 1.0
        weights: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for value, known in ((m, table.m), (n, table.n), (k, table.k)):
            inside = min(max(value, known[0]), known[-1])
            beyond *= max(1.0, value / inside)
            weights = [
                ((*at, index), weight * part) for at, weight in weights for index, part in _between(inside, known)
            ]
        logs = sum(weight * log(table.micros[i][j][o]) for (i, j, o), weight in weights)
        return beyond * exp(logs) * 1e-6

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
        logs = sum(weight * log(seconds[index]) for index, weight in _between(inside, sizes))
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


def _between(value: float, known: Sequence[float]) -> list[tuple[int, float]]:
    """The one or two places of ``known`` beside a value between its ends, with their weights in logarithms."""
    at = bisect_left(known, value)
    if known[at] == value:
        return [(at, 1.0)]
    part = log(value / known[at - 1]) / log(known[at] / known[at - 1])
    return [(at - 1, 1 - part), (at, part)]
