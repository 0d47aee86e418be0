"""What work costs in seconds: measured numbers of one machine and one model, and what follows from them.

A profile holds fits, of a curve that has steps its points too, and never a number from the source code. It does not
know who computes what: that is the plan's. How the numbers are measured is not known here either.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import combinations, pairwise
from math import inf
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fapool_plugin.plan.line import Tile, allowed_pairs

PROFILE_VERSION = 2
ADAPTERS = 0.05
"""A model may have so much more or fewer parameters than the one measured: adapters change little of what it costs."""


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the file, what is wrong with it, and the remedy."""


class _Measured(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _version_in(text: str) -> Any:
    """The version that a profile's text claims; None if it claims none."""
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values.get("version") if isinstance(values, dict) else None


class Fit(_Measured):
    """``seconds = a + b * n + c * n * n``, by least squares of relative errors over measured points.

    Where the curve has steps the points are kept, and straight lines go between them.
    """

    a: float = Field(default=0.0, ge=0)
    b: float = Field(default=0.0, ge=0)
    c: float = Field(default=0.0, ge=0)
    error: float = Field(default=0.0, ge=0, description="Largest relative error over the points it was fitted to.")
    spread: float = Field(default=0.0, ge=0, description="Largest (max - min) / median over the repeats of one point.")
    points: tuple[tuple[float, float], ...] = Field(default=(), description="(n, seconds) by growing n; or none.")

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if any(seconds <= 0 for _, seconds in self.points) or any(a[0] >= b[0] for a, b in pairwise(self.points)):
            raise ValueError("points must be of growing n, and of seconds above 0")
        return self

    def at(self, n: float) -> float:
        """Seconds at ``n``."""
        for (n_0, s_0), (n_1, s_1) in pairwise(self.points):
            if n_0 <= n <= n_1:
                return s_0 + (s_1 - s_0) * (n - n_0) / (n_1 - n_0)
        return self.a + n * (self.b + n * self.c)


class AttentionCost(_Measured):
    """One kernel with one dtype and number of threads, for the heads of the profiled model.

    ``prefill`` is in the length n of one causal sequence, all lanes of one layer; ``decode`` in the keys that one
    query per lane sees, all lanes of one layer.
    """

    kernel: str
    dtype: str
    threads: int = Field(ge=1)
    prefill: Fit
    decode: Fit


class LinearCost(_Measured):
    """The model without attention (projections, FFN, norms, embedding, and the head for one position a sequence) with
    one number of threads. ``prefill`` is in tokens of one forward, ``decode`` in sequences of one step."""

    threads: int = Field(ge=1)
    prefill: Fit
    decode: Fit


class LinkCost(_Measured):
    """One link, all fits in bytes of a message.

    ``to_rank`` and ``to_base`` are seconds on the way, copies at both ends included. ``send`` and ``take`` are
    processor seconds of the end that a message leaves and of the end where it arrives, in whichever threads: where all
    cores compute, a call waits for them.
    """

    to_rank: Fit
    to_base: Fit
    send: Fit = Fit()
    take: Fit = Fit()


class CallCost(_Measured):
    """What one pooled attention call costs beside kernels and bytes, in seconds."""

    ask_s: float = Field(default=0.0, ge=0, description="The base, for each rank that it asks.")
    merge_s: float = Field(default=0.0, ge=0, description="The base, for each answer.")
    own_s: float = Field(default=0.0, ge=0, description="The base, for its own tiles.")
    rank_s: float = Field(default=0.0, ge=0, description="A pool rank.")
    away_s: float = Field(default=0.0, ge=0, description="On the way, beyond what messages in a row take.")


class Machine(_Measured):
    """Where a profile holds."""

    processor: str
    cores: int = Field(ge=1)
    torch: str
    fapool: str


class Shape(_Measured):
    """What of a model its costs depend on; ``layers`` counts attention layers that are pooled."""

    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    v_head_dim: int = Field(ge=1)
    dtype: str
    parameters: int = Field(ge=1)

    @property
    def element_bytes(self) -> int:
        """Bytes of one number on the wire and in a cache."""
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)


class Profile(_Measured):
    """Measured numbers of one machine with one model."""

    version: int = PROFILE_VERSION
    date: str
    quick: bool = Field(description="Taken in a few seconds at the first activation, not by a calibration.")
    machine: Machine
    shape: Shape
    attention: tuple[AttentionCost, ...] = Field(min_length=1)
    linear: tuple[LinearCost, ...] = Field(min_length=1)
    link: LinkCost
    call: CallCost = CallCost()
    beside: float = Field(
        default=1.0,
        ge=1,
        description="How much longer the linear part takes while a pool rank of this machine computes.",
    )
    on_devices: bool = Field(
        default=False,
        description="Base and ranks compute on GPUs of their own: no threads move, and messages are copied beside what "
        "is computed.",
    )
    activation_s: float = Field(ge=0, description="Seconds from wanting ranks that run already to having them.")
    start_s: float = Field(default=0.0, ge=0, description="Seconds to start local pool ranks the first time.")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a profile. Raises ProfileError if there is none or it is damaged."""
        remedy = "measure it again: fapool calibrate --out FILE"
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProfileError(f"profile {os.fspath(path)} cannot be read ({error}); {remedy}") from None
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            version = _version_in(text)
            if version not in (None, PROFILE_VERSION):
                what = f"has version {version}, this is version {PROFILE_VERSION}"
            else:
                first = error.errors()[0]
                what = f"is damaged at {'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}"
            raise ProfileError(f"profile {os.fspath(path)} {what}; {remedy}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON; a reader never sees half of it."""
        target = Path(path)
        draft = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n", encoding="utf-8")
        draft.replace(target)

    def misfit(self, machine: Machine, shape: Shape) -> str | None:
        """Why it does not hold on this machine or for this model; None if it does."""
        if self.version != PROFILE_VERSION:
            return f"it has version {self.version}, this is version {PROFILE_VERSION}"
        pairs: list[tuple[str, Any, Any]] = []
        for mine, theirs in ((self.machine, machine), (self.shape, shape)):
            pairs += [(name, value, getattr(theirs, name)) for name, value in mine]
        different = [f"{name} was {was}, is {now}" for name, was, now in pairs if was != now and name != "parameters"]
        was, now = self.shape.parameters, shape.parameters
        if abs(was - now) > ADAPTERS * was:
            different.append(f"parameters was {was}, is {now}")
        return "; ".join(different) or None

    @property
    def spread(self) -> float:
        """How much repeats of one measurement differed at most, attention's and the linear part's: a large value says
        that something else was running."""
        costs: list[AttentionCost | LinearCost] = [*self.attention, *self.linear]
        return max(max(cost.prefill.spread, cost.decode.spread) for cost in costs)

    def attention_for(self, threads: int, kernel: str | None = None) -> AttentionCost:
        """Costs with ``threads`` threads, or the nearest number measured; the fastest kernel if none is named."""
        able = [cost for cost in self.attention if cost.dtype == self.shape.dtype and kernel in (None, cost.kernel)]
        if not able:
            raise ProfileError(f"the profile has no attention measured with {kernel} and {self.shape.dtype}")
        near = min(abs(cost.threads - threads) for cost in able)
        return min((c for c in able if abs(c.threads - threads) == near), key=lambda c: c.prefill.at(4096))

    def linear_for(self, threads: int) -> LinearCost:
        """Costs with ``threads`` threads, or the nearest number measured."""
        return min(self.linear, key=lambda cost: abs(cost.threads - threads))


def share_s(cost: AttentionCost, kv_heads: int, tiles: Iterable[Tile]) -> float:
    """Seconds that one layer's ``tiles`` take with this kernel, causal.

    A square of n positions and all lanes has n * (n + 1) / 2 pairs a lane, so a fit A + B n + C n^2 gives seconds
    per call, per row and per pair. A tile is one call, whatever its rows. A tile of one query is a decode tile: its
    cost goes with the keys it reads.
    """
    seconds = 0.0
    for tile in tiles:
        queries, lanes = tile.q_stop - tile.q_start, tile.lanes
        if queries == 1:
            fit, keys = cost.decode, tile.k_stop - tile.k_start
            seconds += fit.a + (fit.b + fit.c * keys) * keys * lanes / kv_heads
        else:
            fit = cost.prefill
            pairs = allowed_pairs(tile) / kv_heads
            seconds += fit.a + (fit.b - fit.c) * queries * lanes / kv_heads + 2 * fit.c * pairs
    return seconds


def least_squares(points: Sequence[tuple[float, float]], powers: Sequence[int] = (0, 1, 2)) -> Fit:
    """Fits seconds over n with non-negative coefficients, by relative error, so that short runs count too.

    Non-negative least squares (Lawson and Hanson 1974). With at most three coefficients every choice of those that
    are 0 is tried, each solved in fractions: floats lose the small coefficients beside fourth powers of n.

    Args:
        points: (n, median seconds), all above 0.
        powers: which of A, B, C may be other than 0.

    Raises:
        ValueError: there are fewer different n than coefficients, or a point that is not above 0.
    """
    if not points or not all(0 < value < inf for point in points for value in point):
        raise ValueError(f"cannot fit {list(points)}: measure at least one point; give n > 0 and seconds > 0")
    different = len({n for n, _ in points})
    if different < len(powers):
        raise ValueError(
            f"{len(powers)} coefficients cannot be fitted to {different} different n: measure more, or fit fewer powers"
        )
    fits = []
    for count in range(1, len(powers) + 1):
        for kept in combinations(powers, count):
            # One equation a point, sum of c_p n^p / seconds = 1, so that what is squared are relative errors.
            rows = [[Fraction(n) ** power * Fraction(1 / seconds) for power in kept] for n, seconds in points]
            solved = _solve_normal(rows)
            if min(solved) >= 0:
                loss = sum((sum(x * c for x, c in zip(row, solved, strict=True)) - 1) ** 2 for row in rows)
                fits.append((loss, dict(zip(kept, map(float, solved), strict=True))))
    _, best = min(fits, key=lambda fit: fit[0])
    fit = Fit(a=best.get(0, 0.0), b=best.get(1, 0.0), c=best.get(2, 0.0), error=0.0, spread=0.0)
    return fit.model_copy(update={"error": max(abs(fit.at(n) - seconds) / seconds for n, seconds in points)})


def _solve_normal(rows: Sequence[Sequence[Fraction]]) -> list[Fraction]:
    """The x for which the squares of ``rows @ x - 1`` have the least sum; exact. The columns are independent."""
    size = len(rows[0])
    left = [[sum((row[i] * row[j] for row in rows), Fraction()) for j in range(size)] for i in range(size)]
    right = [sum((row[i] for row in rows), Fraction()) for i in range(size)]
    for at in range(size):  # Gauss and Jordan; such a matrix is positive definite, so no pivot is 0
        for other in range(size):
            if other != at:
                factor = left[other][at] / left[at][at]
                left[other] = [x - factor * y for x, y in zip(left[other], left[at], strict=True)]
                right[other] -= factor * right[at]
    return [right[at] / left[at][at] for at in range(size)]
