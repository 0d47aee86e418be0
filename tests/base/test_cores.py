"""Threads that the base lends to its pool ranks: how many, in which forwards, and that it always gets them back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from fapool_plugin.base.advisor import Advisor
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.observe.metrics import Counters
from fapool_plugin.plan.clocks import Cores
from fapool_plugin.plan.profile import Fit
from fapool_plugin.plan.shares import Geometry
from tests.base.test_advisor import DEAR, LENGTH, planned, profile_of
from tests.models import THRESHOLD, plain, random_ids, save_model
from tests.thread_pool import ThreadPool

TOTAL = 4


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(TOTAL)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many cores this process may use; as many as it has threads until then."""

    def may_use(count: int) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))

    may_use(TOTAL)
    return may_use


def watched(model: Any) -> list[int]:
    """Threads at the last layer's FFN, forward after forward."""
    seen: list[int] = []
    model.model.layers[1].mlp.register_forward_hook(lambda *args: seen.append(torch.get_num_threads()))
    return seen


@pytest.mark.parametrize(
    ("ranks", "each", "available", "left"),
    [(1, 1, 4, 3), (2, 1, 4, 2), (1, 3, 4, 1), (3, 2, 4, 1), (1, 1, 5, 4), (2, 1, 5, 3), (2, 2, 6, 2), (1, 1, 2, 3)],
)
def test_ranks_take_idle_cores_first_and_leave_the_base_one(
    folder: Path, cores: Callable[[int], None], ranks: int, each: int, available: int, left: int
) -> None:
    cores(available)
    with planned(folder, activation="length", pool_ranks=ranks, threads_per_rank=each) as model, torch.no_grad():
        seen = watched(model)
        for length, threads in ((LENGTH, left), (THRESHOLD, TOTAL), (LENGTH, left)):
            model(random_ids(1, length))
            assert seen[-1] == threads, f"{length} tokens"
            assert torch.get_num_threads() == TOTAL
        model(random_ids(1, 1), past_key_values=model(random_ids(1, LENGTH)).past_key_values)
        assert seen[-1] == left, "a decode step"
    assert torch.get_num_threads() == TOTAL


def test_forwards_without_ranks_have_all_threads(folder: Path) -> None:
    """Local by the plan, and decode by the base alone; then pooled by another plan."""
    reference = plain(folder)
    with planned(folder, profile_of(reference, link=DEAR)) as model, torch.no_grad():
        seen = watched(model)
        cache = model(random_ids(1, LENGTH)).past_key_values
        model(random_ids(1, 1), past_key_values=cache)
        assert set(seen) == {TOTAL}
        model.fa_pool.advisor.profile = profile_of(reference)
        model(random_ids(1, 1), past_key_values=cache)
        assert seen[-1] == TOTAL - 1
        model.fa_pool.advisor.profile = profile_of(reference, decode=Fit(), link=DEAR)
        model(random_ids(1, 1), past_key_values=cache)
        assert seen[-1] == TOTAL
        assert model.fa_pool.stats()["state"] == "active", "keys are still there"


def test_a_prompt_in_blocks_lends_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, seen = save_model("llama", tmp_path, max_position_embeddings=1024), []
    with planned(folder, activation="length", blocks=4) as model, torch.no_grad():
        model(random_ids(1, 300))  # with its trial
        last, forward = model.model.layers[1].mlp, LlamaMLP.forward

        def look(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
            seen.extend([torch.get_num_threads()] if self is last else [])
            return forward(self, x)

        # In the class: with a hook a model is left whole.
        monkeypatch.setattr(LlamaMLP, "forward", look)
        model(random_ids(1, 300))
        assert seen == [TOTAL - 1] * 4
    assert torch.get_num_threads() == TOTAL


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("length", [LENGTH, 300])
def test_threads_come_back_after_an_exception(tmp_path: Path, error: type[BaseException], length: int) -> None:
    folder = save_model("llama", tmp_path, max_position_embeddings=1024)

    def fail(*args: object) -> None:
        raise error

    with planned(folder, activation="length", blocks=2 if length > 100 else 1) as model, torch.no_grad():
        seen = watched(model)
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(error):
            model(random_ids(1, length))
        assert seen[-1] == TOTAL - 1
        assert torch.get_num_threads() == TOTAL
        handle.remove()
        model(random_ids(1, length))
        assert seen[-1] == TOTAL - 1
    assert torch.get_num_threads() == TOTAL


def test_threads_come_back_when_a_rank_is_lost_on_the_way(folder: Path) -> None:
    with planned(folder, activation="length") as model, torch.no_grad():
        handle = model.model.layers[0].mlp.register_forward_hook(
            lambda *args: model.fa_pool.ranks and model.fa_pool.ranks[0].link.fail("cut by a test") and None
        )
        with pytest.warns(RuntimeWarning, match="cut by a test"):
            model(random_ids(1, LENGTH))
        handle.remove()
        assert torch.get_num_threads() == TOTAL


def begun() -> ResourceManager:
    """A manager with a pooled forward that is not ended."""
    config = FAPoolConfig(threshold=10, activation="length", memory_limit_mib=16, timeout_s=0.2)
    manager = ResourceManager(config, ThreadPool)
    assert manager.begin("prefill", 20, lambda: Geometry((0,), (20,), 0, 20), SequenceState()).ranks
    assert torch.get_num_threads() == TOTAL - 1
    return manager


def test_closing_brings_the_threads_of_an_abandoned_forward_back() -> None:
    begun().close()
    assert torch.get_num_threads() == TOTAL


def test_closing_inside_a_forward_brings_them_back_when_it_ends(folder: Path) -> None:
    with planned(folder, activation="length", timeout_s=0.2) as model, torch.no_grad():
        model.model.layers[1].register_forward_hook(lambda *args: model.fa_pool.close())
        model(random_ids(1, LENGTH))
        assert torch.get_num_threads() == TOTAL
        assert model.fa_pool.is_closed


def test_forwards_of_two_threads_lend_in_turn(folder: Path) -> None:
    """The second waits for the first; the first's threads are not taken for all."""
    with planned(folder, activation="length") as model:
        seen = watched(model)

        def twice() -> None:
            torch.set_num_threads(TOTAL)
            with torch.no_grad():
                for _ in range(3):
                    model(random_ids(1, LENGTH))

        other = threading.Thread(target=twice)
        other.start()
        twice()
        other.join(30)
        assert seen == [TOTAL - 1] * 6
    assert torch.get_num_threads() == TOTAL


def backward_watched(model: Any) -> list[int]:
    """Threads at the first layer's FFN, backward after backward."""
    seen: list[int] = []
    model.model.layers[0].mlp.register_full_backward_hook(lambda *args: seen.append(torch.get_num_threads()))
    return seen


def test_a_backward_lends_until_its_end(folder: Path) -> None:
    with planned(folder, activation="length") as model:
        seen, ids = backward_watched(model), random_ids(1, LENGTH)
        for _ in range(2):
            loss = model(ids, labels=ids).loss
            assert torch.get_num_threads() == TOTAL, "in between the base computes alone"
            loss.backward()
            assert (seen[-1], torch.get_num_threads()) == (TOTAL - 1, TOTAL)
        short = random_ids(1, THRESHOLD)
        model(short, labels=short).loss.backward()
        assert (seen[-1], torch.get_num_threads()) == (TOTAL, TOTAL), "nothing is pooled"


def test_threads_come_back_after_a_backward_that_failed(folder: Path) -> None:
    with planned(folder, activation="length") as model:
        ids, seen = random_ids(1, LENGTH), watched(model)

        def fail(*args: object) -> None:
            raise ValueError("in the middle")

        hook = model.model.layers[0].mlp.register_full_backward_hook(fail)
        loss = model(ids, labels=ids).loss
        with pytest.raises(ValueError, match="in the middle"):
            loss.backward()
        hook.remove()
        model(random_ids(1, THRESHOLD))
        assert (seen[-1], torch.get_num_threads()) == (TOTAL, TOTAL)
        backwards = backward_watched(model)
        model(ids, labels=ids).loss.backward()
        assert (backwards, torch.get_num_threads()) == ([TOTAL - 1], TOTAL)


@pytest.mark.parametrize("available", [2, 4, 6, 9])
def test_what_is_planned_with_is_what_is_lent(cores: Callable[[int], None], available: int) -> None:
    cores(available)
    advisor = Advisor(FAPoolConfig(threads_per_rank=2), Counters())
    assert advisor.cores(TOTAL) == Cores(TOTAL, 2, max(0, available - TOTAL))
