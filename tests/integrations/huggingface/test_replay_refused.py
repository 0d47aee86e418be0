"""Keys that no replay of recorded inputs brings back: a loss is told, or the same answers come; never others.

Each case is a sequence of a prompt, something that a user does, a lost rank and a step.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.kv_home import LENGTHS, ON_THE_POOL, Steps, cut, in_threads
from tests.models import Pair, assert_close, padded_batch, random_ids, save_config, tiny_config

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]


@pytest.fixture
def pair(folder: Path) -> Iterator[Pair]:
    """A Llama with two pool ranks that own its keys."""
    with in_threads(folder, pool_ranks=2, **ON_THE_POOL) as pair:
        yield pair


def refused(steps: Steps, told: str) -> None:
    cut(steps.pair.model)
    with pytest.raises(RuntimeError, match=told):
        steps(1, "after a loss")


@contextmanager
def hooked(steps: Steps, hook: Callable[..., Any], *, before: bool = False) -> Iterator[None]:
    """The same hook on the first layer of both models."""
    with ExitStack() as handles:
        for model in (steps.pair.model, steps.pair.reference):
            layer = model.model.layers[0]
            made = layer.register_forward_pre_hook(hook) if before else layer.register_forward_hook(hook)
            handles.callback(made.remove)
        yield


def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 1.5


def scaled_in_place(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_(1.5)


def scaled_before(module: nn.Module, args: Any) -> Any:
    return (args[0] * 1.5, *args[1:])


@pytest.mark.parametrize(("hook", "before"), [(scaled, False), (scaled_in_place, False), (scaled_before, True)])
def test_a_hook_that_altered_a_step(steps: Steps, hook: Callable[..., Any], before: bool) -> None:
    with hooked(steps, hook, before=before):
        steps(1, "altered")
    steps(1, "as it is")
    refused(steps, "a hook altered")


def test_a_hook_that_returns_what_it_is_given_alters_nothing(steps: Steps) -> None:
    with hooked(steps, lambda module, args, output: output):
        steps(1, "looked at")
    cut(steps.pair.model)
    steps(1, "after a loss")
    assert steps.pair.model.fa_pool.stats()["replays"] == 1


class Noisy(nn.Module):
    """An MLP's output with noise on it, in each mode."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Any:
        return self.mlp(x) + torch.rand((), dtype=x.dtype)


def test_a_model_that_draws_random_numbers(pair: Pair) -> None:
    for model in (pair.model, pair.reference):
        model.model.layers[0].mlp = Noisy(model.model.layers[0].mlp)
    ids, mask = padded_batch(LENGTHS)
    with torch.no_grad():
        cache = pair.model(ids, attention_mask=mask, use_cache=True).past_key_values
        cut(pair.model)
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        with pytest.raises(RuntimeError, match="drew random numbers"):
            pair.model(random_ids(3, 1), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("when", ["a step", "from now on"])
def test_an_adapter_that_was_switched_off(pair: Pair, when: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = []
    for model in (pair.model, pair.reference):
        torch.manual_seed(3)
        adapted.append(peft.get_peft_model(model, config).eval())
    with torch.no_grad():
        steps = Steps(Pair(pair.folder, adapted[1], adapted[0]), *padded_batch(LENGTHS))
        with ExitStack() as off:
            for model in adapted:
                off.enter_context(model.disable_adapter())
            steps(1, "without it")
            if when == "from now on":
                refused(steps, "weights or adapters have changed")
                return
        steps(1, "with it")
        refused(steps, "weights or adapters have changed")


def past_the_call(steps: Steps) -> None:
    """A decoder's forward, past the call that hooks and the plugin go by."""
    ids = random_ids(3, 2, seed=9)
    steps.mask = torch.cat([steps.mask, steps.mask.new_ones(3, 2)], dim=1)
    for model, cache in ((steps.pair.model, steps.cache), (steps.pair.reference, steps.expected)):
        model.model.forward(ids, attention_mask=steps.mask, past_key_values=cache, use_cache=True)


def written_over(steps: Steps) -> None:
    """The last two keys are others, of the same number."""
    steps.both(lambda cache: cache.crop(-2))
    for cache in (steps.cache, steps.expected):
        for index in range(2):
            cache.update(torch.ones(3, 3, 2, 8), torch.ones(3, 3, 2, 8), index)


def behind_their_version(steps: Steps) -> None:
    steps.both(lambda cache: cache.layers[0].values.data[:, :, 40:50].mul_(3.0))


def pickled(steps: Steps) -> None:
    steps.both(lambda cache: cache.layers[0].values[:, :, 40:50].mul_(3.0))
    steps(1, "written to")
    steps.cache = pickle.loads(pickle.dumps(steps.cache))


def rows_of_a_layer(steps: Steps) -> None:
    """Not those of the cache."""
    steps.both(lambda cache: [layer.reorder_cache(torch.tensor([2, 1, 0])) for layer in cache.layers])
    steps.mask = steps.mask[[2, 1, 0]]


@pytest.mark.parametrize("change", [past_the_call, written_over, behind_their_version, pickled, rows_of_a_layer])
def test_keys_that_no_recorded_forward_made(steps: Steps, change: Callable[[Steps], None]) -> None:
    change(steps)
    steps(1, "goes on")
    refused(steps, "written by hand")


def test_one_entry_written_behind_its_version(steps: Steps) -> None:
    weight = steps.pair.model.model.layers[0].mlp.up_proj.weight
    steps(1, "before")
    weight.data[31, 17] += 1.0
    refused(steps, "weights or adapters have changed")


def test_a_buffer_that_was_written_to(steps: Steps) -> None:
    steps.pair.model.model.rotary_emb.inv_freq.mul_(1.1)
    refused(steps, "weights or adapters have changed")


def test_a_pickled_cache_and_another_model(steps: Steps) -> None:
    """The same model would be taken for its own; this one has other weights."""
    steps.cache = pickle.loads(pickle.dumps(steps.cache))
    for model in (steps.pair.model, steps.pair.reference):
        model.lm_head.weight.data.mul_(2.0)
    steps(1, "goes on with it")
    refused(steps, "weights or adapters have changed")


def test_a_mask_that_hides_more_from_some_step_on(steps: Steps) -> None:
    """Keys of before saw what is hidden now, and do so when they are computed once more."""
    steps(1, "sees all")
    steps.mask = steps.mask.clone()
    steps.mask[:, :40] = 0
    steps(1, "sees less")
    steps(2, "goes on so")
    cut(steps.pair.model)
    steps(1, "after a loss")
    assert steps.pair.model.fa_pool.stats()["replays"] == 1


def test_masks_of_pairs_in_a_short_beginning(pair: Pair) -> None:
    """Two forwards under the threshold have masks of their own kind; later ones do not."""
    pairs = torch.full((8, 8), -1e30).triu(1)[None, None]
    pairs[..., 5, 2] = -1e30
    ids, answers = random_ids(1, 60), []
    with torch.no_grad():
        for model in (pair.model, pair.reference):
            cache = model(ids[:, :8], attention_mask=pairs, use_cache=True).past_key_values
            model(ids[:, 8:50], attention_mask=torch.ones(1, 50), past_key_values=cache)
            if model is pair.model:
                cut(pair.model)
            mask = torch.ones(1, 60)
            answers.append(model(ids[:, 50:], attention_mask=mask, past_key_values=cache).logits)
    assert pair.model.fa_pool.stats()["replays"] == 1
    assert_close(*answers)


LINEAR: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_only_layers": [0, 1, 2, 3],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_states_go_back_with_a_forward_that_was_lost(tmp_path: Path, name: str) -> None:
    """What linear attention carries is written in place, by layers before the loss and not by those behind it."""
    folder = save_config(tiny_config(name, num_hidden_layers=4, **LINEAR[name]), tmp_path)
    with in_threads(folder, pool_ranks=2, **ON_THE_POOL) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([60, 60]))
        steps(1, "a step", tolerance=1e-4)
        armed = [cut]

        def lose(*_: Any) -> None:
            if armed:
                armed.pop()(pair.model)

        hook = pair.model.model.layers[1].register_forward_hook(lose)
        steps(1, "lost on its way", tolerance=1e-4)
        hook.remove()
        steps(1, "after it", tolerance=1e-4)
        assert pair.model.fa_pool.stats()["replays"] == 1


def test_a_copy_of_the_model_goes_on(steps: Steps) -> None:
    """Its cache is another model's, whose keys come home first."""
    twin = copy.deepcopy(steps.pair.model)
    with twin.fa_pool:
        mine, steps.pair = steps.pair.model, Pair(steps.pair.folder, steps.pair.reference, twin)
        steps(1, "by a copy")
        steps(1, "once more")
        assert twin.fa_pool.stats()["decode"]["pooled_calls"] == 4
        steps.pair = Pair(steps.pair.folder, steps.pair.reference, mine)
        steps(1, "and back")
        refused(steps, "another model has gone on|weights or adapters have changed")
