"""When ranks are borrowed and given back, and what the log says of it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fapool_plugin.base.lease import RanksStarting
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.plan.shares import Geometry
from tests.thread_pool import ThreadPool


class Owner:
    """Stands for a cache."""


@pytest.fixture
def manager() -> Iterator[ResourceManager]:
    config = FAPoolConfig(pool_ranks=2, threshold=100, release_ratio=0.5, memory_limit_mib=16)
    with ResourceManager(config, ThreadPool) as manager:
        yield manager


def forward(
    manager: ResourceManager,
    length: int,
    state: SequenceState | None = None,
    batch: tuple[int, ...] = (0,),
    **keys: Any,
) -> bool:
    """One forward of ``length`` columns; whether it was pooled."""
    geometry = Geometry(batch, (length,) * len(batch), 0, length)
    decided = manager.begin("prefill", length, lambda: geometry, state or SequenceState(), **keys)
    manager.end(decided)
    return decided.pooled


def state_of(manager: ResourceManager) -> str:
    return str(manager.stats()["state"])


def kinds(manager: ResourceManager) -> list[str]:
    return [event["kind"] for event in manager.stats()["events"]]


def test_the_threshold_is_strict(manager: ResourceManager) -> None:
    assert [forward(manager, length) for length in (99, 100, 101)] == [False, False, True]


def test_nothing_is_pooled_nor_asked_while_a_graph_is_captured(
    manager: ResourceManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses what a message takes then, and even the question whether an event has happened."""
    assert forward(manager, 120)
    asked = []
    late = SimpleNamespace(since=lambda began: asked.append(began))
    manager.durations._waiting.append((None, None, late))  # type: ignore[arg-type]
    with monkeypatch.context() as capturing:
        capturing.setattr(torch.cuda, "is_initialized", lambda: True)
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not forward(manager, 120)
        assert not asked, "an event was asked for"
    assert manager.stats()["local_reasons"]["a CUDA graph is being captured: it cannot hold messages"] == 1
    assert forward(manager, 120)
    assert asked


def test_padding_does_not_count(manager: ResourceManager) -> None:
    assert not forward(manager, 150, batch=(50, 60))
    assert forward(manager, 150, batch=(50, 49))


def test_a_short_prompt_never_looks_at_masks_or_starts_anything(manager: ResourceManager) -> None:
    def look() -> Geometry:
        raise AssertionError("looked")

    manager.end(manager.begin("prefill", 100, look, SequenceState()))
    assert manager.leases.pool is None
    assert kinds(manager) == []


def test_the_lease_is_kept_between_release_and_threshold_and_given_back_below(manager: ResourceManager) -> None:
    state, owner = SequenceState(), Owner()
    manager.watch(owner, state)
    assert forward(manager, 200, state)
    assert not forward(manager, 60)
    assert state_of(manager) == "active"
    assert not forward(manager, 49)
    assert state_of(manager) == "idle"
    assert kinds(manager) == ["activating", "active", "draining", "idle"]
    assert "49 tokens" in manager.stats()["events"][2]["reason"]
    assert forward(manager, 201, state), "a sequence that goes on borrows again"
    assert (manager.counters.activations, manager.counters.releases) == (2, 1)


def test_the_lease_is_given_back_when_the_last_sequence_ends(manager: ResourceManager) -> None:
    owners = [Owner(), Owner()]
    states = [SequenceState(), SequenceState()]
    for owner, state in zip(owners, states, strict=True):
        manager.watch(owner, state)
        assert forward(manager, 200, state)
    del owners[0], owner
    assert state_of(manager) == "active"
    del owners[0]
    assert state_of(manager) == "idle"
    assert "ended" in manager.stats()["events"][-2]["reason"]
    pool = manager.leases.pool
    assert isinstance(pool, ThreadPool)
    assert len(pool.links) == 2, "ranks stay warm between leases"


def test_a_sequence_that_dies_during_a_forward_is_freed_after_it(manager: ResourceManager) -> None:
    state, owner = SequenceState(), Owner()
    manager.watch(owner, state)
    decided = manager.begin("prefill", 200, lambda: Geometry((0,), (200,), 0, 200), state)
    del owner
    gc.collect()
    assert state_of(manager) == "active"
    manager.end(decided)
    assert state_of(manager) == "idle"


def test_without_a_cache_the_sequence_ends_with_its_forward(manager: ResourceManager) -> None:
    assert forward(manager, 200, lasting=False)
    assert state_of(manager) == "idle"


def test_a_prompt_in_chunks_is_judged_by_its_whole_length(manager: ResourceManager) -> None:
    state = SequenceState(prompt_columns=150)
    decided = manager.begin("prefill", 150, lambda: Geometry((0,), (40,), 0, 40), state)
    manager.end(decided)
    assert decided.pooled


def test_a_reason_to_stay_local_is_counted(manager: ResourceManager) -> None:
    assert not forward(manager, 200, must_be_local="because")
    assert not forward(manager, 20, must_be_local="because")
    assert manager.stats()["local_reasons"] == {"because": 1}


def test_refused_input_leaves_the_manager_usable(manager: ResourceManager) -> None:
    def refuse() -> Geometry:
        raise ValueError("a hole")

    with pytest.raises(ValueError, match="a hole"):
        manager.begin("prefill", 200, refuse, SequenceState())
    assert forward(manager, 200)


def test_when_every_rank_is_lost_the_next_sequence_borrows_again(manager: ResourceManager) -> None:
    state, owner = SequenceState(), Owner()
    manager.watch(owner, state)
    assert forward(manager, 200, state)
    for rank in list(manager.ranks):
        with pytest.warns(RuntimeWarning, match=f"pool rank {rank.number} lost: test"):
            manager.leases.lose(rank, "test")
    assert not forward(manager, 201, state), "not tried again at every step"
    assert forward(manager, 200)
    assert manager.counters.faults == 2


def test_a_pool_that_cannot_start_costs_only_a_warning() -> None:
    class NoPool(ThreadPool):
        def acquire(self, announce: object, base: object = None) -> dict[int, Any]:
            raise RuntimeError("no ranks here")

    with ResourceManager(FAPoolConfig(threshold=10), NoPool) as manager:
        with pytest.warns(RuntimeWarning, match="no ranks here"):
            assert not forward(manager, 20)
        assert state_of(manager) == "idle"


def test_a_rank_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fapool_plugin.pool.worker.PROTOCOL_VERSION", 99)
    with (
        ResourceManager(FAPoolConfig(threshold=10), ThreadPool) as manager,
        pytest.warns(RuntimeWarning, match="version"),
    ):
        assert not forward(manager, 20)


def test_closing_twice_is_harmless_and_forwards_after_it_are_local(manager: ResourceManager) -> None:
    assert forward(manager, 200)
    manager.close()
    manager.close()
    assert not forward(manager, 200)
    assert manager.stats()["state"] == "closed"


def test_the_statistics_are_a_copy(manager: ResourceManager) -> None:
    stats = manager.stats()
    stats["prefill"]["pooled_calls"] = 99
    stats["events"].append("x")
    assert manager.stats()["prefill"]["pooled_calls"] == 0
    assert manager.stats()["events"] == []


@pytest.mark.parametrize("starting", [True, False])
def test_a_cause_is_warned_of_once_by_its_beginning(starting: bool) -> None:
    """Each time is in the log; a rank that is being started again is nothing to warn of."""

    def no_pool(config: FAPoolConfig) -> Any:
        raise (RanksStarting if starting else RuntimeError)("no port is free\nand so on for a page\nGLHF!")

    with ResourceManager(FAPoolConfig(pool_ranks=1, threshold=100), no_pool) as manager:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert not any(forward(manager, 200) for _ in range(3))
        ours = [str(warning.message) for warning in told]
        assert ours == ([] if starting else ["fa_pool: no pool rank, computing locally: no port is free"])
        assert kinds(manager).count("fault") == 3
