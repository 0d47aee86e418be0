"""Keys that live on the pool and are lost, or do not fit: the same answers, or a refusal before anything is sent."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base import admission
from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.base.owned import OwnedKeys
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from tests.kv_home import LENGTHS, ON_THE_POOL, Steps, kill
from tests.models import (
    Pair,
    assert_close,
    eager,
    greedily,
    logits_too,
    padded_batch,
    pooled,
    random_ids,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]


@pytest.mark.parametrize("at", ["prompt", "step", "between"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_lost_keys_are_computed_once_more(pair: Pair, at: str, ranks: int) -> None:
    calls = 0

    def lose(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == {"prompt": 2, "step": 6, "between": 0}[at]:
            kill(ranks)

    hook = pair.model.model.layers[0].register_forward_hook(lose)
    # A hook leaves the prompt in one block: 1 call of it, and one of each step.
    ids, mask = padded_batch(LENGTHS)
    with torch.no_grad():
        if at == "prompt":  # a second prompt, which the first has borrowed ranks for
            pair.model(ids, attention_mask=mask, use_cache=True)
        steps = Steps(pair, ids, mask)
        for number in range(4):
            steps(1, f"step {number}")
            if at == "between" and number == 1:
                kill(ranks)
        steps(5, "at last")
    hook.remove()
    stats = pair.model.fa_pool.stats()
    assert stats["faults"] == ranks
    assert stats["replays"] == (0 if at == "prompt" else 1)
    # The hook is the user's: it sees what the user's forwards do, not what is computed once more.
    assert calls == (7 if at == "prompt" else 6) + (at != "between"), "calls that a hook saw"


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("lost", [1, 2])
def test_a_peer_takes_a_lost_owners_place(folder: Path, lost: int, blocks: int) -> None:
    """The first is replaced by its peer; when that goes, too, no rank has its keys, and they are replayed."""
    settings = ON_THE_POOL | {"kv_redundancy": "peer", "blocks": blocks, "base_share": 0.0}
    with Pair.of(folder, pool_ranks=3, **settings) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([200, 131, 200]))
        held = pair.model.fa_pool.stats()["kv_bytes"]["ranks"]
        total = (200 + 131 + 200) * 2 * 2 * 3 * 8 * 4
        assert sum(held.values()) == 2 * total, "not each key is there twice"
        for number in range(lost):
            steps(1, f"step {number}")
            kill(1)
            steps(70, f"after loss {number}")
            steps(1, f"step after loss {number}")
        steps.both(lambda cache: cache.reorder_cache(torch.tensor([2, 1, 0])))
        steps.mask = steps.mask[[2, 1, 0]]
        steps(2, "reordered")
        stats = pair.model.fa_pool.stats()
    assert stats["faults"] == lost
    assert stats["replays"] == lost - 1


@pytest.mark.parametrize("redundancy", ["peer", "recompute"])
@pytest.mark.parametrize("at", [3, 6])
def test_an_owner_is_lost_in_mid_prompt(
    folder: Path, redundancy: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With four blocks in flight: at the third call, in the first round, or at the sixth, in the second."""
    sent, calls = OwnedKeys.sent, 0

    def lose(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        sent(self, *args)
        if calls == at:
            kill(1)

    settings = ON_THE_POOL | {"kv_redundancy": redundancy, "blocks": 4}
    with Pair.of(folder, pool_ranks=2, **settings) as pair, torch.no_grad():
        pair.model(random_ids(1, 60), use_cache=True)
        monkeypatch.setattr(OwnedKeys, "sent", lose)
        steps = Steps(pair, *padded_batch([300, 270]))
        steps(1, "a step")
        stats = pair.model.fa_pool.stats()
    assert stats["faults"] == 1
    # A peer answered in the lost rank's place, or the forward began again, or the next one found that keys were lost.
    assert (calls, stats["replays"]) == (10, 0) if redundancy == "peer" else calls > 10


def test_keys_written_by_hand_cannot_be_replayed(steps: Steps) -> None:
    """A replay would give those that were there before, without a word."""
    with pytest.warns(RuntimeWarning, match="fetched"):
        steps.both(lambda cache: cache.layers[0].values[:, :, 40:50].mul_(3.0))
    steps(1, "after they were written to")
    kill(1)
    with pytest.raises(RuntimeError, match="written by hand"):
        steps(1, "refused")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_keys_of_a_copy_come_back(steps: Steps, copied: Callable[[Any], Any]) -> None:
    steps.cache, steps.expected = copied(steps.cache), copy.deepcopy(steps.expected)
    steps(1, "the copy")
    kill(1)
    steps(1, "after a loss")
    assert steps.pair.model.fa_pool.stats()["replays"] == 1


def test_embeddings_are_replayed_where_no_ids_were_given(pair: Pair) -> None:
    ids, mask = padded_batch(LENGTHS)
    with torch.no_grad():
        embeds = pair.reference.get_input_embeddings()(ids) * 1.5
        cache, expected = (
            model(inputs_embeds=embeds.clone(), attention_mask=mask, use_cache=True).past_key_values
            for model in (pair.model, pair.reference)
        )
        embeds.zero_()  # what was given is the caller's to change
        for number in range(2):
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
            step = random_ids(len(ids), 1, seed=number)
            actual, wanted = (
                model(step, attention_mask=mask, past_key_values=past).logits
                for model, past in ((pair.model, cache), (pair.reference, expected))
            )
            assert_close(actual, wanted, what=f"step {number}")
            if not number:
                kill(1)
    assert pair.model.fa_pool.stats()["replays"] == 1


@pytest.mark.parametrize("change", ["in place", "behind its version"])
def test_changed_weights_cannot_bring_keys_back(steps: Steps, change: str) -> None:
    weight = steps.pair.model.lm_head.weight
    (weight if change == "in place" else weight.data).mul_(2.0)
    kill(1)
    with pytest.raises(RuntimeError, match="weights or adapters have changed"):
        steps(1, "refused")


@pytest.mark.parametrize("changed", [False, True])
def test_weights_of_inference_mode_have_no_version(folder: Path, *, changed: bool) -> None:
    """So all that they are is compared: one entry suffices."""
    with torch.inference_mode(), Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair:
        linear = pair.model.model.layers[0].mlp.up_proj
        linear.weight = weight = torch.nn.Parameter(linear.weight.clone(), requires_grad=False)
        assert weight.is_inference()
        steps = Steps(pair, *padded_batch(LENGTHS))
        kill(1)
        if not changed:
            steps(1, "after a loss")
            return
        weight[31, 17] += 1.0
        with pytest.raises(RuntimeError, match="weights or adapters have changed"):
            steps(1, "refused")


def test_what_does_not_fit_is_refused_before_anything_is_sent(folder: Path) -> None:
    with pooled(folder, pool_ranks=1, memory_limit_mib=1, base_share=0.0, **ON_THE_POOL) as model, torch.no_grad():
        ids = random_ids(12, 250)
        with pytest.raises(PoolMemoryError, match=r"12 sequences of up to 250 tokens need .* MiB.*Raise pool_ranks"):
            model(ids, use_cache=True)
        assert model.fa_pool.stats()["ranks"][0]["calls"] == 0
        # What fits is pooled as if nothing had been.
        assert_close(model(ids[:2], use_cache=True).logits, eager(folder)(ids[:2]).logits)


def test_owners_that_are_short_of_memory_get_less(folder: Path) -> None:
    with pooled(folder, pool_ranks=1, memory_limit_mib=1, base_share=0.05, **ON_THE_POOL) as model, torch.no_grad():
        ids = random_ids(14, 250)
        output = model(ids, use_cache=True)
        assert_close(output.logits, eager(folder)(ids).logits)
        held = model.fa_pool.stats()["kv_bytes"]
        total = held["base"] + held["ranks"][0]
        assert 0.95 * total > 2**20 >= held["ranks"][0] > 0.7 * 2**20, held


def test_owners_of_many_short_rows_are_short_of_memory_too(folder: Path) -> None:
    """A third of all keys are those of the 14 shortest rows, and each row has the room of the longest."""
    settings = ON_THE_POOL | {"memory_limit_mib": 1}
    ids, mask = padded_batch(list(range(20, 260, 10)))
    with pooled(folder, pool_ranks=2, **settings) as model, torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
        held = model.fa_pool.stats()["kv_bytes"]
        real = mask.bool()
        assert_close(output.logits[real], eager(folder)(ids, attention_mask=mask).logits[real])
        assert len(held["ranks"]) == 2, held


def test_a_known_length_needs_the_room_of_that_length(folder: Path) -> None:
    """In blocks of 256 positions 15 sequences of 140 would need 1.4 MiB; they have 0.77."""
    settings = ON_THE_POOL | {"memory_limit_mib": 1, "base_share": 0.0, "kv_block": 256}
    with Pair.of(folder, pool_ranks=1, **settings) as pair:
        mask = torch.ones(15, 136, dtype=torch.long)
        actual, expected = pair.generate(random_ids(15, 136), prefill=1, decode=3, **greedily(4, mask), **logits_too())
        for one, other in zip(actual.logits, expected.logits, strict=True):
            assert_close(one, other)
        assert pair.model.fa_pool.stats()["ranks"][0]["calls"] == 8


@pytest.mark.parametrize("limit", ["left_for_job", "left_for_process"])
def test_a_base_with_little_memory_refuses_or_gives_the_ranks_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Beside the activations of three waves, and beside what local ranks will take of a machine's memory."""
    settings = ON_THE_POOL | {"memory_limit_mib": 1, "base_share": 0.9, "wave_mib": 1}
    beside = (3 + (limit == "left_for_job")) * 2**20
    with pooled(folder, pool_ranks=1, **settings) as model, torch.no_grad():
        ids = random_ids(8, 250)
        monkeypatch.setattr(admission, limit, lambda: beside + 2**18)
        output = model(ids, use_cache=True)
        assert_close(output.logits, eager(folder)(ids).logits)
        held = model.fa_pool.stats()["kv_bytes"]
        assert 0 < held["base"] <= 2**18 < held["ranks"][0], held
        del output
        monkeypatch.setattr(admission, limit, lambda: beside - 1)
        with pytest.raises(PoolMemoryError, match=r"16 sequences .* 1 MiB free \(memory_limit_mib 1\) and the base 0"):
            model(random_ids(16, 250), use_cache=True)


def test_a_base_whose_memory_ends_refuses_and_goes_on(folder: Path) -> None:
    settings = ON_THE_POOL | {"base_share": 0.5, "kv_block": 16}
    with Pair.of(folder, pool_ranks=1, **settings) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch(LENGTHS))
        own, length, mask = steps.cache.state.owned.own, steps.cache.get_seq_length(), steps.mask
        limit, own.limit_bytes = own.limit_bytes, own.nbytes
        with pytest.raises(PoolMemoryError, match=r"the base has no memory for more keys.*as it was"):
            steps(40, "too much")
        assert steps.cache.get_seq_length() == length
        assert pair.model.fa_pool.stats()["replays"] == 0
        own.limit_bytes, steps.mask = limit, mask
        steps.expected.crop(length - steps.expected.get_seq_length() or 0)
        steps(40, "what fits now")


def test_growth_that_does_not_fit_leaves_the_cache_as_it_was(folder: Path) -> None:
    settings = ON_THE_POOL | {"memory_limit_mib": 1, "base_share": 0.0, "kv_block": 16}
    with Pair.of(folder, pool_ranks=1, **settings) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([200] * 12))
        length, mask = steps.cache.get_seq_length(), steps.mask
        with pytest.raises(PoolMemoryError, match=r"no room for more keys.*as it was"):
            steps(50, "too much")
        assert steps.cache.get_seq_length() == length
        steps.mask = mask
        steps.expected.crop(length - steps.expected.get_seq_length() or 0)
        steps(1, "what fits")


def test_what_cannot_be_together_is_refused() -> None:
    for settings, told in (
        ({"spot_check": 0.5}, "spot_check needs keys that the base has"),
        ({"kv_redundancy": "peer", "pool_ranks": 1}, "a peer is a second pool rank"),
        ({"kv_redundancy": "host"}, "host keeps a copy beside a device"),
    ):
        with pytest.raises(FAPoolConfigError, match=told):
            FAPoolConfig(kv_home="pool", **settings)
