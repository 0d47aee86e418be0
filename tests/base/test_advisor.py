"""What a profile makes of a model's forwards: pooled, the base alone or local, and what is learned when it was wrong.

Profiles are made by hand, so extreme that only one answer can be right; pool ranks are threads.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base.advisor import Advisor
from fapool_plugin.base.forward import Forward
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.huggingface.linear import shape_of
from fapool_plugin.kernels import lanes
from fapool_plugin.measure.calibrate import machine
from fapool_plugin.observe.metrics import Counters, Phase
from fapool_plugin.plan.forecast import Choice
from fapool_plugin.plan.profile import AttentionCost, Fit, LinearCost, LinkCost, Profile
from fapool_plugin.plan.shares import Geometry
from tests.models import (
    THRESHOLD,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    load_pooled,
    logits_too,
    one_thread,
    plain,
    random_ids,
    save_model,
)
from tests.thread_pool import ThreadPool

LAYERS, LENGTH = 2, 40
FREE, DEAR = Fit(), Fit(a=1e9)
MUCH, LITTLE = Fit(c=1.0, b=1.0), Fit(a=1e-9, b=1e-9)


@pytest.fixture(autouse=True)
def _one_thread_of_eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with one_thread():
        yield


def profile_of(
    model: Any, *, prefill: Fit = MUCH, decode: Fit = MUCH, linear: Fit = LITTLE, link: Fit = FREE, **changes: Any
) -> Profile:
    """What this machine and this model might have cost: attention's two fits, the linear part's and the link's."""
    shape = shape_of(model)
    return Profile(
        date="",
        quick=False,
        machine=machine(),
        shape=shape,
        attention=(AttentionCost(kernel="torch", dtype=shape.dtype, threads=1, prefill=prefill, decode=decode),),
        linear=(LinearCost(threads=1, prefill=linear, decode=linear),),
        link=LinkCost(to_rank=link, to_base=link, send=link, take=link),
        activation_s=0.0,
    ).model_copy(update=changes)


@contextmanager
def planned(folder: Path, profile: Profile | None = None, /, **settings: Any) -> Iterator[Any]:
    """The model with threads for pool ranks, planned with ``profile`` if there is one."""
    if profile is not None:
        path = folder / "profile.json"
        profile.save(path)
        settings["profile"] = str(path)
    defaults: dict[str, Any] = {"activation": "cost", "pool_ranks": 1, "blocks": None}
    model = load_pooled(folder, **defaults | settings)
    model.fa_pool.leases.source = ThreadPool
    with model.fa_pool:
        yield model


def calls(model: Any) -> dict[str, tuple[int, int]]:
    """(pooled, local) attention calls of both phases."""
    stats = model.fa_pool.stats()
    return {phase: (stats[phase]["pooled_calls"], stats[phase]["local_calls"]) for phase in ("prefill", "decode")}


def kinds(model: Any) -> list[str]:
    return [event["kind"] for event in model.fa_pool.stats()["events"]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_where_attention_rules_and_links_are_free_everything_is_pooled(folder: Path, ranks: int) -> None:
    reference, ids = eager(folder), random_ids(2, LENGTH)
    expected = reference.generate(ids, **greedily(5), **logits_too())
    with planned(folder, profile_of(reference), pool_ranks=ranks) as model:
        result = model.generate(ids, **greedily(5), **logits_too())
        assert calls(model) == {"prefill": (LAYERS, 0), "decode": (4 * LAYERS, 0)}
        assert [rank["calls"] for rank in model.fa_pool.stats()["ranks"]] == [5 * LAYERS] * ranks
        assert model.fa_pool.stats()["local_reasons"] == {}
    assert_same_tokens(result.sequences, expected.sequences)
    assert_close(torch.stack(result.logits), torch.stack(expected.logits))


def test_where_links_are_dear_nothing_is_borrowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill is transformers' own to the last bit; decode is ours, on the base."""
    reference, ids, more = plain(folder), random_ids(2, LENGTH), random_ids(2, 1, seed=1)
    with planned(folder, profile_of(reference, link=DEAR)) as model, torch.no_grad():
        first, expected = model(ids), reference(ids)
        assert torch.equal(first.logits, expected.logits), (first.logits - expected.logits).abs().max()
        ours: list[int] = []
        attend = lanes.attend
        monkeypatch.setattr(lanes, "attend", lambda *args, **keys: ours.append(1) or attend(*args, **keys))  # type: ignore[func-returns-value]
        step = model(more, past_key_values=first.past_key_values).logits
        assert len(ours) >= LAYERS, "not our kernel"
        assert_close(step, reference(more, past_key_values=expected.past_key_values).logits)
        assert calls(model) == {"prefill": (0, LAYERS), "decode": (0, LAYERS)}
        assert (kinds(model), model.fa_pool.leases.pool) == ([], None)
        stats = model.fa_pool.stats()
    assert stats["local_reasons"] == {
        f"the plan: {phase} is predicted to be faster without pool ranks": 1 for phase in ("prefill", "decode")
    }
    assert [stats[phase]["local_forwards"] for phase in ("prefill", "decode")] == [1, 1]
    assert [stats[phase]["pooled_forwards"] for phase in ("prefill", "decode")] == [0, 0]


def test_the_length_rule_pools_whatever_it_costs_and_takes_the_plans_share_and_blocks(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, max_position_embeddings=1024)
    reference, ids = eager(folder), random_ids(1, 600)
    seen: list[Forward] = []
    with planned(folder, profile_of(reference, link=DEAR), activation="length") as model, torch.no_grad():
        manager = model.fa_pool
        begin = manager.begin
        manager.begin = lambda *args, **keys: seen.append(begin(*args, **keys)) or seen[-1]  # type: ignore[func-returns-value]
        assert_close(model(ids).logits, reference(ids).logits)
        assert seen[0].choice is not None
        assert seen[0].choice.alone_s < seen[0].choice.seconds
        assert (seen[0].blocks, seen[0].base_share) == (seen[0].choice.blocks, seen[0].choice.base_share)
        assert seen[0].blocks == 1, "each block is one dear message more"
        assert calls(model)["prefill"] == (LAYERS, 0)
        manager.advisor.profile = profile_of(reference, linear=Fit(b=400.0))
        assert_close(model(ids).logits, reference(ids).logits)
        assert seen[1].choice is not None
        assert seen[1].blocks == seen[1].choice.blocks > 1, "linear work hides behind attention"
        assert seen[1].base_share == seen[1].choice.base_share
        assert manager.stats()["prefill"]["overlapped_forwards"] == 1


@pytest.mark.parametrize("length", [THRESHOLD - 1, THRESHOLD, THRESHOLD + 1])
def test_the_threshold_stays_the_lower_bound(folder: Path, length: int) -> None:
    reference = plain(folder)
    with planned(folder, profile_of(reference)) as model, torch.no_grad():
        model(random_ids(1, length))
        assert calls(model)["prefill"] == ((LAYERS, 0) if length > THRESHOLD else (0, LAYERS))


def test_threads_set_later_are_planned_with(folder: Path) -> None:
    """With two threads the base does in no time what takes a rank of one thread long."""
    reference = plain(folder)
    profile = profile_of(reference)
    [one], fast = profile.attention, {"threads": 2, "decode": LITTLE, "prefill": LITTLE}
    two = profile.model_copy(update={"attention": (one, one.model_copy(update=fast))})
    with planned(folder, two, kv_block=64) as model, torch.no_grad():
        manager, geometry = model.fa_pool, Geometry((0,), (41,), 40, 41)
        manager.advisor.profile = two
        choices = [manager.advisor.decode(geometry, manager.advisor.cores(n), [60]) for n in (1, 2)]
    assert choices[0].alone_s > 1 > choices[1].alone_s, f"{choices}"


def test_changing_its_mind_sends_only_new_whole_blocks(folder: Path, spy: Callable[[], list[Any]]) -> None:
    """Pooled prompt, five steps alone, five pooled ones, and four of which the base does more itself."""
    block, reference, ids = 4, eager(folder), random_ids(2, LENGTH)
    steps = [random_ids(2, 1, seed=seed) for seed in range(1, 15)]
    pool, alone = profile_of(reference), profile_of(reference, decode=Fit(), link=DEAR)
    [one] = pool.attention
    less = pool.model_copy(update={"attention": (one, one.model_copy(update={"threads": 2, "decode": Fit(c=3.0)}))})
    shares: list[float] = []
    held: dict[tuple[Any, ...], int] = {}
    moved = 0
    with planned(folder, pool, pool_ranks=2, threads_per_rank=2, kv_block=block) as model, torch.no_grad():
        cache, kept = model(ids).past_key_values, reference(ids).past_key_values
        for _, layer, lane, _, stop in spy():
            held[layer, lane] = stop
        for number, step in enumerate(steps):
            model.fa_pool.advisor.profile = alone if number < 5 else pool if number < 10 else less
            before = model.fa_pool.stats()["bytes_sent"]
            got = model(step, past_key_values=cache).logits
            assert_close(got, reference(step, past_key_values=kept).logits, what=f"step {number}")
            told = spy()
            shares.append(model.fa_pool.advisor._steps[next(reversed(model.fa_pool.advisor._steps))].base_share)
            assert bool(told) == (number >= 5), f"step {number}: {told}"
            sent = model.fa_pool.stats()["bytes_sent"] - before
            assert sent > 0 if told else sent == 0
            for _, layer, lane, start, stop in told:
                if stop == start:
                    continue
                assert (layer, lane) in held, f"step {number}: lane {lane} was moved"
                assert start == held[layer, lane], f"step {number}: {start} of {held[layer, lane]} held"
                assert (stop - start) % block == 0, f"step {number}: {stop - start} keys are no whole blocks"
                held[layer, lane], moved = stop, moved + stop - start
        assert calls(model)["decode"] == (9 * LAYERS, 5 * LAYERS)
        assert model.fa_pool.stats()["stale"] == 0
    assert shares[5] < shares[-1] < 1, f"shares of the base: {shares}"
    assert 0 < moved <= LAYERS * 2 * 3 * len(steps), f"{moved} keys were moved"


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """What pool ranks were asked since the last look: (rank, layer, (rank, row, head), first and last new key)."""
    from fapool_plugin.base.lease import PoolRank

    ask = PoolRank.ask
    told: list[Any] = []

    def asked(self: PoolRank, header: Any, tensors: Any, expected: Any) -> int:
        for row, row_stop, first, last, *_, start, stop, _ in tensors[0].tolist():
            lanes = product(range(row, row_stop), range(first, last))
            told.extend((self.number, header.layer, (self.number, *lane), start, stop) for lane in lanes)
        return ask(self, header, tensors, expected)

    def since() -> list[Any]:
        found = told.copy()
        told.clear()
        return found

    monkeypatch.setattr(PoolRank, "ask", asked)
    return since


def choice(seconds: float, alone_s: float) -> Choice:
    return Choice(
        ranks=1,
        base_share=0.5,
        blocks=1,
        seconds=seconds,
        alone_s=alone_s,
        ceiling_s=0.0,
        base_busy_s=0.0,
        pool_busy_s=0.0,
    )


class Lesson:
    """An advisor that is told what forwards took: the profile always says 2 s pooled and 3 s alone."""

    def __init__(self) -> None:
        self.counters, self.config = Counters(), FAPoolConfig()
        self.advisor = Advisor(self.config, self.counters)

    def now(self, phase: Phase) -> Choice:
        """The profile's numbers, corrected."""
        return self.advisor._corrected(phase, choice(2.0, 3.0))

    def took(self, seconds: float, phase: Phase = "prefill", *, pooled: bool = True) -> None:
        rank: Any = type("Rank", (), {"lost": False})()
        forward = Forward(self.config, self.counters, phase, pooled=True, ranks=(rank,) if pooled else ())
        forward.geometry, forward.choice = Geometry((0,), (77,), 0, 77), self.now(phase)
        self.advisor.learn(forward, seconds)


def test_one_warning_and_another_plan_where_pooling_lost() -> None:
    lesson = Lesson()
    with pytest.warns(RuntimeWarning) as caught:
        lesson.took(18.0)
    assert len(caught) == 1
    for part in ("prefill at 77 tokens", "took 18 s with the pool", "predicted were 2 s", "3 s without"):
        assert part in str(caught[0].message)
    assert [event.kind for event in lesson.counters.events] == ["slow"]
    after = lesson.now("prefill")
    assert after.seconds == pytest.approx(2 * 3), "the square root of nine times"
    assert after.alone_s == 3.0
    assert lesson.now("decode") == choice(2.0, 3.0), "another phase is not concerned"


@pytest.mark.parametrize("seconds", [0.5, 2.0, 3.3])
def test_no_warning_where_it_came_as_predicted(seconds: float) -> None:
    lesson = Lesson()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lesson.took(seconds)
    assert not lesson.counters.events


def test_sixteen_steps_are_judged_together() -> None:
    lesson = Lesson()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(15):
            lesson.took(50.0, "decode")
    assert lesson.now("decode").seconds == 2.0
    with pytest.warns(RuntimeWarning, match=r"16 forward\(s\)") as caught:
        lesson.took(50.0, "decode")
    assert len(caught) == 1
    assert lesson.now("decode").seconds == pytest.approx(2 * 5)
    lesson = Lesson()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(16):
            lesson.took(3.5 if step == 3 else 2.0, "decode")
    assert lesson.now("decode").seconds == pytest.approx(2 * (33.5 / 32) ** 0.5)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("truth", [0.01, 0.5, 2.9])
def test_corrections_converge(pooled: bool, truth: float) -> None:
    """After n forwards the factor is (truth / profile) ** (1 - 2 ** -n)."""
    lesson, told = Lesson(), 2.0 if pooled else 3.0
    for count in range(1, 12):
        lesson.took(truth, pooled=pooled)
        corrected = lesson.now("prefill")
        found, other = (corrected.seconds, corrected.alone_s) if pooled else (corrected.alone_s, corrected.seconds)
        expected = told * (truth / told) ** (1 - 2.0**-count)
        assert found == pytest.approx(expected), f"{found} after {count}, {expected} expected"
        assert other == (3.0 if pooled else 2.0)
    counters = lesson.counters.prefill
    assert counters.measured_s == pytest.approx(11 * truth)
    assert counters.predicted_s == pytest.approx(sum(told * (truth / told) ** (1 - 2.0**-count) for count in range(11)))


def test_one_slow_pooled_forward_does_not_rule_for_ever() -> None:
    """What only pooled forwards correct is forgotten while the plan has none."""
    lesson = Lesson()
    with pytest.warns(RuntimeWarning):
        lesson.took(200.0)
    slow = lesson.now("prefill").seconds
    assert slow == pytest.approx(20.0)
    for count in range(1, 60):
        lesson.took(3.0, pooled=False)
        found = lesson.now("prefill").seconds
        assert found == pytest.approx(2 * 10 ** (0.95**count)), f"{found} after {count} local forwards"
    assert lesson.now("prefill").seconds < 3.0, "pooling is never tried again"


def test_a_forward_that_lost_a_rank_says_nothing_of_the_plan() -> None:
    lesson = Lesson()
    rank: Any = type("Rank", (), {"lost": True})()
    forward = Forward(lesson.config, lesson.counters, "prefill", pooled=True, ranks=(rank,), choice=choice(2.0, 3.0))
    lesson.advisor.learn(forward, 99.0)
    assert lesson.now("prefill") == choice(2.0, 3.0)
    assert lesson.counters.prefill.measured_s == 0


def test_a_slow_pooled_forward_is_followed_by_a_local_one(folder: Path) -> None:
    """The profile promises a nanosecond."""
    reference, ids = plain(folder), random_ids(1, LENGTH)
    fits = {"prefill": Fit(b=1e-11), "decode": Fit(b=1e-11), "linear": Fit(a=1e-12)}
    with planned(folder, profile_of(reference, **fits)) as model, torch.no_grad():
        with pytest.warns(RuntimeWarning, match="with the pool"):
            model(ids)
        assert calls(model)["prefill"] == (LAYERS, 0)
        assert "slow" in kinds(model)
        assert torch.equal(model(ids).logits, reference(ids).logits)
        assert calls(model)["prefill"] == (LAYERS, LAYERS)


def test_a_warning_made_an_error_leaves_the_model_usable(folder: Path) -> None:
    reference, ids = plain(folder), random_ids(1, LENGTH)
    fits = {"prefill": Fit(b=1e-11), "decode": Fit(b=1e-11), "linear": Fit(a=1e-12)}
    with planned(folder, profile_of(reference, **fits)) as model, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(RuntimeWarning, match="with the pool"):
                model(ids)
        assert not model.fa_pool.in_pooled_forward
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_an_interrupted_forward_teaches_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference, ids = plain(folder), random_ids(1, LENGTH)

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with planned(folder, profile_of(reference)) as model, torch.no_grad():
        model(ids)
        before = model.fa_pool.stats()["prefill"]["measured_s"]
        factors = str(model.fa_pool.advisor._records)
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].mlp, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                model(ids)
        assert model.fa_pool.stats()["prefill"]["measured_s"] == before > 0
        assert str(model.fa_pool.advisor._records) == factors
        model(ids)
        assert model.fa_pool.stats()["prefill"]["measured_s"] > before
