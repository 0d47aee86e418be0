"""How long a prompt may wait for ranks that other jobs have: as long as ranks have gained of late.

    seconds a pair of prompts without ranks ── less ── those of prompts with ranks ── times this prompt's pairs

So a prompt that waits in vain takes less than twice as long as without ranks, and one that gets ranks is no later than
without. A job that has had ranks for each of its prompts does not know what they gain: it waits as long as one with
ranks takes, which is less than twice as long, too, where ranks gain anything. Knows prompts and seconds; not ranks.
"""

from __future__ import annotations

from fapool_plugin.base.forward import Forward
from fapool_plugin.plan.shares import Geometry

_WEIGHT = 0.5
"""Of the newest prompt among those of its way."""


class Patience:
    """Of one model."""

    def __init__(self) -> None:
        self._per_pair: dict[bool, float] = {}
        """Seconds for each (query, key) pair of a head, with ranks and without."""

    def learn(self, forward: Forward, seconds: float) -> None:
        """What a prompt took. One whose ranks changed says nothing."""
        pairs = _pairs(forward.geometry)
        if forward.phase == "prefill" and pairs and not forward.changed:
            pooled, now = bool(forward.ranks), seconds / pairs
            self._per_pair[pooled] = _WEIGHT * now + (1.0 - _WEIGHT) * self._per_pair.get(pooled, now)

    def seconds(self, forward: Forward) -> float:
        """For how long this one may wait."""
        pooled, local = self._per_pair.get(True), self._per_pair.get(False)
        if forward.phase != "prefill" or pooled is None:
            return 0.0
        return max(0.0, pooled if local is None else local - pooled) * _pairs(forward.geometry)


def _pairs(geometry: Geometry | None) -> int:
    return sum(row.pairs * row.alike for row in geometry.rows) if geometry is not None else 0
