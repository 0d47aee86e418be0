"""What was decided for one forward, and the plans that follow from it, layer by layer and block by block.

Decided once, before any mask is built; ranks that are lost or join on the way change shares only. Who decides, and who
computes, is not known here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.clock import Moment
from fapool_plugin.observe.metrics import Counters, Phase
from fapool_plugin.plan.forecast import Choice
from fapool_plugin.plan.profile import AttentionCost
from fapool_plugin.plan.shares import Geometry, Plan, make_plan, shortened, speeds


def stay_local(forward: Forward, reason: str, threshold: int, columns: int, look: Callable[[], Geometry | str]) -> None:
    """Counts why a forward of ``columns`` is local; ``look`` is asked whether it is more than padding that is long.

    In training, where the pool would stand idle for all of it, a new reason is a RuntimeWarning, too.

    Raises:
        ValueError: the configuration is strict. Nothing has been computed then.
    """
    if forward.config.strict:
        seen = look()
        tokens = columns if isinstance(seen, str) else seen.longest + columns - seen.columns
        if tokens > threshold:
            raise refusal(reason, tokens, threshold)
    if forward.counters.stay_local(reason) and forward.phase == "training":
        warnings.warn(f"fa_pool: training is not pooled: {reason}", RuntimeWarning, stacklevel=2)


def looked_at(
    forward: Forward, threshold: int, columns: int, look: Callable[[], Geometry | str], sequence: SequenceState,
    must_be_local: str | None,
) -> tuple[int, Geometry | None]:  # fmt: skip
    """(length without padding, with what of the prompt is to come; where its tokens lie) of a forward of ``columns``.
    At or under ``threshold`` nothing is looked at; without a geometry it is local. Raises ValueError as
    :func:`stay_local` does."""
    if columns <= threshold:
        return columns, None
    seen = must_be_local or look()
    if isinstance(seen, str):
        stay_local(forward, seen, threshold, columns, look)
        return columns, None
    return seen.longest + max(0, sequence.prompt_columns - seen.columns), seen


def own_share(choice: Choice | None, asked: float | None, base_ranks: int, ranks: int) -> float | None:
    """The base's part, the plan's if there is one. Else, if none is asked for, as much as any other's (None), of whom
    several base ranks may ask at a time."""
    if choice is not None:
        return choice.base_share
    return asked if asked is not None or base_ranks == 1 else base_ranks / (base_ranks + ranks)


def refusal(reason: str, tokens: int, threshold: int) -> ValueError:
    """What a strict configuration has to say of a forward that would be local."""
    return ValueError(
        f"fa_pool is strict, and this forward of {tokens} tokens, above threshold {threshold}, would be computed "
        f"locally: {reason}. Mend that, raise threshold to {tokens}, or set strict to false"
    )


class CannotPool(Exception):
    """It is found on the way that a forward cannot be pooled exactly: all of it has to be computed otherwise.

    Args:
        reason: why.
        ever: whether no other forward of the model can, either.
    """

    def __init__(self, reason: str, *, ever: bool = True) -> None:
        super().__init__(reason)
        self.ever = ever


class Misjudged(Exception):
    """It is found on the way that a forward is to be decided anew: layers of it will run a second time, in backward.

    Args:
        reason: what shows it.
        gradients: it is one of training instead, though neither its parameters nor its tokens want gradients.
    """

    def __init__(self, reason: str, *, gradients: bool = False) -> None:
        super().__init__(reason)
        self.gradients = gradients


class StaysHome(Exception):
    """A layer's keys cannot live on the pool: attention is given others than are cached, or the model reads them."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"the model reads the keys of layer {layer}, or gives its attention others than are cached")
        self.layer = layer


class _Keeper:
    """Lives in a graph."""


@dataclass
class Forward:
    """One forward of a model."""

    config: FAPoolConfig
    counters: Counters
    phase: Phase
    pooled: bool = False
    geometry: Geometry | None = None
    sequence: SequenceState | None = None
    ranks: tuple[PoolRank, ...] = ()
    joined: list[PoolRank] = field(default_factory=list)
    """Those that came after it had begun, the same list in all its blocks."""
    lasting: bool = True
    """False: no cache outlives this forward, so nothing stays resident."""
    choice: Choice | None = None
    """What the forecast said, if it was asked."""
    rank_cost: AttentionCost | None = None
    """What attention costs a pool rank, if there is a profile."""
    began: Moment | None = None
    took: tuple[Moment, Moment] | None = None
    """When the planned part of it began and ended, where that is less than all of it."""
    apart_s: float = 0.0
    """Seconds in it that are not its own: of a trial."""
    base_share: float | None = None
    """The base's part of the attention work; None: as much as any other rank."""
    blocks: int = 1
    """Blocks of the prompt to keep in flight."""
    turns: int = 1
    """Parts of its rows, in a decode step whose keys have owners."""
    keeper: object = None
    """In training: what the graph holds, and with it the lease."""
    whole: Geometry | None = None
    """The prompt's, if this is one block of it."""
    first_row: int = 0
    """Where its rows begin in the batch, if this is one part of it."""
    hand_over: Callable[[], None] | None = None
    """Lets the other blocks go on, between asking and waiting for the answers."""
    notes: dict[str, bool] = field(default_factory=dict)
    """Why calls of it were local; true: to be counted even if other calls were pooled."""
    before: tuple[int, int] = (0, 0)
    """Pooled calls of its phase and local reasons, when it began."""
    abandoned: bool = False
    """Whether it was found that it cannot be pooled, before any of its layers ran."""
    _plans: dict[tuple[int, tuple[int, ...]], Plan] = field(default_factory=dict)

    @property
    def is_pooled(self) -> bool:
        """Whether its attention is ours."""
        return self.pooled and not self.abandoned

    @property
    def owns_keys(self) -> bool:
        """Whether its keys go to owners, if it is pooled."""
        return self.sequence is not None and self.sequence.ownable and self.lasting and self.phase != "training"

    @property
    def begins(self) -> bool:
        """Whether nothing of its sequence has been computed yet."""
        past = self.geometry is not None and self.geometry.q_column
        return not past and self.sequence is not None and not self.sequence.again

    @property
    def changed(self) -> bool:
        """Whether ranks were lost or joined on the way."""
        return bool(self.joined) or any(rank.lost for rank in self.ranks)

    @property
    def room(self) -> int:
        """How many ranks may join it: a prompt has as many as it was planned with."""
        if self.phase != "prefill" or not self.ranks or self.owns_keys:
            return 0
        wanted = self.choice.ranks if self.choice is not None else self.config.pool_ranks
        return wanted - sum(not rank.lost for rank in (*self.ranks, *self.joined))

    @property
    def may_be_alone(self) -> bool:
        """Whether it is computed without ranks where that is predicted to be faster: not if its keys may be more than
        the base can hold."""
        return self.config.activation == "cost" and not self.owns_keys

    def note(self, reason: str, serious: bool) -> None:
        """Remembers why a call is local."""
        self.notes[reason] = serious or self.notes.get(reason, False)

    def count_notes(self) -> None:
        """At its end: a forward above the threshold was pooled, or a reason is counted."""
        pooled_calls, reasons = self.before
        pooled = self.counters.phase(self.phase).pooled_calls > pooled_calls
        for reason, serious in self.notes.items():
            if serious or not pooled:
                self.counters.stay_local(reason)
        if not pooled and sum(self.counters.local_reasons.values()) == reasons:
            lost = any(rank.lost for rank in self.ranks)
            self.counters.stay_local("pool ranks were lost" if lost else "no attention layer could use a pool rank")

    def abandon(self, reason: str) -> None:
        """It cannot be pooled exactly, and is local from here on.

        Raises:
            CannotPool: this is a block of it.
            ValueError: the configuration is strict.
        """
        if self.hand_over is not None:
            raise CannotPool(reason)
        if self.config.strict:
            tokens = self.geometry.longest if self.geometry is not None else 0
            raise ValueError(
                f"fa_pool is strict, and this forward of {tokens} tokens would be computed locally: {reason}. "
                f"Raise threshold to {tokens}, or set strict to false"
            )
        self.abandoned = True
        self.note(reason, True)

    @property
    def keeps_calls(self) -> bool:
        """Whether pool ranks are to keep its calls until their gradients are asked for."""
        return self.phase == "training" and self.config.training_residency

    def block(self, start: int, stop: int, hand_over: Callable[[], None]) -> Forward:
        """The columns [start, stop) of this forward as one block in flight."""
        assert self.geometry is not None
        part = self.geometry.block(start, stop)
        return replace(self, geometry=part, whole=self.geometry, hand_over=hand_over, blocks=1, _plans={})

    def in_graph(self, watch: Callable[[object, SequenceState], object]) -> Forward:
        """This forward in training: its sequence, and with it the lease, last as long as anything of the graph."""
        assert self.sequence is not None
        keeper = _Keeper()
        watch(keeper, self.sequence)
        return replace(self, keeper=keeper, choice=None)

    def part(self, start: int, stop: int, hand_over: Callable[[], None]) -> Forward:
        """The rows [start, stop) of this forward as one of several parts in flight."""
        assert self.geometry is not None
        rows = replace(self.geometry, starts=self.geometry.starts[start:stop], stops=self.geometry.stops[start:stop])
        return replace(self, geometry=rows, first_row=start, hand_over=hand_over, blocks=1, _plans={})

    def plan(self, kv_heads: int, bytes_per_position: int, layers: int) -> Plan:
        """The plan for layers with so many KV heads, over the ranks that are left. A share whose keys would not fit
        a pool rank's memory goes to the base."""
        ranks = tuple(rank for rank in (*self.ranks, *self.joined) if not rank.lost)
        key = kv_heads, tuple(rank.key for rank in ranks)
        if key not in self._plans:
            self._plans[key] = self._plan(ranks, kv_heads, bytes_per_position * layers)
        return self._plans[key]

    def _plan(self, ranks: tuple[PoolRank, ...], kv_heads: int, bytes_per_position: int) -> Plan:
        assert self.geometry is not None
        line = now = tuple(speeds(len(ranks), self.base_share))
        few, prompt, state = self.config.kv_block, None, self.sequence
        if self.phase == "training":
            few = 0
        if self.whole is not None:
            few, prompt = 0, tuple(self.whole.rows)
        elif state is not None and self.phase == "decode" and len(state.line) == len(line):
            # The rank that holds a lane's keys goes on with them, whatever its part is now.
            line, prompt = state.line, state.prompt
        plan = make_plan(self.geometry, kv_heads, line, mode=self.config.partition, few_queries=few, prompt=prompt)
        if plan.axis == "keys":
            plan = shortened(plan, (1 - now[-1]) / (1 - line[-1]) if line[-1] < 1 else 1.0, few)
        elif state is not None:
            state.line, state.prompt = line, prompt or tuple(self.geometry.rows)
        shares, base = list(plan.shares), list(plan.base)
        for index, rank in enumerate(ranks):
            reason = self._too_large(rank, plan.positions_held(index, 0, self.config.kv_block) * bytes_per_position)
            need = self._positions_to_come(plan, index) * bytes_per_position
            if not reason and self.sequence is not None and need > rank.memory_limit:
                # Room for all that may come is given up first.
                self.sequence.capacity = 0
            if reason:
                base.extend(shares[index])
                shares[index] = ()
                if self.counters.stay_local(reason):
                    self.counters.log("memory", reason)
        return replace(plan, ranks=ranks, shares=tuple(shares), base=tuple(base))

    def _positions_to_come(self, plan: Plan, index: int) -> int:
        capacity = self.sequence.capacity if self.sequence is not None else 0
        return plan.positions_held(index, capacity, self.config.kv_block)

    def _too_large(self, rank: PoolRank, need: int) -> str | None:
        """Why a share's keys do not fit its rank, if so."""
        if self.sequence is not None and rank.key in self.sequence.full:
            return f"pool rank {rank.number} could not store the keys it was sent: raise memory_limit_mib"
        if need <= rank.memory_limit:
            return None
        return (
            f"pool rank {rank.number}'s share would need {need / 2**20:.0f} MiB of KV memory, it has "
            f"{rank.memory_limit / 2**20:.0f}: raise memory_limit_mib or pool_ranks"
        )
