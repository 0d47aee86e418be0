"""What happened: counters for every attention call and a dated log of what the pool did and why.

Knows numbers and words only; who counts what is decided elsewhere.
"""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

Phase = Literal["prefill", "decode", "training", "backward"]
"""training: forwards of which gradients may be asked; backward: what is asked of them."""


@dataclass
class PhaseCounters:
    """One attention layer in one forward, or in one block of it, is one call."""

    pooled_calls: int = 0
    """Calls of which at least one tile was computed by a pool rank."""
    local_calls: int = 0
    pooled_forwards: int = 0
    """Forwards decided as pooled, whatever became of their calls."""
    overlapped_forwards: int = 0
    """Pooled forwards whose prompt was cut into blocks in flight."""
    predicted_s: float = 0.0
    """Seconds that planned forwards were to take."""
    measured_s: float = 0.0
    """Seconds that the same forwards took."""
    base_s: dict[str, float] = field(default_factory=dict)
    """Seconds of pooled forwards by what the base did: linear, send, attention, wait, merge."""
    local_forwards: int = 0


@dataclass
class RankCounters:
    """One pool rank, by its number in the pool."""

    rank: int
    carrier: str = "inline"
    """What moves large bodies to and from it."""
    calls: int = 0
    stale: int = 0
    faults: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    compute_s: float = 0.0
    """Seconds this rank spent computing, as it measured them."""
    predicted_s: float = 0.0
    """Seconds that the profile predicted for the same tiles; 0 without a profile."""
    kept_calls: int = 0
    """Training calls that it kept whole until their gradients were asked for."""
    unkept_calls: int = 0
    """Those that it was to keep and had no room for."""
    reused_calls: int = 0
    """Requests, for gradients or for the same call once more, that were made of what it had kept."""


@dataclass(frozen=True)
class Event:
    """A change of state or a fault, with its reason."""

    time: str
    kind: str
    reason: str


@dataclass
class Counters:
    """All that ``stats()`` shows."""

    prefill: PhaseCounters = field(default_factory=PhaseCounters)
    decode: PhaseCounters = field(default_factory=PhaseCounters)
    training: PhaseCounters = field(default_factory=PhaseCounters)
    backward: PhaseCounters = field(default_factory=PhaseCounters)
    activations: int = 0
    releases: int = 0
    faults: int = 0
    spot_checks: int = 0
    """Random numbers of answers that were computed once more."""
    spot_check_failures: int = 0
    """Those that were wrong."""
    replays: int = 0
    """Times that keys were computed once more, because their owner was lost."""
    replayed_tokens: int = 0
    """Positions of sequences that were."""
    ranks: dict[int, RankCounters] = field(default_factory=dict)
    events: deque[Event] = field(default_factory=lambda: deque(maxlen=1000))
    local_reasons: dict[str, int] = field(default_factory=dict)
    """Why forwards longer than the threshold were computed locally, and how often."""

    causes: set[str] = field(default_factory=set)
    """What a warning has been given for."""

    not_overlapped_reasons: dict[str, int] = field(default_factory=dict)
    """Why pooled prompts were computed as one block, and how often."""

    def not_overlapped(self, reason: str) -> None:
        """Counts a reason why a pooled prompt was not cut into blocks in flight."""
        self.not_overlapped_reasons[reason] = self.not_overlapped_reasons.get(reason, 0) + 1

    def phase(self, name: Phase) -> PhaseCounters:
        """The counters of one phase."""
        counters: PhaseCounters = getattr(self, name)
        return counters

    def rank(self, rank: int) -> RankCounters:
        """The counters of one pool rank, made on first use."""
        return self.ranks.setdefault(rank, RankCounters(rank))

    def log(self, kind: str, reason: str) -> Event:
        """Adds a dated event; the last thousand are kept."""
        event = Event(datetime.now(UTC).isoformat(timespec="milliseconds"), kind, reason)
        self.events.append(event)
        return event

    def is_new(self, cause: str) -> bool:
        """Whether this is the first time that something is to be warned of."""
        new = cause not in self.causes
        self.causes.add(cause)
        return new

    def stay_local(self, reason: str) -> bool:
        """Counts a reason why a forward longer than the threshold, or a part of it, is computed by the base; whether
        it is new."""
        times = self.local_reasons.get(reason, 0)
        self.local_reasons[reason] = times + 1
        return not times

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: a copy."""
        ranks = [asdict(rank) for _, rank in sorted(self.ranks.items())]
        return {
            "prefill": asdict(self.prefill),
            "decode": asdict(self.decode),
            "training": asdict(self.training),
            "backward": asdict(self.backward),
            "activations": self.activations,
            "releases": self.releases,
            "faults": self.faults,
            "spot_checks": self.spot_checks,
            "spot_check_failures": self.spot_check_failures,
            "replays": self.replays,
            "replayed_tokens": self.replayed_tokens,
            "stale": sum(rank["stale"] for rank in ranks),
            "bytes_sent": sum(rank["bytes_sent"] for rank in ranks),
            "bytes_received": sum(rank["bytes_received"] for rank in ranks),
            "ranks": ranks,
            "local_reasons": dict(self.local_reasons),
            "not_overlapped_reasons": dict(self.not_overlapped_reasons),
            "events": [asdict(event) for event in list(self.events)],
        }
