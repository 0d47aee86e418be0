"""The plan that knows seconds: how many ranks, which part for the base and how many blocks make a forward shortest.

Pure functions of a profile, of lengths and of what is resident. The base alone is a candidate like the others. It
does not know tensors, links, or which ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isfinite

from fapool_plugin.plan.clocks import Cores, Played, Prefill, Way
from fapool_plugin.plan.line import GRANULE, Row
from fapool_plugin.plan.profile import Profile
from fapool_plugin.plan.step import Decode

__all__ = [
    "Choice",
    "Cores",
    "Thresholds",
    "auto_threshold",
    "choose_decode",
    "choose_prefill",
    "first_length",
    "moved_bytes",
]

_STEPS = 100
"""The base's share is tried in so many steps."""
SLACK = 0.005
"""More blocks that are predicted to cost no more than this part of the time are taken: while one is late, others are
computed. The clocks know no lateness."""


@dataclass(frozen=True)
class Choice:
    """The best way to compute one forward, and what it is predicted to take."""

    ranks: int
    """Pool ranks used; 0: the base alone."""
    base_share: float
    """Part of the attention work that the base keeps; 1 when it is alone."""
    blocks: int
    """Blocks of the prompt in flight; 1: not overlapped."""
    seconds: float
    """Predicted, the whole forward."""
    alone_s: float
    """Predicted, the base alone with all its threads."""
    ceiling_s: float
    """No number of ranks up to the given one can be faster: no communication, no waiting, no cost of a call."""
    base_busy_s: float
    pool_busy_s: float
    """The busiest pool rank's."""

    @property
    def way(self) -> Way:
        """How the forward is computed."""
        return Way(self.ranks, self.blocks, self.base_share)


def choose_prefill(
    profile: Profile,
    rows: Sequence[Row],
    *,
    ranks: int,
    cores: Cores,
    max_blocks: int,
    overlap: bool = True,
    slowdown: Sequence[float] = (),
    base_share: float | None = None,
    alone: bool = True,
    fewest: int = 1,
) -> Choice:
    """The shortest prefill forward.

    Args:
        profile: measured costs.
        rows: the sequences; keys of the past count as not yet sent.
        ranks: pool ranks that may be used, in this order.
        cores: how threads move.
        max_blocks: blocks that may be in flight; fewer where they would be shorter than 64 positions.
        overlap: False allows one block only.
        slowdown: measured over predicted seconds of each rank (default 1); a slower rank gets a smaller share.
        base_share: the base's part, in [0, 1); None tries all in hundredths.
        alone: whether the base alone may be the answer; with ``ranks`` 0 it always is.
        fewest: pool ranks that are used at least, if any are.

    Raises:
        ValueError: the arguments describe no forward.
    """
    _check(rows, ranks, slowdown, base_share)
    if max_blocks < 1:
        raise ValueError(f"max_blocks is {max_blocks}; give at least 1")
    prefill = Prefill(profile, rows, cores, slowdown)
    counts = prefill.block_counts(max_blocks if overlap else 1)
    return _best(prefill, range(fewest, ranks + 1), counts, base_share, alone)


def choose_decode(
    profile: Profile,
    rows: Sequence[Row],
    *,
    ranks: int,
    cores: Cores,
    resident: Sequence[int],
    steps: int = 1,
    block: int = 1,
    slowdown: Sequence[float] = (),
    base_share: float | None = None,
    alone: bool = True,
    fewest: int = 1,
) -> Choice:
    """The shortest decode step of one new token a sequence.

    A rank works on keys it holds. What its share lacks is sent, once for ``steps`` steps, and only if that pays; the
    rest, the newest keys among it, is the base's.

    Args:
        rows: the sequences, each with one new token.
        resident: keys that each rank holds, of all lanes together.
        steps: steps for which the choice will be kept; ``seconds`` are one step's, with its part of what is sent.
        block: keys of a lane that a rank takes or leaves as one: shares are tried in such steps.

    The other arguments and errors are :func:`choose_prefill`'s.
    """
    _check(rows, ranks, slowdown, base_share)
    if steps < 1 or block < 1:
        raise ValueError(f"steps is {steps} and block {block}; give at least 1 of each")
    if any(row.q_stop - row.q_start != 1 for row in rows):
        raise ValueError("a decode step has one new token for each sequence; give rows with q_start = q_stop - 1")
    if len(resident) < ranks:
        raise ValueError(f"resident has {len(resident)} entries; give one for each of {ranks} ranks")
    step = Decode(profile, rows, cores, resident, steps, slowdown)
    finest = max(row.keys for row in rows) // block
    steps_tried = min(_STEPS, finest) if finest else 1
    return _best(step, range(fewest, ranks + 1), [1], base_share, alone, steps_tried)


def moved_bytes(profile: Profile, rows: Sequence[Row], cores: Cores, choice: Choice) -> tuple[int, int]:
    """Bytes of payloads to and from all ranks, of all layers, in a prefill computed so."""
    return Prefill(profile, rows, cores).real_bytes(choice.way) if choice.ranks else (0, 0)


@dataclass(frozen=True)
class Thresholds:
    """Lengths of one sequence, in tokens, from which pooling its prefill pays; None: never up to the longest."""

    auto: int | None
    """Attention_Time(t) > FFN_Time(t) + Overhead(t), the base's with all its threads; Overhead is what messages of
    the best pooled way and one activation take."""
    crossing: int | None
    """The best pooled way is predicted to be faster than the base alone."""


def auto_threshold(profile: Profile, *, ranks: int, cores: Cores, longest: int, max_blocks: int) -> Thresholds:
    """Both thresholds, in multiples of 64 up to ``longest``.

    Raises:
        ValueError: there is no pool rank, or ``longest`` is below 64.
    """
    if ranks < 1 or longest < GRANULE:
        raise ValueError(f"{ranks} pool ranks and lengths up to {longest}; give at least 1 and {GRANULE}")

    def pooled(length: int) -> Choice:
        return choose_prefill(
            profile, [Row(0, length, length)], ranks=ranks, cores=cores, max_blocks=max_blocks, alone=False
        )

    def attention_rules(length: int) -> bool:
        choice, link = pooled(length), profile.link
        messages = profile.shape.layers * choice.blocks * choice.ranks
        overhead = messages * (link.to_rank.a + link.to_base.a) + profile.activation_s
        sent, received = moved_bytes(profile, [Row(0, length, length)], cores, choice)
        overhead += link.to_rank.b * sent + link.to_base.b * received
        linear = profile.linear_for(cores.total).prefill.at(length)
        return choice.alone_s - linear > linear + overhead

    def pooling_wins(length: int) -> bool:
        choice = pooled(length)
        return choice.seconds < choice.alone_s

    return Thresholds(first_length(attention_rules, longest), first_length(pooling_wins, longest))


def first_length(holds: Callable[[int], bool], longest: int) -> int | None:
    """The smallest multiple of 64 from which ``holds``, by steps that grow and then by halving the last."""
    last, below, above = longest // GRANULE, 0, 1
    while not holds(above * GRANULE):
        if above == last:
            return None
        below, above = above, min(last, above + max(1, above // 2))
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if holds(middle * GRANULE) else (middle, above)
    return above * GRANULE


def _best(
    forward: Prefill | Decode,
    ranks: Sequence[int],
    counts: Sequence[int],
    base_share: float | None,
    alone: bool,
    steps: int = _STEPS,
) -> Choice:
    """The shortest way; of equally short ones that with fewest ranks, and of nearly as short ones most blocks."""
    shares = [step / steps for step in range(steps)] if base_share is None else [base_share]
    ways = [Way(p, c, x) for p in ranks for c in counts for x in shares]
    best, played = Way(0, 1, 1.0), Played(forward.alone_s, forward.alone_s, 0.0)
    if ways and not alone:
        best, played = ways[0], forward.play(ways[0])
    # The most promising first: what is bound to take longer than the best found need not be played.
    for bound, way in sorted((forward.bound_s(way), way) for way in ways):
        if bound > played.seconds:
            break
        trial = forward.play(way)
        if (trial.seconds, way.ranks) < (played.seconds, best.ranks):
            best, played = way, trial
    limit = min(played.seconds * (1 + SLACK), forward.alone_s if alone else inf)
    for way in ways:
        if way.ranks == best.ranks and way.blocks > best.blocks and forward.bound_s(way) <= limit:
            trial = forward.play(way)
            if trial.seconds <= limit:
                best, played = way, trial
    return Choice(
        ranks=best.ranks,
        base_share=best.base_share,
        blocks=best.blocks,
        seconds=played.seconds,
        alone_s=forward.alone_s,
        ceiling_s=min(forward.ceiling_s(p) for p in (0, *ranks)),
        base_busy_s=played.base_busy_s,
        pool_busy_s=played.pool_busy_s,
    )


def _check(rows: Sequence[Row], ranks: int, slowdown: Sequence[float], base_share: float | None) -> None:
    """Refuses what describes no forward, with the numbers and the remedy."""
    for row in rows:
        if not 0 <= row.q_start <= row.q_stop <= row.keys or row.keys < 1 or row.alike < 1:
            raise ValueError(
                f"{row.alike} sequence(s) of {row.keys} keys have queries [{row.q_start}, {row.q_stop}); give 1 key or "
                "more, and 0 <= q_start <= q_stop <= keys"
            )
    if not any(row.q_start < row.q_stop for row in rows):
        raise ValueError(f"{len(rows)} run(s) of sequences without a new token; a forward has new tokens")
    if ranks < 0:
        raise ValueError(f"ranks is {ranks}; give 0 or more")
    if not all(isfinite(factor) and factor > 0 for factor in slowdown):
        raise ValueError(f"slowdown is {list(slowdown)}; give each rank a finite factor above 0")
    if base_share is not None and not 0 <= base_share < 1:
        raise ValueError(f"base_share is {base_share}; give at least 0 and less than 1, or None")
