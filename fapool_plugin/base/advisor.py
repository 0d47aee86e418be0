"""Asks the forecast, with the profile there is and what is true now, and corrects it by what forwards really take.

Knows seconds and lengths. It decides nothing: its caller does.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from fapool_plugin.base.forward import Forward
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import MIB, FAPoolConfig
from fapool_plugin.devices.gpu import CPU, identity
from fapool_plugin.observe.metrics import Counters, Phase
from fapool_plugin.plan.clocks import Cores, Way
from fapool_plugin.plan.forecast import Choice, auto_threshold, choose_decode, choose_prefill
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import AttentionCost, Profile
from fapool_plugin.plan.shares import MOST_BLOCKS, SHORTEST_BLOCK, Geometry
from fapool_plugin.plan.step import Decode, turns_s

MARGIN = 0.15
"""A pooled forward may take this much longer than the base alone was to take before anybody is warned."""
PARTS = 2
"""Of a training batch in flight: each costs its own small matrices, and two are enough to overlap."""
TRAINING_BLOCKS = 4
"""Of one training row in flight, at most: every block sends the keys of all blocks before it, twice."""
_SHORTEST_ON_GPU = 2048
"""Columns of a block there: shorter ones do not fill it."""
_TURNS_GAIN = 0.95
"""Of a whole step's time: parts in turns must be predicted to take less."""
_STEPS = 16
"""Decode steps are judged together: one is short, and may carry keys for many."""
_WEIGHT = 0.5
"""Of a new measurement against all earlier ones."""
_FORGOTTEN = 0.95
"""Power to which a correction of pooled forwards is raised by each forward that the plan keeps local."""


class Profiler(Protocol):
    """Measures the model at hand; a framework's module has it."""

    def known(self) -> Profile | None:
        """The profile kept for this machine and model, if it holds."""

    def measure(self, rank: PoolRank, start_s: float, activation_s: float) -> Profile:
        """A quick profile, with a leased rank; it is kept for later."""


@dataclass
class _Record:
    """Forwards of one phase and kind since they were last judged."""

    forwards: int = 0
    tokens: int = 0
    predicted_s: float = 0.0
    alone_s: float = 0.0
    measured_s: float = 0.0
    factor: float = 1.0
    """Measured over predicted seconds, lately."""


@dataclass
class Advisor:
    """What is known of one model's costs."""

    config: FAPoolConfig
    counters: Counters
    profile: Profile | None = None
    device: torch.device = CPU
    """Where the base computes, as the last forward showed."""
    _records: dict[tuple[Phase, bool], _Record] = field(default_factory=dict)
    _turns: dict[tuple[object, ...], int] = field(default_factory=dict)
    _steps: dict[tuple[object, ...], Choice] = field(default_factory=dict)

    @property
    def lends_cores(self) -> bool:
        """Whether pool ranks compute on the base's cores. Those of a launch have been given theirs by the launcher, and
        beside a base on a GPU local ones compute on GPUs, too."""
        return self.config.pool == "local" and self.device.type != "cuda"

    def look_at(self, rank: PoolRank) -> None:
        """Says, once, if a leased rank computes on the base's GPU, has less memory for keys than it was to have, or is
        reached by a slower way than it might be."""
        said = []
        if rank.gpu and self.device.type == "cuda" and rank.gpu == identity(self.device):
            said.append(f"pool rank {rank.number} computes on {self.device}, which the base uses: both have less of it")
        if 0 < rank.memory_limit < (self.config.memory_limit_mib or 0) * MIB:
            said.append(
                f"pool rank {rank.number} has {rank.memory_limit // MIB} MiB for keys, not memory_limit_mib = "
                f"{self.config.memory_limit_mib}: its GPU has no more free"
            )
        for text in said:
            if self.counters.is_new(text):
                self.counters.log("device", text)
                warnings.warn(f"fa_pool: {text}", RuntimeWarning, stacklevel=2)
        for text in (f"pool rank {rank.number}: {note}" for note in rank.link.terms.notes):
            if self.counters.is_new(text):
                self.counters.log("carrier", text)
                if rank.link.terms.lost_bytes:
                    warnings.warn(f"fa_pool: {text}", RuntimeWarning, stacklevel=2)

    def cores(self, threads: int) -> Cores:
        """How threads move, if the base has ``threads`` of them without a lease."""
        spare = max(0, len(os.sched_getaffinity(0)) - threads)
        return Cores(threads, self.config.threads_per_rank if self.lends_cores else 0, spare)

    def threads_left(self, threads: int, ranks: int) -> int:
        """The base's own while it uses so many ranks."""
        return self.cores(threads).base(ranks)

    def threshold(self, cores: Cores, longest: int) -> int:
        """``threshold: "auto"``, in tokens; beyond all lengths if attention does not dominate
        up to ``longest``."""
        assert self.profile is not None
        found = auto_threshold(
            self.profile, ranks=self.config.pool_ranks, cores=cores, longest=longest, max_blocks=MOST_BLOCKS
        )
        return sys.maxsize if found.auto is None else found.auto

    @property
    def needs_profile(self) -> bool:
        """Whether plans wait for a profile that is not here yet."""
        return self.profile is None and (self.config.activation == "cost" or self.config.profile is not None)

    def measure(self, profiler: Profiler, rank: PoolRank, start_s: float) -> None:
        """Has a quick profile measured with a leased rank, which took so long to start. Raises LinkLost."""
        began = time.perf_counter()
        rank.open()
        self.profile = profiler.measure(rank, start_s, time.perf_counter() - began)
        self.counters.log("profile", f"a quick profile was measured in {time.perf_counter() - began:.1f} s")

    def choose(self, forward: Forward, ranks: Sequence[PoolRank], overlap: bool) -> Choice | None:
        """The best pooled way for a forward beside the base alone; None without a profile. ``ranks`` are leased."""
        if self.profile is None:
            return None
        assert forward.geometry is not None
        assert forward.sequence is not None
        if not any(row.q_stop > row.q_start for row in forward.geometry.rows):
            return None  # all that is new is padding
        cores = self.cores(torch.get_num_threads())
        if forward.phase != "decode":
            most = max(1, min(self._most_blocks(forward), self._fitting(forward.geometry)))
            return self.prefill(forward.geometry, cores, overlap=overlap, most=most)
        held = [forward.sequence.residency.total(rank.key) for rank in ranks]
        return self.decode(forward.geometry, cores, held or [0] * self.config.pool_ranks)

    def need(self, forward: Forward, choice: Choice | None) -> int:
        """Ranks of a shared pool that a forward can use, or steps after it, by the plan; without a profile, and where
        their memory is wanted, as many as are configured."""
        most = self.config.pool_ranks
        if choice is None or forward.owns_keys or forward.geometry is None:
            return most
        wanted = 0 if forward.phase == "decode" else choice.ranks
        if forward.phase != "training" and forward.lasting:
            cores = self.cores(torch.get_num_threads())
            wanted = max(wanted, self.decode(forward.geometry, cores, [sys.maxsize] * most).ranks)
        return max(1, wanted)

    def blocks(self, forward: Forward, one_block: str | None, choice: Choice | None) -> int:
        """How many pieces of a forward to keep in flight: blocks of a prompt or of a training row, or parts of a
        training batch."""
        if forward.phase == "decode" or self.config.blocks == 1:
            return 1
        if one_block is not None:
            self.counters.not_overlapped(one_block)
            return 1
        assert forward.geometry is not None
        most = self._most_blocks(forward)
        if forward.phase == "training" and len(forward.geometry.starts) > 1:
            return PARTS
        wanted = choice.blocks if choice is not None and not self.config.blocks else most
        return max(1, min(wanted, self._fitting(forward.geometry)))

    def _fitting(self, geometry: Geometry) -> int:
        """Blocks that are long enough. What is asked for is not held against a GPU's needs."""
        shortest = _SHORTEST_ON_GPU if self.device.type == "cuda" and not self.config.blocks else SHORTEST_BLOCK
        return (geometry.columns - geometry.q_column) // shortest

    def _most_blocks(self, forward: Forward) -> int:
        if forward.phase != "training":
            return self.config.blocks or MOST_BLOCKS
        rows = len(forward.geometry.starts) if forward.geometry is not None else 1
        return PARTS if rows > 1 else self.config.blocks or TRAINING_BLOCKS

    def prefill(self, geometry: Geometry, cores: Cores, *, overlap: bool, most: int) -> Choice:
        """The best pooled way for a prompt in at most so many blocks, beside what the base alone would take."""
        assert self.profile is not None
        return self._corrected(
            "prefill",
            choose_prefill(
                self.profile,
                [row for row in geometry.rows if row.keys],
                ranks=self.config.pool_ranks,
                cores=cores,
                max_blocks=most,
                overlap=overlap,
                base_share=self.config.base_share,
                alone=False,
            ),
        )

    def decode(self, geometry: Geometry, cores: Cores, held: Sequence[int]) -> Choice:
        """The best pooled way for a step of one token, with what each rank holds, of all lanes together.
        Asked anew whenever lengths, or what a rank holds of its part, have grown by a block, or when anything else has
        changed."""
        assert self.profile is not None
        block = self.config.kv_block
        rows = _step_of(geometry, 0, len(geometry.starts))
        lanes = len(geometry.starts) * self.profile.shape.kv_heads
        grown = (
            tuple((row.keys // block, row.alike) for row in rows),
            tuple(-(-n * len(held) // (block * lanes)) for n in held),
        )
        key = self.profile, cores, *grown
        if key not in self._steps:
            if len(self._steps) > 64:
                self._steps.clear()
            self._steps[key] = choose_decode(
                self.profile,
                rows,
                resident=held,
                ranks=len(held),
                cores=cores,
                steps=block,
                block=block,
                base_share=self.config.base_share,
                alone=False,
            )
        return self._corrected("decode", self._steps[key])

    def turns(self, geometry: Geometry, ranks: int, base_share: float) -> int:
        """Into how many parts in turns a decode step is cut, if keys have owners: 2 where that is predicted to gain."""
        rows = len(geometry.starts)
        if self.config.turns is not None:
            return min(self.config.turns, rows)
        if self.profile is None or rows < 2 or not ranks:
            return 1
        cores, block = self.cores(torch.get_num_threads()), self.config.kv_block
        key = self.profile, cores, ranks, base_share, tuple((row.keys // block, row.alike) for row in geometry.rows)
        if key not in self._turns:
            if len(self._turns) > 64:
                self._turns.clear()
            way, held = Way(ranks, 1, base_share), [sys.maxsize] * ranks
            whole, *parts = (
                Decode(self.profile, _step_of(geometry, start, stop), cores, held)
                for start, stop in ((0, rows), (0, rows // 2), (rows // 2, rows))
            )
            self._turns[key] = 1 + (turns_s(parts, way) < _TURNS_GAIN * whole.play(way).seconds)
        return self._turns[key]

    def rank_cost(self) -> AttentionCost | None:
        """What attention costs a pool rank."""
        return self.profile.attention_for(self.config.threads_per_rank) if self.profile is not None else None

    def learn(self, forward: Forward, measured_s: float) -> None:
        """Compares a planned forward with what it took; warns where pooling lost, and plans accordingly from now.
        What a forward takes that has fewer ranks than planned, in all or a part of it, is not the plan's."""
        if forward.choice is None or forward.changed:
            return
        pooled = bool(forward.ranks)
        if pooled and len(forward.ranks) < forward.choice.ranks:
            return
        if not pooled and (lost := self._records.get((forward.phase, True))) is not None:
            # Only pooled forwards correct this factor: what disturbed one of them must not rule for ever.
            lost.factor **= _FORGOTTEN
        predicted_s = forward.choice.seconds if pooled else forward.choice.alone_s
        counters = self.counters.phase(forward.phase)
        counters.predicted_s += predicted_s
        counters.measured_s += measured_s
        record = self._records.setdefault((forward.phase, pooled), _Record())
        record.forwards += 1
        record.tokens = forward.geometry.longest if forward.geometry is not None else 0
        record.predicted_s += predicted_s
        record.alone_s += forward.choice.alone_s
        record.measured_s += measured_s
        if forward.phase == "prefill" or record.forwards == _STEPS:
            self._judge(forward.phase, pooled, record)

    def _judge(self, phase: Phase, pooled: bool, record: _Record) -> None:
        # Predictions were corrected already: what is left over corrects the correction.
        factor = record.factor * (record.measured_s / record.predicted_s) ** _WEIGHT
        self._records[phase, pooled] = _Record(factor=factor)
        if pooled and record.measured_s > record.alone_s * (1 + MARGIN):
            text = (
                f"{phase} at {record.tokens} tokens took {record.measured_s:.3g} s with the pool ({record.forwards} "
                f"forward(s)); predicted were {record.predicted_s:.3g} s, and {record.alone_s:.3g} s without. "
                f"The plan now expects {factor:.2f} times what the profile says; `fapool calibrate` measures anew"
            )
            self.counters.log("slow", text)
            warnings.warn(f"fa_pool: {text}", RuntimeWarning, stacklevel=2)

    def _corrected(self, phase: Phase, choice: Choice) -> Choice:
        pooled, alone = (self._records.get((phase, kind), _Record()).factor for kind in (True, False))
        return replace(choice, seconds=choice.seconds * pooled, alone_s=choice.alone_s * alone)


def _step_of(geometry: Geometry, start: int, stop: int) -> list[Row]:
    """One new token of each of these rows."""
    part = replace(geometry, starts=geometry.starts[start:stop], stops=geometry.stops[start:stop])
    return [row._replace(q_start=row.keys - 1) for row in part.rows if row.keys]
