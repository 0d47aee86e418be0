"""Pool ranks that one model has borrowed: taken, given up when they fail, given back.

    take ──▶ ranks ──▶ release
             │ ▲ └─ heed: one leaves, or other jobs wait and have fewer; given back between two forwards
             │ └─── take: more have come, or are free, in the middle of a sequence
             └───── lose: one failed, the work goes on without it

Base ranks that share a model do it together: what one has to give back all give back, and all take what all have found.

The one place that learns of lost ranks. Knows ranks and where they come from; not when a forward wants them, nor what
they are asked.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal

from fapool_plugin.base.advisor import Advisor
from fapool_plugin.base.agreement import Agree, least_of_each
from fapool_plugin.base.lease import Guard, Pool, PoolRank, RanksStarting, lease
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.observe.metrics import Counters
from fapool_plugin.wire.link import Link, first_line
from fapool_plugin.wire.messages import LinkLost, Op

_LOOK_S = 0.5
"""Between two questions for more ranks."""
_HOLD_S = 5.0
"""A rank is not given to another job sooner, so that keys are not sent for little; nor is one given, or are more taken,
so soon after, when what ranks say of who waits may be old."""
_ASK_S = 0.02
"""Between two questions of a job that waits for ranks."""
_REST_S = 0.2
"""A job that gives back its ranks does so with each of them; who has got one waits so long for the others."""
_UNKNOWN = -(2**62)
"""Said of a rank to which a base rank has no link."""
_log = logging.getLogger("fapool_plugin")
State = Literal["idle", "activating", "active", "draining", "closed"]


class Leases:
    """One model's, one after the other.

    Args:
        config: how many ranks at most.
        source: makes the pool that they come from, when it is first needed.
        counters: has the log.
        advisor: looks at ranks, and knows where the base computes.
    """

    def __init__(
        self, config: FAPoolConfig, source: Callable[[FAPoolConfig], Pool], counters: Counters, advisor: Advisor
    ) -> None:
        self.config, self.source, self.counters, self.advisor = config, source, counters, advisor
        self.state: State = "idle"
        self.ranks: list[PoolRank] = []
        self.pool: Pool | None = None
        self.sequences = set[int]()
        """Those that hold the lease."""
        self.current: int | None = None
        """The sequence whose forward is under way, or was last."""
        self.most = config.pool_ranks
        """How many are taken."""
        self._failed_for: int | None = None
        """The sequence for which no rank was to be had: it is not tried again at every step."""
        self._token: int | None = None
        """Names the lease there is, or the one that is waited for."""
        self._look_at, self._shared_at = 0.0, -math.inf
        self._agreed = frozenset[int]()
        """The ranks that all base ranks had when they last agreed, if they share the model."""
        self._arrange: Callable[[Mapping[int, Link]], Mapping[int, Link]] = dict
        """Which ranks are asked, in which order."""
        self._acquired = False
        self._owner = os.getpid()  # whose pool it is: a forked child has its links, too, and must not touch them
        self._finalizer: weakref.finalize[Any, Leases] | None = None

    @property
    def is_forked(self) -> bool:
        """Whether this is a child of the process whose ranks they are."""
        return self._acquired and os.getpid() != self._owner

    @property
    def is_shared(self) -> bool:
        """Whether other jobs borrow the same ranks, as far as is known."""
        return self.pool is not None and self.pool.look is not None

    def make_pool(self) -> Pool:
        """Where ranks come from. A forked child makes its own, unless its parent has used this one."""
        if self.pool is None or (os.getpid() != self._owner and not self._acquired):
            self.pool, self._owner = self.source(self.config), os.getpid()
            self._finalizer = weakref.finalize(self, self.pool.close)
        return self.pool

    def guard(self, rank: PoolRank) -> AbstractContextManager[None]:
        """The one place that catches link errors: a rank that fails in this block is given up, and work goes on."""
        return Guard(rank, self.lose)

    def take(self, why: str, sequence: int | None, *, more: bool = False, patience_s: float = 0.0) -> None:
        """Takes the lease. If there is one, or none was to be had for this sequence before, only ranks of a shared pool
        are asked for, and those now and then.

        Args:
            why: for the log.
            sequence: names it; None: it is none's.
            more: whether it can use ranks that come now.
            patience_s: how long it waits if other jobs have them all.
        """
        self.lose_dead()
        if self.ranks or (sequence is not None and self._failed_for == sequence):
            if more:
                self.take_more()
            return
        self.state = "activating"
        self.counters.log("activating", why)
        began = time.perf_counter()
        try:
            pool, self._acquired = self.make_pool(), True
            links = self._arrange(pool.acquire(_log.info, self.advisor.device))
            if busy := self._lease(pool, links):
                told = f"{len(busy)} pool rank(s) are leased by other jobs, for up to {max(busy):.1f} s already"
                waited_s = self._wait(pool, links, patience_s)
                self.counters.log("busy", f"{told}; waited {waited_s:.1f} s, and got {len(self.ranks)}")
            self._look_at = time.monotonic() + _LOOK_S
        except (RuntimeError, OSError, FAPoolConfigError) as error:
            self.counters.log("fault", f"no pool rank could be had: {error}")
            if not isinstance(error, RanksStarting) and self.counters.is_new(cause := first_line(error)):
                warnings.warn(f"fa_pool: no pool rank, computing locally: {cause}", RuntimeWarning, stacklevel=2)
        except BaseException:
            self.state = "idle"
            raise
        if not self.ranks:
            self._failed_for = sequence
            self.state = "idle"
            return
        self._failed_for = None
        self.counters.activations += 1
        self.state = "active"
        took_ms = (time.perf_counter() - began) * 1e3
        self.counters.log("active", f"{len(self.ranks)} pool rank(s) leased in {took_ms:.0f} ms")

    def is_calm(self, sequence: int, *, wanted: bool) -> bool:
        """Whether this base rank has those ranks that all have which share its model, and would take no others now.

        Args:
            sequence: whose forward it is.
            wanted: whether that forward wants ranks.
        """
        if {rank.number for rank in self.ranks if not rank.link.lost} != self._agreed:
            return False
        if not wanted or (not self.ranks and self._failed_for != sequence):
            return not wanted
        return not self._looks

    @contextmanager
    def together(self, agree: Agree) -> Iterator[None]:
        """Within it, base ranks that share a model take ranks: those that all of them have found, in an order that is
        the same for all. Before and after it they give back what not all have. Entered by all of them at once."""
        arranged = False

        def arrange(links: Mapping[int, Link]) -> Mapping[int, Link]:
            nonlocal arranged
            arranged = True
            # Of each rank how near it is to the base rank that it is farthest from.
            near = least_of_each(agree, {number: -at for at, number in enumerate(links)}, _UNKNOWN)
            known = [number for number in near if near[number] != _UNKNOWN]
            return {number: links[number] for number in sorted(known, key=lambda number: (-near[number], number))}

        self._keep_common(agree)
        if self._look_at <= time.monotonic() + _LOOK_S:
            self._look_at = 0.0  # it is due for another base rank
        self._arrange = arrange
        try:
            yield
        finally:
            self._arrange = dict
        if not arranged:
            arrange({})
        self._keep_common(agree)
        self._agreed = frozenset(rank.number for rank in self.ranks)
        if not self.ranks:
            self._failed_for = self.current

    def _keep_common(self, agree: Agree) -> None:
        common = least_of_each(agree, {rank.number: 1 for rank in self.ranks}, 0)
        for rank in list(self.ranks):
            if not common[rank.number]:
                self.counters.log(
                    "left", f"pool rank {rank.number} is given back: not all base ranks of the model have it"
                )
                self._part(rank)
                self._shared_at = time.monotonic()

    def heed(self, *, share: bool) -> None:
        """Between two forwards: gives back the ranks that leave or are recalled, and, if ``share``, those that other
        jobs are to have."""
        for rank in list(self.ranks):
            if rank.is_recalled:
                self.recalled(rank)
            elif rank.link.wishes.leaving:
                self.counters.log("left", f"pool rank {rank.number} leaves the pool; its work goes to the others")
                self._part(rank)
        if share:
            self._share()

    def recalled(self, rank: PoolRank) -> None:
        """Another job has ``rank`` now, and its keys are gone."""
        if rank in self.ranks:
            told = "it was not used for long, or did not hear from here, and another job asked for it"
            self.counters.log("recalled", f"pool rank {rank.number} was recalled: {told}")
            self._part(rank)

    def lose_dead(self) -> None:
        """Gives up ranks that died between two forwards: reason enough to borrow again, not to give up."""
        for rank in list(self.ranks):
            if rank.link.lost:
                self.lose(rank, rank.link.lost)
                self._failed_for = None

    def lose(self, rank: PoolRank, reason: str) -> None:
        """Gives up ``rank``. The event log and one warning name it."""
        if rank not in self.ranks:
            return
        self.ranks.remove(rank)
        rank.lost = True
        rank.counters.faults += 1
        self.counters.faults += 1
        who = self.pool.discard(rank.number, reason) if self.pool else ""
        text = f"pool rank {rank.number}{who} lost: {reason}; its work is computed by the base"
        self.counters.log("fault", text)
        if self.counters.is_new(f"{rank.number} {reason}"):
            warnings.warn(f"fa_pool: {text}", RuntimeWarning, stacklevel=2)
        if not self.ranks and self.state == "active":
            self._failed_for, self.state = self.current, "idle"
            self.counters.log("idle", "every pool rank was lost; the next sequence may borrow again")

    def end_sequence(self, sequence: int, names: tuple[int, ...]) -> None:
        """Frees what ranks have of a sequence, under these names; gives the lease back with the last one."""
        if sequence not in self.sequences:
            return
        self.sequences.discard(sequence)
        for rank in list(self.ranks):
            for name in names:
                with self.guard(rank):
                    rank.tell(Op.FREE, name)
        if not self.sequences and self.ranks:
            self.release("the last long sequence ended")

    def release(self, reason: str) -> None:
        """Gives the lease back."""
        self.state = "draining"
        self.counters.log("draining", reason)
        for rank in list(self.ranks):
            with self.guard(rank):
                rank.tell(Op.RELEASE)
        self.ranks, self.sequences, self._token, self._agreed = [], set(), None, frozenset()
        self.counters.releases += 1
        self.state = "idle"
        self.counters.log("idle", "the lease was given back")

    def close(self) -> None:
        """Gives the lease back and ends the pool."""
        if self.ranks:
            self.release("closed")
        self.state = "closed"
        if self._finalizer is not None and self.pool is not None:
            self._finalizer.detach()
            self.pool.close()
        self.pool = None

    def _lease(self, pool: Pool, links: Mapping[int, Link]) -> list[float]:
        """Takes as many as are wanted and to be had. Returns for how long other jobs have had those that they have."""
        had = len(self.ranks)
        self._token = self._token if self._token is not None else pool.new_token()
        try:
            busy = lease(
                links, self.config, self._token, self.advisor.device, self.ranks, self.counters, self.guard,
                most=self.most, shared=self.is_shared,
            )  # fmt: skip
            for rank in self.ranks[had:]:
                self.advisor.look_at(rank)
        except BaseException:
            for rank in self.ranks[had:]:  # or the next lease would find them busy
                with suppress(LinkLost):
                    rank.tell(Op.RELEASE)
            del self.ranks[had:]
            raise
        return busy

    def _wait(self, pool: Pool, links: Mapping[int, Link], patience_s: float) -> float:
        """Stands in line until a rank is had, and others that were freed with it. Returns for how many seconds."""
        began = time.monotonic()
        while not self.ranks and (left_s := began + patience_s - time.monotonic()) > 0:
            time.sleep(min(_ASK_S, left_s))
            if not self._lease(pool, links) and not self.ranks:
                break  # none is left to wait for
        until = time.monotonic() + min(_REST_S, patience_s)
        while self.ranks and len(self.ranks) < self.most and time.monotonic() < until:
            time.sleep(_ASK_S)
            if not self._lease(pool, links):
                break
        return time.monotonic() - began

    @property
    def _looks(self) -> bool:
        """Whether more ranks are asked for now."""
        return self.is_shared and len(self.ranks) < self.most and time.monotonic() >= self._look_at

    def take_more(self) -> None:
        """Ranks that have come, or that other jobs have given back."""
        pool, had = self.pool, len(self.ranks)
        if pool is None or pool.look is None or not self._looks:
            return
        self._look_at = time.monotonic() + _LOOK_S
        self._lease(pool, self._arrange(pool.look({rank.number for rank in self.ranks})))
        if len(self.ranks) > had:
            self.counters.activations += not had
            self._failed_for, self.state = None, "active"
            self.counters.log("joined", f"{len(self.ranks) - had} more pool rank(s), {len(self.ranks)} in all")

    def _share(self) -> None:
        """Gives back what this job has more than its part, if others wait. They ask every rank, so any will do."""
        now, wishes = time.monotonic(), [rank.link.wishes for rank in self.ranks if rank.link.wishes.waiting]
        hold_s = _HOLD_S + self.config.timeout_s / 5  # wishes may be as old as a heartbeat
        if not wishes or now - self._shared_at < hold_s:
            return
        jobs, least, has = wishes[0].waiting, wishes[0].least, len(self.ranks)
        mine = -(-(has + jobs * least) // (jobs + 1))
        # Base ranks that share a model choose the same ones.
        held = sorted((rank for rank in self.ranks if now - rank.since > hold_s), key=lambda rank: -rank.number)
        for rank in held[: max(0, has - mine)]:
            told = f"{jobs} other job(s) wait, with {least} rank(s) or more, and this one has {has}"
            self.counters.log("shared", f"pool rank {rank.number} is given back: {told}")
            self._part(rank)
            self._shared_at, self._look_at = now, now + hold_s

    def _part(self, rank: PoolRank) -> None:
        """Gives one back that has done nothing wrong."""
        self.ranks.remove(rank)
        rank.lost = True
        with suppress(LinkLost):
            rank.tell(Op.RELEASE)
        if not self.ranks:
            self.state, self._token = "idle", None
            self.counters.log("idle", "the last pool rank was given back")
