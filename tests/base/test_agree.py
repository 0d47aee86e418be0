"""What base ranks agree on before a long forward: asked once, with this rank's answer, and obeyed whatever it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from fapool_plugin.base.agreement import agree_over
from fapool_plugin.plan.profile import Profile
from tests.base.test_advisor import DEAR, LAYERS, calls, planned, profile_of
from tests.base_ranks import base_ranks
from tests.models import THRESHOLD, assert_close, eager, one_thread, plain, random_ids, save_model

LONG = 300
LOCAL, ALONE, POOLED = range(3)
MODES = {"local": LOCAL, "alone": ALONE, "pooled": POOLED}


@pytest.fixture(autouse=True)
def _one_thread_of_eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=1024)


class Other:
    """Base rank 0 as its answer; None agrees with everything."""

    def __init__(self, answer: tuple[int, int] | None = None) -> None:
        self.answer = answer
        self.asked: list[tuple[int, int]] = []

    def __call__(self, mine: tuple[int, int]) -> tuple[int, int]:
        self.asked.append(mine)
        return mine if self.answer is None else self.answer


def rules(folder: Path) -> dict[str, tuple[str, Profile | None]]:
    reference = plain(folder)
    return {
        "length": ("length", None),
        "length, with a profile": ("length", profile_of(reference)),
        "cost, pooled": ("cost", profile_of(reference)),
        "cost, not pooled": ("cost", profile_of(reference, link=DEAR)),
    }


@pytest.mark.parametrize("rule", ["length", "length, with a profile", "cost, pooled", "cost, not pooled"])
def test_asked_once_in_every_forward_above_the_threshold(folder: Path, rule: str) -> None:
    activation, profile = rules(folder)[rule]
    with planned(folder, profile, activation=activation, blocks=3) as model, torch.no_grad():
        model.fa_pool._agree = other = Other()
        model(random_ids(1, THRESHOLD))
        assert other.asked == [], "not above the threshold"
        pooled = rule != "cost, not pooled"
        cache = model(random_ids(1, LONG)).past_key_values
        assert other.asked == [(POOLED, 3) if pooled else (LOCAL, 1)]
        for _ in range(2):
            model(random_ids(1, 1), past_key_values=cache)
        assert other.asked[1:] == [(POOLED, 1) if pooled else (ALONE, 1)] * 2


@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rule", ["length", "cost, pooled", "cost, not pooled"])
def test_the_answer_is_obeyed(folder: Path, rule: str, mode: str, blocks: int) -> None:
    activation, profile = rules(folder)[rule]
    reference, stock, ids = eager(folder), plain(folder), random_ids(2, LONG)
    with planned(folder, profile, activation=activation) as model, torch.no_grad():
        model.fa_pool._agree = Other((MODES[mode], blocks))
        got, want = model(ids), reference(ids)
        assert_close(got.logits, want.logits)
        stats = model.fa_pool.stats()
        if mode == "local":
            assert torch.equal(got.logits, stock(ids).logits)
            assert calls(model)["prefill"] == (0, LAYERS)
        else:
            assert calls(model)["prefill"] == ((LAYERS * blocks, 0) if mode == "pooled" else (0, LAYERS * blocks))
            assert stats["prefill"]["overlapped_forwards"] == (blocks > 1)
        assert (stats["prefill"]["pooled_forwards"], stats["activations"]) == ((1, 1) if mode == "pooled" else (0, 0))
        model.fa_pool._agree = Other((MODES[mode], 1))
        step = model(ids[:, :1], past_key_values=got.past_key_values).logits
        assert_close(step, reference(ids[:, :1], past_key_values=want.past_key_values).logits, what="a step's logits")
        assert calls(model)["decode"] == ((LAYERS, 0) if mode == "pooled" else (0, LAYERS))


@pytest.mark.parametrize("blocks", [1, 4])
def test_without_ranks_the_order_of_blocks_stays(folder: Path, blocks: int) -> None:
    """The other base ranks have theirs: collectives of all blocks must come in the same order here."""

    def no_pool(config: Any) -> Any:
        raise RuntimeError("no ranks here")

    reference, ids = eager(folder), random_ids(1, LONG)
    with planned(folder, activation="length", blocks=blocks) as model, torch.no_grad():
        model.fa_pool._agree, model.fa_pool.leases.source = Other(), no_pool
        with pytest.warns(RuntimeWarning, match="no ranks here"):
            got = model(ids).logits
        assert_close(got, reference(ids).logits)
        stats = model.fa_pool.stats()
        assert calls(model)["prefill"] == (0, LAYERS * blocks)
        assert stats["prefill"]["overlapped_forwards"] == (blocks > 1)
        assert stats["local_reasons"] == {"no pool rank was to be had for this sequence": 1}


def over_devices(group: Any, answers: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Two models' agreements on ranks whose group would move nothing but what is on devices."""
    rank = distributed.get_rank(group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "get_backend_config", lambda group=None: "cuda:nccl")
        patch.setattr(distributed, "all_reduce", lambda *args, **keys: pytest.fail("over the devices' group"))
        first, second = agree_over(group), agree_over(group)
        return [first(answers[rank]), second((7 - rank, rank)), first(answers[rank])]


@pytest.mark.processes
@pytest.mark.timeout(300)
def test_groups_of_devices_agree_on_their_hosts(tmp_path: Path) -> None:
    """So no decode step waits for all that was launched before it."""
    with base_ranks(tmp_path) as ranks:
        for found in ranks.run(2, over_devices, [(2, 4), (3, 1)]):
            assert found == [(2, 1), (6, 0), (2, 1)]
