"""Watches the length of every forward, borrows pool ranks above the threshold and gives them back below it.

Decides pooled or local once per forward, and when the lease is wanted no more. It does not know models, nor where pool
ranks come from: a pool is given to it.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any

import torch

from fapool_plugin.base.advisor import Advisor, Profiler
from fapool_plugin.base.agreement import Agree, unasked
from fapool_plugin.base.durations import Durations
from fapool_plugin.base.forward import Forward, looked_at, own_share, refusal
from fapool_plugin.base.lease import Pool, PoolRank
from fapool_plugin.base.leases import Leases, State
from fapool_plugin.base.owned import Batches, names
from fapool_plugin.base.patience import Patience
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.base.spot_check import SpotCheck
from fapool_plugin.base.threads import SharedThreads
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.clock import Clock
from fapool_plugin.devices.copies import Copies
from fapool_plugin.devices.gpu import CPU, is_capturing
from fapool_plugin.observe.metrics import Counters, Phase
from fapool_plugin.observe.timeline import Timeline
from fapool_plugin.plan.forecast import Choice
from fapool_plugin.plan.shares import Geometry

_LOCAL, _ALONE, _POOLED = range(3)
"""As the model does without the plugin; our attention on the base; pool ranks, too."""


class ResourceManager:
    """The plugin's handle on one model: ``model.fa_pool``. A context manager; closes itself at interpreter exit. Copies
    and pickles carry the configuration only: a copy has its own pool, started when it needs one."""

    def __init__(
        self,
        config: FAPoolConfig,
        make_pool: Callable[[FAPoolConfig], Pool],
        agree: Agree | None = None,
        base_ranks: int = 1,
    ) -> None:
        self.config, self._agree = config, agree or unasked
        self.base_ranks = base_ranks  # that share one model, and so use every pool rank at the same time
        self.threshold = config.threshold if isinstance(config.threshold, int) else sys.maxsize
        """In tokens; for "auto" nothing is pooled until it has been measured."""
        self.clock = Clock(CPU)
        self.copies: Copies | None = None  # on a CPU nothing has to be
        self.counters, self.timeline = Counters(), Timeline(self.clock.now)
        self.advisor, self.spot_check = Advisor(config, self.counters), SpotCheck(config.spot_check, self.counters)
        self.patience = Patience()
        self.durations = Durations(self.advisor.learn, self.patience.learn)
        self.closing = ExitStack()  # what ends with it: a trace, a server of metrics
        self.batches = Batches()
        self.without_masks = weakref.WeakSet[Any]()  # keepers of graphs whose layers cannot run a second time
        self._measuring = False
        self.threads = SharedThreads(self.advisor.threads_left)
        self.leases = Leases(config, make_pool, self.counters, self.advisor)
        self._busy, self.backwards = threading.Lock(), threading.RLock()
        self._ended: list[int] = []

    def __reduce__(self) -> tuple[type[ResourceManager], tuple[Any, ...]]:
        return ResourceManager, (self.config, self.leases.source, self._agree, self.base_ranks)

    def __enter__(self) -> ResourceManager:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def state(self) -> State:
        """Of the lease; or closed."""
        return self.leases.state

    @property
    def ranks(self) -> list[PoolRank]:
        """Those that are leased."""
        return self.leases.ranks

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self.state == "closed"

    @property
    def in_pooled_forward(self) -> bool:
        """Whether a pooled forward is under way."""
        return self._busy.locked() and not self._measuring

    def agree(self, decision: tuple[int, ...]) -> tuple[int, ...]:
        """The same numbers on all base ranks that share the model: the least of theirs."""
        return self._agree(decision)

    def compute_on(self, device: torch.device) -> None:
        """Where the base computes from now on."""
        if device != self.advisor.device:
            self.advisor.device = device
            self.clock.move_to(device)
            self.copies = Copies() if device.type == "cuda" else None

    def begin(
        self,
        phase: Phase,
        columns: int,
        look: Callable[[], Geometry | str],
        sequence: SequenceState,
        *,
        must_be_local: str | None = None,
        lasting: bool = True,
        one_block: str | None = None,
        profiler: Profiler | None = None,
        device: torch.device = CPU,
    ) -> Forward:
        """Decides pooled or local for one forward; :meth:`end` must follow.

        Args:
            phase: for the counters.
            columns: length after this forward (of the whole prompt, in prefill), padding included.
            look: inspects the masks, only called above the threshold. Returns the geometry, or why this forward
                must be local; raises ValueError for input that is refused.
            sequence: the batch this forward continues.
            must_be_local: a reason known beforehand, with its remedy. ValueError if the configuration is strict.
            lasting: whether a cache keeps the sequence beyond this forward.
            one_block: why this forward cannot be cut into blocks in flight; None if it can.
            profiler: knows or measures what the model costs; None: every long forward is pooled.
            device: where it is computed.
        """
        self.compute_on(device)
        self.threads.after_a_failed_backward()
        self.durations.read()
        local = Forward(self.config, self.counters, phase)
        if not self.config.enabled or self.is_closed or self.leases.is_forked or self._measuring:
            return local
        if is_capturing():
            must_be_local = must_be_local or "a CUDA graph is being captured: it cannot hold messages"
        length, geometry = looked_at(local, self.threshold, columns, look, sequence, must_be_local)
        wanted = geometry is not None and length > self.threshold
        if not wanted and not self.ranks:
            return local
        if not wanted and not self._busy.acquire(blocking=False):
            return local
        if wanted:
            self._busy.acquire()
        decided = local
        try:
            self._reap()
            if sequence.owned is None:  # else its keys come first
                self.leases.heed(share=not self.batches)
            self.leases.current = sequence.id
            if wanted and geometry is not None and not self.is_closed:
                asked = replace(local, geometry=geometry, sequence=sequence, lasting=lasting)
                decided = self._decide(asked, length, one_block, profiler)
            elif self.ranks and not self.batches and length < (below := self.config.release_ratio * self.threshold):
                self.leases.release(f"a forward of {length} tokens, below {below:g}")
        except BaseException:
            self._busy.release()
            raise
        if not decided.pooled:
            self._busy.release()
            return replace(decided, began=self.clock.now())
        sequence.place(decided.geometry.starts if decided.geometry else ())
        if decided.ranks:
            self.leases.sequences.add(sequence.id)
            self.threads.give(len(decided.ranks))
        counters = self.counters.phase(phase)
        self.timeline.begin(counters)
        before = (counters.pooled_calls, sum(self.counters.local_reasons.values()))
        return replace(decided, began=self.clock.now(), before=before)

    def _decide(self, forward: Forward, length: int, one_block: str | None, profiler: Profiler | None) -> Forward:
        """Pooled, the base alone, or local: by length, or by what each is predicted to take."""
        if self.advisor.needs_profile and profiler is not None:
            self._profile(profiler, length, forward.sequence)
        mode, blocks, choice = self._chosen(forward, one_block)
        sequence = forward.sequence
        if self.leases.is_shared and mode == _POOLED:
            self.leases.most = self.advisor.need(forward, choice)
        if self._agree is not unasked and self.config.pool == "ray" and sequence is not None and sequence.owned is None:
            calm = self.leases.is_calm(sequence.id, wanted=mode == _POOLED)
            mode, blocks = self._agree((mode, blocks if calm else 0))
            if not blocks:  # ranks come or go for one base rank, and so for all
                with self.leases.together(self._agree):
                    if mode == _POOLED:
                        self._activate(length, sequence, self.patience.seconds(forward))
                mode, blocks, choice = self._chosen(forward, one_block)
                mode, blocks = self._agree((mode, blocks))
        else:
            mode, blocks = self._agree((mode, blocks))
            if mode == _POOLED:
                self._activate(length, sequence, self.patience.seconds(forward))
        if mode == _POOLED:
            if not self.ranks:
                reason = "no pool rank was to be had for this sequence"
                self.counters.stay_local(reason)
                if self.config.strict and self.leases.is_shared and forward.begins:
                    raise refusal(f"{reason}; stats()['events'] say why", length, self.threshold)
                if self._agree is unasked:
                    return forward
        elif choice is not None:
            self.counters.stay_local(f"the plan: {forward.phase} is predicted to be faster without pool ranks")
            if self.ranks and not self.leases.sequences:
                self.leases.release("borrowed to measure, and the plan does without")
        if mode == _LOCAL:
            return replace(forward, choice=choice)
        ranks = self.ranks[: choice.ranks] if choice is not None and not forward.owns_keys else self.ranks
        return replace(
            forward,
            pooled=True,
            ranks=tuple(ranks) if mode == _POOLED else (),
            blocks=blocks,
            choice=choice,
            base_share=own_share(choice, self.config.base_share, self.base_ranks, len(ranks)),
            rank_cost=self.advisor.rank_cost(),
        )

    def _chosen(self, forward: Forward, one_block: str | None) -> tuple[int, int, Choice | None]:
        """(mode, blocks, what the plan says) as this base rank sees it."""
        choice = self.advisor.choose(forward, self.ranks, one_block is None)
        alone = choice is not None and forward.may_be_alone and choice.alone_s <= choice.seconds
        mode = _ALONE if alone and forward.phase == "decode" else _LOCAL if alone else _POOLED
        return mode, self.advisor.blocks(forward, one_block, choice) if mode == _POOLED else 1, choice

    def grow(self, forward: Forward) -> None:
        """Between two layers of a prompt: ranks that other jobs have given back since it began take part from here on.
        Base ranks that share a model agree between two forwards only."""
        if self.leases.is_shared and self._agree is unasked and (room := forward.room) > 0:
            self.leases.take_more()
            known = {*map(id, forward.ranks), *map(id, forward.joined)}
            forward.joined += [rank for rank in self.ranks if id(rank) not in known][:room]

    def _profile(self, profiler: Profiler, length: int, sequence: SequenceState | None) -> None:
        """Takes the profile there is, or measures a quick one with the first leased rank."""
        self._measuring, began = True, time.perf_counter()
        try:
            self.advisor.profile = profiler.known()
            if self.advisor.profile is not None:
                return
            self._activate(length, sequence)
            start_s = time.perf_counter() - began
            if self.ranks:
                with self.guard(self.ranks[0]):
                    self.advisor.measure(profiler, self.ranks[0], start_s)
        finally:
            self._measuring = False

    def end(self, forward: Forward, *, completed: bool = True) -> None:
        """Ends what :meth:`begin` returned; one that was not ``completed`` says nothing of what it takes."""
        counters = self.counters.phase(forward.phase)
        pooled = bool(forward.ranks) and not forward.abandoned
        counters.pooled_forwards += pooled
        counters.local_forwards += not pooled
        counters.overlapped_forwards += forward.blocks > 1 and not forward.abandoned
        if forward.ranks and completed:
            forward.count_notes()
        # Warnings may be errors; the next forward must not wait for this one then.
        with ExitStack() as last:
            if forward.pooled:
                last.callback(self._end_pooled, forward)
            if completed:
                self.durations.add(forward, self.clock.now())

    def _end_pooled(self, forward: Forward) -> None:
        self.timeline.end()
        self.threads.take_back()
        if forward.sequence is not None and not forward.lasting:
            self._ended.append(forward.sequence.id)
        self._busy.release()
        self.reap()

    def guard(self, rank: PoolRank) -> AbstractContextManager[None]:
        """A rank that fails in this block is given up, and work goes on."""
        return self.leases.guard(rank)

    def heed(self) -> None:
        """Before a sequence whose keys have owners goes on: ranks that leave are given back, unless a forward of
        another thread uses them."""
        if self._busy.acquire(blocking=False):
            try:
                self.leases.lose_dead()
                self.leases.heed(share=False)
            finally:
                self._busy.release()

    def borrow(self, length: int, sequence_id: int) -> list[PoolRank]:
        """Ranks for a sequence's backward, outside any forward: the lease there is, or a new one."""
        if not (self.ranks or self.is_closed or self.leases.is_forked):
            self._activate(length, None)
        self.leases.sequences.update([sequence_id] if self.ranks else [])
        return list(self.ranks)

    def watch(self, owner: object, sequence: SequenceState) -> weakref.finalize[Any, Any]:
        """The sequence ends when ``owner``, its cache, is gone, or when what this returns is called."""
        ends = weakref.finalize(owner, self._sequence_ended, sequence.id)
        ends.atexit = False
        return ends

    def reap(self) -> None:
        """Frees sequences that have ended; gives the lease back when none is left. Waits for no forward."""
        if self._busy.acquire(blocking=False):
            try:
                self._reap()
            finally:
                self._busy.release()

    def stats(self) -> dict[str, Any]:
        """What happened so far, as a copy; :mod:`fapool_plugin.observe.metrics` says what each number counts."""
        self.timeline.read()
        held = [rank.number for rank in self.ranks]
        known = {"state": self.state, "threshold": self.threshold, "leased_ranks": held}
        pool = list(self.leases.pool.said) if self.leases.pool is not None else []
        return known | {"pool": pool, "kv_bytes": self.batches.held()} | self.counters.as_dict()

    def close(self) -> None:
        """Gives the lease back and ends the pool ranks. Forwards after this are local. Harmless when repeated."""
        if self.is_closed or self.leases.is_forked:
            return
        # A pooled forward in another thread ends first; one that was abandoned is not waited for long.
        waited = self._busy.acquire(timeout=self.config.timeout_s)
        try:
            self.threads.take_back()
            self.leases.close()
            self.closing.close()
            self.counters.log("closed", "close() was called")
        finally:
            if waited:
                self._busy.release()

    def _sequence_ended(self, sequence_id: int) -> None:
        # Called by the garbage collector at any moment: the ranks are only told between two forwards.
        if not self.leases.is_forked:
            self._ended.append(sequence_id)
            self.reap()

    def _reap(self) -> None:
        while self._ended:
            sequence_id = self._ended.pop()
            self.leases.end_sequence(sequence_id, names(sequence_id, self.config.kv_redundancy))

    def _activate(self, length: int, sequence: SequenceState | None, patience_s: float = 0.0) -> None:
        why = f"a sequence of {length} tokens, threshold {self.threshold}"
        # Keys that have owners stay where they are.
        more = sequence is not None and sequence.owned is None
        self.leases.take(why, sequence.id if sequence is not None else None, more=more, patience_s=patience_s)
