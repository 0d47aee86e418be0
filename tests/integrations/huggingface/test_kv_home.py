"""Keys that live on the pool: nobody else keeps them, and every way to use a cache gives what the plain model gives.

References are the model's own eager attention; that keys are nowhere else is asked of the cache and of stats().
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.base.owned import OwnedKeys
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.integrations.huggingface.layer import PooledLayer
from tests.models import (
    TOLERANCE,
    Pair,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    logits_too,
    one_thread,
    padded_batch,
    pooled,
    random_ids,
    save_model,
    workers,
)

ON_THE_POOL: dict[str, Any] = {"kv_home": "pool", "timeout_s": 2.0}
LENGTHS = [90, 61, 90]
NEW = 6

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair:
        yield pair


def kill(count: int) -> None:
    for pid in sorted(workers())[:count]:
        psutil.Process(pid).kill()


class Steps:
    """The same tokens to both models, each with a cache of its own."""

    def __init__(self, pair: Pair, ids: Tensor, mask: Tensor) -> None:
        self.pair, self.mask = pair, mask
        self.cache, self.expected = (
            model(ids, attention_mask=mask, use_cache=True).past_key_values for model in (pair.model, pair.reference)
        )

    def __call__(self, count: int, what: str, tolerance: float = TOLERANCE) -> None:
        ids = random_ids(self.mask.shape[0], count, seed=count)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), count)], dim=1)
        actual, expected = (
            model(ids, attention_mask=self.mask, past_key_values=cache).logits
            for model, cache in ((self.pair.model, self.cache), (self.pair.reference, self.expected))
        )
        assert_close(actual, expected, what=what, tolerance=tolerance)

    def both(self, change: Callable[[Any], object]) -> None:
        change(self.cache)
        change(self.expected)

    def are_away(self) -> bool:
        """Whether no layer has keys here."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, PooledLayer)]
        assert layers
        return all(vars(layer)["_away"] and not layer._kv.length for layer in layers)


@pytest.fixture
def steps(pair: Pair) -> Iterator[Steps]:
    with torch.no_grad():
        yield Steps(pair, *padded_batch(LENGTHS))


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
    """The first is replaced by its peer; when that goes, too, nobody has its keys, and they are replayed."""
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


def test_changed_weights_cannot_bring_keys_back(steps: Steps) -> None:
    steps.pair.model.lm_head.weight.mul_(2.0)
    kill(1)
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
