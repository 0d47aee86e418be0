"""Jobs that share a standing pool: ranks join and leave in the middle of sequences, and no logit changes."""

from __future__ import annotations

import itertools
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base import leases
from fapool_plugin.plan.profile import Fit
from fapool_plugin.pool import lease as ranks_lease
from fapool_plugin.wire.link import Link
from tests.base.test_advisor import FREE, profile_of
from tests.models import eager, one_thread, random_ids, save_model
from tests.standing_pool import TIMEOUT_S, JobsPool, Standing, jobs

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("quick", "silence")]
LAYERS = 2
HOMES = pytest.mark.parametrize("home", ["base", "pool"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("model"))


class Clock:
    """Of leases, at both ends: it goes on, and can be put forward."""

    def __init__(self) -> None:
        self.ahead_s, self.perf_counter, self.sleep = 0.0, time.perf_counter, time.sleep

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (leases, ranks_lease):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Jobs ask at every forward."""
    monkeypatch.setattr(leases, "_LOOK_S", 0.0)
    with one_thread():
        yield


@pytest.fixture
def silence() -> Iterator[None]:
    """Nothing that happens here is worth a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "fa_pool")
        yield


def until(done: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@HOMES
def test_ranks_that_come_join_a_sequence_or_the_next(folder: Path, home: str) -> None:
    ranks = Standing(1)
    with jobs(folder, ranks, {"kv_home": home}) as [job]:
        job.prompt()
        assert job.ranks == [0]
        ranks.grow()
        job.steps()
        assert job.ranks == ([0, 1] if home == "base" else [0]), job.events()
        job.steps()
        assert (ranks.workers[1].prefixes.nbytes > 0) == (home == "base"), "keys that have owners stay where they are"
        job.prompt()
        assert job.ranks == [0, 1], job.events()
        assert ranks.workers[1].prefixes.nbytes, "it is used"
        job.steps()
        assert job.kinds("joined") == (["joined"] if home == "base" else [])


@HOMES
def test_a_rank_leaves_in_the_middle_of_a_sequence(folder: Path, home: str) -> None:
    ranks = Standing(2)
    with jobs(folder, ranks, {"kv_home": home}) as [job]:
        job.prompt()
        job.steps()
        ranks.leave(0)
        until(lambda: job.leases.ranks[0].link.wishes.leaving, "a heartbeat says so")
        job.steps(2)
        assert job.ranks == [1], job.events()
        assert job.kinds("left", "replay")[:2] == (["left"] if home == "base" else ["left", "replay"])
        until(lambda: ranks.workers[0].lease.token is None, "it is given back")
        assert ranks.workers[0].prefixes.nbytes == 0
        ranks.leave(1)
        until(lambda: job.leases.ranks[0].link.wishes.leaving, "a heartbeat says so")
        job.steps(2)
        assert job.ranks == [], job.events()
        ranks.grow()
        job.steps(2)
        job.prompt()
        assert job.ranks == [2], job.events()


@HOMES
def test_a_refused_job_asks_again(folder: Path, home: str) -> None:
    """In the middle of its sequence: its keys are still all its own."""
    ranks = Standing(1)
    with jobs(folder, ranks, {"kv_home": home}, {"kv_home": home}) as [first, second]:
        first.prompt()
        time.sleep(0.2)
        second.prompt()
        (busy,) = [one for one in second.events() if one.startswith("busy")]
        assert float(busy.split("up to ")[1].split(" s ")[0]) >= 0.2, busy
        second.steps(3)
        assert (first.ranks, second.ranks) == ([0], []), second.events()
        first.prompt()
        assert first.ranks == [], "who has waited is first"
        second.steps(2)
        assert second.ranks == [0], second.events()
        assert ranks.workers[0].prefixes.nbytes
        assert second.kinds("joined") == ["joined"]
        first.steps()
        assert first.ranks == []
        second.prompt()
        first.steps()
        assert (first.ranks, second.ranks) == ([0], []), "turn by turn"


def coming(monkeypatch: pytest.MonkeyPatch, ranks: Standing, calls: int) -> None:
    """A rank comes when ranks are asked for at a forward's beginning, and so many times after that."""
    look, looks = JobsPool.look, itertools.count()

    def looked(self: JobsPool, leased: Collection[int]) -> dict[int, Link]:
        if next(looks) == calls:
            ranks.grow()
        return look(self, leased)

    monkeypatch.setattr(JobsPool, "look", looked)


@pytest.mark.parametrize(
    ("blocks", "lengths", "after", "calls"),
    [(1, [240], 2, 1), (3, [240], 2, 5), (3, [240], 5, 2), (1, [100, 80], LAYERS + 3, 1)],
)
def test_ranks_join_in_the_middle_of_a_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch, blocks: int, lengths: list[int], after: int, calls: int
) -> None:
    """Calls from there on have it, with the keys of a prompt's first part; layers before send theirs at a step."""
    ranks = Standing(1)
    coming(monkeypatch, ranks, after)
    with jobs(folder, ranks, {"blocks": blocks}) as [job]:
        for length in lengths:
            job.forward(random_ids(2, length))
        stats = job.model.fa_pool.stats()
        assert (job.ranks, job.kinds("joined")) == ([0, 1], ["joined"]), job.events()
        found = {rank["rank"]: rank["calls"] for rank in stats["ranks"]}
        assert found == {0: LAYERS * blocks * len(lengths), 1: calls}, found
        assert stats["prefill"]["overlapped_forwards"] == (blocks > 1), stats["not_overlapped_reasons"]
        job.steps(2)
        assert job.model.fa_pool.stats()["local_reasons"] == {}, job.model.fa_pool.stats()


def test_keys_that_have_owners_get_no_others_in_the_middle_of_a_prompt(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Standing(1)
    coming(monkeypatch, ranks, 1)
    with jobs(folder, ranks, {"kv_home": "pool"}) as [job]:
        job.prompt()
        assert job.ranks == [0], job.events()
        job.leases.make_pool().acquire(print, torch.device("cpu"))
        job.prompt()
        assert job.ranks == [0, 1], job.events()


def test_a_strict_job_is_refused_a_prompt_and_nothing_else(folder: Path) -> None:
    ranks = Standing(1)
    with jobs(folder, ranks, {}, {"strict": True, "kv_home": "pool"}) as [first, second]:
        first.prompt()
        with pytest.raises(ValueError, match=r"is strict.* 60 tokens.* no pool rank was to be had"):
            second.prompt()
        first.model.fa_pool.leases.release("test")
        until(lambda: ranks.workers[0].lease.token is None, "it is given back")
        second.prompt()
        second.steps()
        assert second.ranks == [0], second.events()
        ranks.leave(0)
        until(lambda: second.leases.ranks[0].link.wishes.leaving, "a heartbeat says so")
        second.steps(2)
        assert (second.ranks, second.kinds("left", "replay")[:2]) == ([], ["left", "replay"]), second.events()


def test_no_more_is_leased_than_the_plan_uses(folder: Path, tmp_path: Path) -> None:
    """Each message takes long, and attention a little: by the plan one rank is enough, for the prompt and for steps."""
    reference, profiles = eager(folder), {}
    for name, link in (("dear", Fit(a=1.0)), ("free", FREE)):
        profiles[name] = str(tmp_path / name)
        profile_of(reference, prefill=Fit(c=1e-3), decode=Fit(b=0.06), link=link).save(Path(profiles[name]))
    ranks = Standing(3)
    with jobs(folder, ranks, {"profile": profiles["dear"]}, {"profile": profiles["free"]}) as [first, second]:
        for job, count in ((first, 1), (second, 2)):
            job.leases.make_pool()
            job.prompt()
            job.steps()
            assert len(job.ranks) == count, job.events()


PAIRS = 3660
"""Of two rows of 60 tokens."""


@pytest.mark.parametrize("frees", [True, False])
@pytest.mark.parametrize(
    "known",
    [{True: 1.0 / PAIRS, False: 1.5 / PAIRS}, {True: 0.5 / PAIRS}],
    ids=["as long as ranks gain", "as long as one with ranks takes"],
)
def test_a_refused_prompt_waits(folder: Path, frees: bool, known: dict[bool, float]) -> None:
    ranks = Standing(2)
    with jobs(folder, ranks, {}, {}) as [first, second]:
        first.prompt()
        second.prompt()
        (told,) = [one for one in second.events() if one.startswith("busy")]
        assert told.endswith("; waited 0.0 s, and got 0"), "it knows of no prompt with ranks"
        patience = second.model.fa_pool.patience
        assert patience._per_pair.keys() == {False}
        patience._per_pair = dict(known)
        frees_s = 0.2
        if frees:
            threading.Timer(frees_s, lambda: first.leases.release("test")).start()
        began = time.monotonic()
        second.prompt()
        took_s = time.monotonic() - began
        assert second.ranks == ([0, 1] if frees else []), second.events()
        told = [one for one in second.events() if one.startswith("busy")][-1]
        assert took_s >= (frees_s if frees else 0.5), f"{took_s}: {told}"
        assert told.endswith(f", and got {2 if frees else 0}"), told


def test_who_has_more_gives_to_who_has_less(folder: Path, clock: Clock) -> None:
    ranks = Standing(4)
    with jobs(folder, ranks, {}, {}) as [first, second]:
        first.prompt()
        assert first.ranks == [0, 1, 2, 3]
        second.prompt()
        assert second.ranks == []
        until(lambda: first.leases.ranks[0].link.wishes.waiting, "a heartbeat says so")
        first.steps()
        assert first.ranks == [0, 1, 2, 3], "not so soon"
        clock.ahead_s += 6.0
        second.steps()
        until(lambda: first.leases.ranks[0].link.wishes.waiting, "a heartbeat says so")
        first.steps(2)
        assert first.ranks == [0, 1], first.events()
        second.steps(2)
        assert second.ranks == [2, 3], second.events()
        assert first.kinds("shared") == ["shared"] * 2
        clock.ahead_s += 6.0
        second.steps()
        until(lambda: first.leases.ranks[0].link.wishes.least == 2, "a heartbeat says so")
        for _ in range(3):  # both want more, and have the same
            first.steps()
            second.steps()
            time.sleep(TIMEOUT_S / 4)
        assert (first.ranks, second.ranks) == ([0, 1], [2, 3]), [first.events(), second.events()]


def test_keys_that_have_owners_are_shared_between_sequences_only(folder: Path, clock: Clock) -> None:
    ranks = Standing(2)
    with jobs(folder, ranks, {"kv_home": "pool"}, {}) as [first, second]:
        first.prompt()
        second.prompt()
        clock.ahead_s += 6.0
        second.steps()
        until(lambda: first.leases.ranks[0].link.wishes.waiting, "a heartbeat says so")
        first.steps(2)
        assert first.ranks == [0, 1], first.events()
        first.prompt()
        second.steps()
        first.steps()
        assert (first.ranks, second.ranks) == ([1], [0]), [first.events(), second.events()]


@HOMES
def test_idle_keys_are_recalled_for_another_job(folder: Path, clock: Clock, home: str) -> None:
    ranks = Standing(1)
    settings: dict[str, Any] = {"kv_home": home, "idle_keys_s": 600.0}
    with jobs(folder, ranks, settings, settings) as [first, second]:
        first.prompt()
        first.steps()
        second.prompt()
        assert second.ranks == [], "it has been used just now"
        known = first.cache.state.id
        assert known in ranks.workers[0].prefixes
        clock.ahead_s += 601.0
        second.steps()
        assert second.ranks == [0], second.events()
        assert known not in ranks.workers[0].prefixes, "keys of a lease that is over"
        first.steps(2)
        assert first.ranks == [], first.events()
        assert first.kinds("recalled", "replay")[:1] == ["recalled"]
        clock.ahead_s += 601.0
        first.steps(2)
        assert first.ranks == [0], "it may have it again"
        second.steps(2)
        assert second.kinds("recalled") == ["recalled"]


@HOMES
@pytest.mark.parametrize("prompt", [True, False])
def test_a_lease_is_recalled_in_the_middle_of_a_forward(folder: Path, clock: Clock, home: str, prompt: bool) -> None:
    ranks = Standing(2)
    with jobs(folder, ranks, {"kv_home": home}, {"pool_ranks": 1}) as [first, second]:
        first.prompt()
        first.steps()
        second.prompt(16)  # at the threshold: it asks for nothing yet

        def recall(*_: object) -> None:
            hook.remove()
            until(lambda: not any(worker._at_work for worker in ranks.workers.values()), "requests are answered")
            clock.ahead_s += 61.0
            second.steps()
            assert second.ranks == [0], second.events()

        hook = first.model.model.layers[1].register_forward_pre_hook(recall)
        if prompt:
            first.prompt()
        else:
            first.steps()
        assert second.ranks == [0]
        first.steps(2)
        assert (first.ranks, first.kinds("recalled", "memory", "fault")) == ([1], ["recalled"]), first.events()
        reasons = first.model.fa_pool.stats()["local_reasons"]
        assert not any("could not store" in reason for reason in reasons), reasons


def test_idle_keys_are_kept_while_none_asks_or_if_the_job_says_so(folder: Path, clock: Clock) -> None:
    ranks = Standing(1)
    with jobs(folder, ranks, {}, {"idle_keys_s": None}) as [first, second]:
        first.prompt()
        clock.ahead_s += 100.0
        first.steps()
        assert first.kinds("recalled") == []
        first.model.fa_pool.leases.release("test")
        second.prompt()
        clock.ahead_s += 1e6
        first.prompt()
        assert (first.ranks, second.ranks) == ([], [0]), "its keys are not recalled"


@HOMES
def test_a_job_that_stands_still_loses_its_lease_to_one_that_asks(folder: Path, home: str) -> None:
    ranks = Standing(1)
    with jobs(folder, ranks, {"kv_home": home, "timeout_s": 0.5}, {}) as [first, second]:
        first.prompt()
        first.steps()
        second.prompt()
        with first.leases.pool.loop.alone():  # type: ignore[union-attr]
            time.sleep(0.8)
            second.steps()
            assert second.ranks == [0], second.events()
        first.steps(2)
        assert (first.ranks, first.kinds("recalled")) == ([], ["recalled"]), first.events()


def test_a_refusal_does_not_wait_for_what_the_rank_computes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Standing(1)
    with jobs(folder, ranks, {}, {"timeout_s": 30.0}) as [first, second]:
        first.prompt()
        worker, free = ranks.workers[0], [False]
        monkeypatch.setattr(worker, "_handle", lambda *_: until(lambda: free[0], "let go"))
        first.leases.ranks[0].tell(leases.Op.FREE, 1)
        until(lambda: worker._at_work, "it computes")
        second.prompt()
        assert second.kinds("busy") == ["busy"], second.events()
        free[0] = True


def test_a_wish_is_forgotten(folder: Path, clock: Clock) -> None:
    ranks = Standing(1)
    with jobs(folder, ranks, {}, {}) as [first, second]:
        first.prompt()
        second.prompt()
        clock.ahead_s += 3.0
        first.prompt()
        assert first.ranks == [0], "the other does not ask any more"
