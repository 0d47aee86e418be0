"""Keys that live on the pool: kept nowhere else, and every way to use a cache gives what the plain model gives.

References are the model's own eager attention; that keys are nowhere else is asked of the cache and of stats().
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.advisor import Advisor
from fapool_plugin.integrations.huggingface.layer import PooledLayer
from fapool_plugin.plan.shares import Geometry
from tests.kv_home import LENGTHS, NEW, ON_THE_POOL, Steps, kill
from tests.models import (
    TOLERANCE,
    Pair,
    assert_close,
    assert_same_tokens,
    greedily,
    logits_too,
    padded_batch,
    random_ids,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("partition", ["line", "query_blocks"])
@pytest.mark.parametrize("base_share", [0.0, None])
def test_generate(folder: Path, ranks: int, partition: str, base_share: float | None) -> None:
    ids, mask = padded_batch(LENGTHS)
    settings = ON_THE_POOL | {"partition": partition, "base_share": base_share}
    with Pair.of(folder, pool_ranks=ranks, **settings) as pair:
        actual, expected = pair.generate(ids, prefill=1, decode=NEW - 1, **greedily(NEW, mask), **logits_too())
        assert_same_tokens(actual.sequences, expected.sequences)
        for one, other in zip(actual.logits, expected.logits, strict=True):
            assert_close(one, other)
        # Every position that was computed, once: K and V of 2 layers, 3 heads of 8, in fp32.
        held = pair.model.fa_pool.stats()["kv_bytes"]
        total = sum(length + NEW - 1 for length in LENGTHS) * 2 * 2 * 3 * 8 * 4
        assert held["base"] + sum(held["ranks"].values()) == total
        assert bool(held["base"]) == (base_share is None)


def test_a_prompt_in_waves(folder: Path) -> None:
    """Of 300 columns in blocks of 64, two of them in flight: within 1 MiB of activations."""
    settings = ON_THE_POOL | {"wave_mib": 1, "blocks": 2}
    ids, mask = padded_batch([300, 233, 300])
    with Pair.of(folder, pool_ranks=2, **settings) as pair:
        # Only the last position is asked for, so that others are dropped.
        actual, expected = pair.generate(ids, prefill=5, decode=NEW - 1, **greedily(NEW, mask), **logits_too())
        assert_same_tokens(actual.sequences, expected.sequences)
        for one, other in zip(actual.logits, expected.logits, strict=True):
            assert_close(one, other)
        with torch.no_grad():
            real = mask.bool()
            logits = pair.model(ids, attention_mask=mask, use_cache=True).logits
            assert_close(logits[real], pair.reference(ids, attention_mask=mask).logits[real], what="all positions")


def test_a_batch_gives_its_memory_back_with_its_cache(pair: Pair) -> None:
    with torch.no_grad():
        cache = pair.model(random_ids(2, 50), use_cache=True).past_key_values
    assert sum(pair.model.fa_pool.stats()["kv_bytes"]["ranks"].values())
    del cache
    assert pair.model.fa_pool.stats()["kv_bytes"] == {"base": 0, "ranks": {}}
    assert pair.model.fa_pool.stats()["leased_ranks"] == []


def test_steps_blocks_and_crops(steps: Steps) -> None:
    assert steps.are_away()
    for count in (1, 1, 5, 70, 1):
        steps(count, f"{count} more")
    steps.both(lambda cache: cache.crop(-9))
    steps.mask = steps.mask[:, :-9]
    for count in (1, 20, 1):
        steps(count, f"{count} after crop")
    assert steps.are_away()
    assert steps.cache.get_seq_length() == steps.expected.get_seq_length()


@pytest.mark.parametrize("autocast", [(), (0,), (1, 2), (0, 1, 2)])
def test_autocast_in_some_of_the_forwards(pair: Pair, autocast: tuple[int, ...]) -> None:
    def forward(number: int) -> Any:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=number in autocast)

    with torch.no_grad():
        with forward(0):
            steps = Steps(pair, *padded_batch(LENGTHS))
        for number in range(1, 4):
            with forward(number):
                steps(1, f"step {number}", tolerance=5e-2 if autocast else TOLERANCE)
            if number == 2:
                kill(1)


def test_a_model_that_needs_all_keys_has_them(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layer looks at how many keys its cache gives it, as some make masks of them."""
    update = PooledLayer.update

    def counting(self: Any, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = update(self, k, v, *args, **kwargs)
        if self.index == 1 and keys.shape[2] != self.get_seq_length():
            raise RuntimeError("17 keys where there should be 18")
        return keys, values

    with torch.no_grad():
        steps = Steps(pair, *padded_batch(LENGTHS))
        monkeypatch.setattr(PooledLayer, "update", counting)
        steps(1, "a step")
        assert not steps.are_away()
        steps(1, "another")
        told = [event["reason"] for event in pair.model.fa_pool.stats()["events"] if event["kind"] == "home"]
    assert told == ["this model needs all keys here: 17 keys where there should be 18"]


def test_what_a_model_raises_is_raised(pair: Pair) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("the user's")

    with torch.no_grad():
        steps = Steps(pair, *padded_batch(LENGTHS))
        hook = pair.model.model.layers[1].register_forward_hook(fail)
        more = torch.cat([steps.mask, steps.mask.new_ones(3, 1)], dim=1)
        with pytest.raises(ZeroDivisionError, match="the user's"):
            pair.model(random_ids(3, 1), attention_mask=more, past_key_values=steps.cache)
        hook.remove()
        steps(1, "as if nothing had been")
        assert steps.are_away()


def test_inference_mode_and_no_grad_by_turns(pair: Pair) -> None:
    for first, then in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        with first():
            steps = Steps(pair, *padded_batch(LENGTHS))
            steps(1, "in the first mode")
        with then():
            steps(1, "in the second")
            steps.both(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])))
            steps.mask = steps.mask[[2, 0, 1]]
            steps(2, "reordered")
        with first():
            steps(1, "in the first again")


def test_keys_can_be_read_and_written(steps: Steps) -> None:
    steps(3, "before")
    real = steps.mask.bool()[:, None, :, None]
    with pytest.warns(RuntimeWarning, match="fetched"):
        keys = steps.cache.layers[1].keys
    assert_close(keys * real, steps.expected.layers[1].keys * real, what="keys")
    steps(1, "after they were read")
    assert steps.are_away()
    with pytest.warns(RuntimeWarning, match="fetched"):
        steps.both(lambda cache: cache.layers[0].values[:, :, 40:50].mul_(3.0))
    steps(1, "after they were written to")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_go_their_own_way(steps: Steps, copied: Callable[[Any], Any]) -> None:
    first, mask = steps.cache, steps.mask
    steps.cache, steps.expected = copied(first), copy.deepcopy(steps.expected)
    steps(2, "the copy")
    steps.both(lambda cache: cache.crop(-2))
    steps.cache, steps.mask = first, mask
    assert first.get_seq_length() == mask.shape[1]
    steps(2, "the original")


@pytest.mark.parametrize("rows", [[0, 0, 2], [2, 1, 0]])
@pytest.mark.parametrize("owners", [1, 2])
def test_rows_become_others(folder: Path, rows: list[int], owners: int) -> None:
    """Of other prompts: by way of the base; or by the one rank that owns everything."""
    index = torch.tensor(rows)
    settings = ON_THE_POOL | {"base_share": 0.0}
    with Pair.of(folder, pool_ranks=owners, **settings) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch(LENGTHS))
        steps.both(lambda cache: cache.reorder_cache(index))
        steps.mask = steps.mask[index]
        steps(2, "reordered")
        assert steps.are_away()
        home = [event for event in pair.model.fa_pool.stats()["events"] if event["kind"] == "home"]
        assert bool(home) == (owners > 1)


def test_rows_are_repeated_and_selected(steps: Steps) -> None:
    steps.both(lambda cache: cache.batch_repeat_interleave(2))
    steps.mask = steps.mask.repeat_interleave(2, dim=0)
    steps(1, "repeated")
    index = torch.tensor([0, 3, 5])
    steps.both(lambda cache: cache.batch_select_indices(index))
    steps.mask = steps.mask[index]
    steps(1, "selected")
    # What is lost afterwards comes back for the rows that there are now.
    kill(1)
    steps(1, "after a loss")
    assert steps.pair.model.fa_pool.stats()["replays"] == 1


@pytest.mark.parametrize("beams", [3])
def test_beams_stay_where_their_prompt_is(pair: Pair, beams: int) -> None:
    ids, mask = padded_batch([70, 52])
    arguments = greedily(NEW, mask, num_beams=beams)
    actual, expected = pair.generate(ids, prefill=1, decode=NEW - 1, **arguments)
    assert_same_tokens(actual, expected)
    assert not [event for event in pair.model.fa_pool.stats()["events"] if event["kind"] == "home"]


@pytest.mark.parametrize("more", [{"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 32}])
def test_other_ways_to_generate(pair: Pair, more: dict[str, Any]) -> None:
    ids = random_ids(1, 90)
    expected = pair.reference.generate(ids, **greedily(NEW), **more)
    assert_same_tokens(pair.model.generate(ids, **greedily(NEW), **more), expected)
    assert pair.model.fa_pool.stats()["decode"]["pooled_calls"]


def test_a_short_sequence_that_grows_gives_its_keys_away(folder: Path) -> None:
    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([12, 9]))
        assert not steps.are_away()
        steps(10, "over the threshold")
        assert steps.are_away()
        steps(1, "a step")
        steps.both(lambda cache: cache.crop(-12))
        steps.mask = steps.mask[:, :-12]
        steps(1, "under the threshold again")
        assert not steps.are_away()


@pytest.mark.parametrize("turns", [2, 3])
@pytest.mark.parametrize("partition", ["line", "query_blocks"])
def test_parts_in_turns(folder: Path, turns: int, partition: str) -> None:
    settings = ON_THE_POOL | {"turns": turns, "partition": partition}
    with Pair.of(folder, pool_ranks=2, **settings) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([90, 61, 90, 75]))
        calls = pair.model.fa_pool.stats()["decode"]["pooled_calls"]
        for number in range(3):
            steps(1, f"step {number}")
        assert pair.model.fa_pool.stats()["decode"]["pooled_calls"] - calls == 3 * 2 * turns
        assert steps.are_away()
        steps.both(lambda cache: cache.crop(-2))
        steps.mask = steps.mask[:, :-2]
        steps(1, "after crop")
        kill(1)
        steps(1, "after a loss")
        steps(5, "a block")
        steps(1, "at last")
        stats = pair.model.fa_pool.stats()
    assert (stats["faults"], stats["replays"]) == (1, 1)
    with Pair.of(folder, pool_ranks=2, **settings) as pair:
        ids, mask = padded_batch([70, 52])
        actual, expected = pair.generate(ids, prefill=1, decode=turns * (NEW - 1), **greedily(NEW, mask, num_beams=3))
        assert_same_tokens(actual, expected)


def test_turns_are_taken_where_the_plan_expects_a_gain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = 2

    def asked(self: Any, geometry: Geometry, ranks: int, base_share: float) -> int:
        assert (len(geometry.starts), ranks) == (4, 2)
        assert base_share == pytest.approx(1 / 3, abs=0.05)
        return expected

    monkeypatch.setattr(Advisor, "turns", asked)
    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([90] * 4))
        for expected in (2, 1):
            calls = pair.model.fa_pool.stats()["decode"]["pooled_calls"]
            steps(1, "a step")
            assert pair.model.fa_pool.stats()["decode"]["pooled_calls"] - calls == 2 * expected
        # Rows of a model that looks into a step are not parted.
        hook = pair.model.model.layers[0].register_forward_hook(lambda *_: None)
        steps(1, "with a hook")
        hook.remove()
