"""The cache belongs to its user: whatever is done to it between two calls counts, on the base and on pool ranks."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.kv_home import ON_THE_POOL, in_threads
from tests.models import (
    Pair,
    assert_close,
    greedily,
    load_pooled,
    pools,
    random_ids,
    save_config,
    save_model,
    tiny_config,
)

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("one_thread_each")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair.of(save_model("llama", tmp_path_factory.mktemp("llama"))) as pair:
        yield pair


def assign(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys * 0.5, layer.values + 1


def write(cache: Any) -> None:
    for layer in cache.layers:
        layer.keys[:, :, 3:9] *= 0.5
        layer.values[:, :, 3:9] += 1


@pytest.mark.parametrize("change", [assign, write])
@pytest.mark.parametrize("length", [10, 40])
def test_keys_that_the_user_changed_count(pair: Pair, change: Callable[[Any], None], length: int) -> None:
    answers = []
    for model in (pair.model, pair.reference):
        with torch.no_grad():
            cache = model(random_ids(1, length)).past_key_values
            model(random_ids(1, 1, seed=1), past_key_values=cache)
            change(cache)
            answers.append(model(random_ids(1, 2, seed=2), past_key_values=cache).logits)
    assert_close(*answers)


def test_a_pickled_cache_goes_its_own_way(pair: Pair) -> None:
    def continued(model: Any, cache: Any, seed: int) -> torch.Tensor:
        for step in range(3):
            logits: torch.Tensor = model(random_ids(1, 5, seed=10 * seed + step), past_key_values=cache).logits
        return logits

    answers = []
    for model in (pair.model, pair.reference):
        with torch.no_grad():
            cache = model(random_ids(1, 40)).past_key_values
            twin = pickle.loads(pickle.dumps(cache))
            answers.append(torch.cat([continued(model, one, seed) for seed, one in enumerate((cache, twin, cache))]))
    assert_close(*answers)


@pytest.mark.parametrize("length", [10, 40])
def test_a_cache_made_in_inference_mode_goes_on_outside_it(pair: Pair, length: int) -> None:
    answers = []
    for model in (pair.model, pair.reference):
        with torch.inference_mode():
            cache = model(random_ids(1, length)).past_key_values
        with torch.no_grad():
            answers.append(model(random_ids(1, 2, seed=2), past_key_values=cache).logits)
    assert_close(*answers)


def test_one_key_with_two_values_is_not_taken_for_resident(tmp_path: Any) -> None:
    """diffllama calls attention twice a layer, with the same keys and other values."""
    save_config(tiny_config("diffllama", num_key_value_heads=2, num_attention_heads=4), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model = load_pooled(tmp_path)
    with model.fa_pool, torch.no_grad():
        assert_close(model(random_ids(2, 40)).logits, reference(random_ids(2, 40)).logits)
        assert model.fa_pool.stats()["prefill"]["pooled_calls"] > 0


def test_autocast_is_pooled_in_its_dtype(pair: Pair) -> None:
    """A step goes on from its keys, in autocast and without."""
    answers = []
    with pools(pair.model, prefill=2, decode=4), torch.no_grad():
        for model in (pair.model, pair.reference):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(random_ids(1, 40))
                answers.append([output.logits, model(random_ids(1, 1), past_key_values=output.past_key_values).logits])
            answers[-1].append(model(random_ids(1, 1, 2), past_key_values=output.past_key_values).logits)
    for mine, other in zip(*answers, strict=True):
        assert_close(mine.float(), other.float(), tolerance=4e-2)


def assigned(layer: Any) -> None:
    values = layer.values.clone()
    values[1] *= 0.5
    layer.values = values


def written(layer: Any) -> None:
    layer.values[1] *= 0.5


@pytest.mark.parametrize("home", [{}, ON_THE_POOL])
@pytest.mark.parametrize("change", [assigned, written])
@pytest.mark.parametrize("step_between", [True, False])
def test_a_beam_that_was_edited_shares_its_prompt_no_more(
    pair: Pair, home: dict[str, Any], change: Callable[[Any], None], *, step_between: bool
) -> None:
    given = greedily(3, num_beams=2, return_dict_in_generate=True)
    with in_threads(pair.folder, pool_ranks=2, **home) as both, torch.no_grad():
        caches = [model.generate(random_ids(1, 60), **given).past_key_values for model in (both.model, both.reference)]

        def step(what: str) -> None:
            nets = zip((both.model, both.reference), caches, strict=True)
            assert_close(*(net(random_ids(2, 1), past_key_values=cache).logits for net, cache in nets), what=what)

        step("before")
        for cache in caches:
            change(cache.layers[1])
        if step_between:
            step("edited")
        for cache in caches:
            cache.reorder_cache(torch.tensor([0, 0]))
        step("in other order")
        step("once more")
