"""What a user does by hand to caches, masks, layers and hooks: the plain model's answer, or a refusal by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.kv_home import LENGTHS, ON_THE_POOL, Steps, cut, in_threads
from tests.models import assert_close, padded_batch, plain, random_ids, save_model

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]
HOMES: dict[str, dict[str, Any]] = {"base": {}, "pool": ON_THE_POOL}


@contextmanager
def begun(folder: Path, home: str, lengths: list[int] = LENGTHS, **settings: Any) -> Iterator[Steps]:
    """A prompt is done, by both models."""
    with in_threads(folder, pool_ranks=2, **(HOMES[home] | settings)) as pair, torch.no_grad():
        yield Steps(pair, *padded_batch(lengths))


def shortened(cache: Any) -> None:
    cache.crop(-20)


def reordered(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([2, 2, 0]))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("change", [shortened, reordered])
def test_a_snapshot_is_the_readers(folder: Path, home: str, change: Callable[[Any], None]) -> None:
    """Where caches are concatenated, nothing that a user has read is written to any more."""
    with begun(folder, home) as steps:
        mask = steps.mask
        snapshots = [[(layer.keys, layer.values) for layer in cache.layers] for cache in (steps.cache, steps.expected)]
        steps.both(change)
        steps.mask = mask[:, :-20] if change is shortened else mask[[2, 2, 0]]
        steps(5, "a branch")
        for cache, snapshot in zip((steps.cache, steps.expected), snapshots, strict=True):
            for layer, (keys, values) in zip(cache.layers, snapshot, strict=True):
                layer.keys, layer.values = keys, values
        steps.mask = mask
        steps(5, "from the snapshot")


@pytest.mark.parametrize("home", HOMES)
def test_what_was_read_may_be_written_to_later(folder: Path, home: str) -> None:
    """It is the reader's own by then; and a write that torch does not count, made before, is the cache's."""
    with begun(folder, home) as steps:
        steps.both(lambda cache: cache.layers[1].keys.data[:, :, 70:80].mul_(2.0))
        old = [cache.layers[0].values for cache in (steps.cache, steps.expected)]
        steps(1, "written to behind its version")
        for values in old:
            values.zero_()
        steps(2, "an old view is written to")


@pytest.mark.parametrize("home", HOMES)
def test_other_rows_than_the_caches_are_refused(folder: Path, home: str) -> None:
    with begun(folder, home, [60, 60, 60]) as steps:
        for rows in (1, 2):
            with pytest.raises(ValueError, match="go on with all rows of its batch"):
                steps.pair.model(random_ids(rows, 1), past_key_values=steps.cache)
            with pytest.raises(RuntimeError, match="Sizes of tensors"):
                steps.pair.reference(random_ids(rows, 1), past_key_values=copy.deepcopy(steps.expected))
        steps(1, "all rows")


@pytest.mark.parametrize("home", HOMES)
def test_a_mask_that_shows_padding_is_refused(folder: Path, home: str) -> None:
    ids, mask = padded_batch([60, 41], left=False)
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        cache = pair.model(ids, attention_mask=mask, use_cache=True).past_key_values
        for shown in (None, torch.ones(2, 61), torch.ones(2, 1, 1, 61, dtype=torch.bool)):
            with pytest.raises(ValueError, match="was padding when its keys were made"):
                pair.model(random_ids(2, 1), attention_mask=shown, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([0]))
        other = pair.reference(ids[:1], use_cache=True).past_key_values
        answers = [
            model(random_ids(1, 1), past_key_values=past).logits
            for model, past in ((pair.model, cache), (pair.reference, other))
        ]
        assert_close(*answers, what="the row without padding")


@pytest.mark.parametrize("home", HOMES)
def test_padding_on_the_left_is_the_models_own(folder: Path, home: str) -> None:
    """Of a model that computes by sdpa, which is 0, too, where a query sees nothing."""
    ids, mask = padded_batch([60, 41])
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        answers = []
        for model in (pair.model, plain(folder)):
            cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
            answers.append(model(random_ids(2, 1), past_key_values=cache).logits)
        assert_close(*answers)


def without_its_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"attention_mask": None}


def with_less_of_it(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    mask = kwargs["attention_mask"].clone()
    mask[:, :40] = 0
    return args, kwargs | {"attention_mask": mask}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("hook", [without_its_mask, with_less_of_it])
@pytest.mark.parametrize("where", ["model", "decoder"])
def test_a_hook_that_gives_another_mask(folder: Path, home: str, hook: Callable[..., Any], where: str) -> None:
    with begun(folder, home) as steps:
        for model in (steps.pair.model, steps.pair.reference):
            module = model if where == "model" else model.model
            module.register_forward_pre_hook(hook, with_kwargs=True)
        if hook is with_less_of_it:
            steps(1, "another mask")
        else:
            ids, mask = padded_batch([60, 60])
            mask[1, :10] = 0  # and tokens there, which are seen without it
            answers = [model(ids, attention_mask=mask).logits for model in (steps.pair.model, steps.pair.reference)]
            assert_close(*answers, what="no mask")


def another_layer(model: Any) -> None:
    """A layer with attention of its own that was made after the model was pooled."""
    torch.manual_seed(5)
    layer = type(model.model.layers[1])(model.config, 1).eval()
    model.model.layers[1] = layer


def a_layer_twice(model: Any) -> None:
    """A model made deeper with a copy of one of its layers."""
    twin = copy.deepcopy(model.model.layers[1])
    twin.self_attn.layer_idx = 2
    model.model.layers.append(twin)
    model.config.num_hidden_layers = 3


def in_other_order(model: Any) -> None:
    first, second = model.model.layers
    first.self_attn.layer_idx, second.self_attn.layer_idx = 1, 0
    model.model.layers = nn.ModuleList([second, first])


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("change", [another_layer, a_layer_twice, in_other_order])
def test_layers_that_were_changed_after_pooling(folder: Path, home: str, change: Callable[[Any], None]) -> None:
    with in_threads(folder, pool_ranks=2, blocks=4, **HOMES[home]) as pair, torch.no_grad():
        for model in (pair.model, pair.reference):
            change(model)
        steps = Steps(pair, *padded_batch([300, 211]))
        steps(1, "a step")
        steps(3, "more")


NESTED = {"a mask": (60, [60, 30]), "none": (60, None), "shorter": (45, [45, 30]), "shorter, none": (25, None)}
NESTED |= {"short": (9, None)}


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("what", NESTED)
@pytest.mark.parametrize("outer", [60, 12])
@pytest.mark.parametrize("whole", [True, False])
def test_a_forward_inside_of_a_forward(folder: Path, home: str, what: str, outer: int, whole: bool) -> None:
    """A hook calls the model, or its decoder, with other tokens and another mask or none; the outer forward is pooled,
    or short."""
    length, lengths = NESTED[what]
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        answers = []
        for model in (pair.model, pair.reference):
            inside: list[Tensor] = []
            under_way: list[bool] = []

            def call(
                module: nn.Module,
                args: Any,
                output: Any,
                model: Any = model,
                inside: Any = inside,
                under_way: Any = under_way,
            ) -> None:
                if not under_way:
                    under_way.append(True)
                    ids, mask = padded_batch(lengths) if lengths else (random_ids(2, length, seed=5), None)
                    real = torch.ones_like(ids) if mask is None else mask
                    try:
                        output = (model if whole else model.model)(ids, attention_mask=mask, use_cache=False)
                        inside.append(output[0][real == 1])
                    finally:
                        under_way.clear()

            hook = model.model.layers[0].register_forward_hook(call)
            ids, mask = padded_batch([outer * 2 // 3, outer])
            answers.append((model(ids, attention_mask=mask).logits[mask == 1], inside[-1]))
            hook.remove()
        nested = pair.model.fa_pool.stats()["local_reasons"]
    for actual, expected in zip(*answers, strict=True):
        assert_close(actual, expected)
    reason = "it is called from inside of a pooled forward of the same model"
    assert nested == ({reason: 1} if outer == 60 and length > 16 else {}), nested


def mean_of_all(module: nn.Module, args: Any, output: Any) -> Any:
    """Looks at all positions."""
    return output + output.mean(1, keepdim=True)


def test_a_wave_is_for_models_that_may_be_cut(tmp_path: Path) -> None:
    """A hook that looks at all positions sees one forward; positions are encoded by the length of the whole."""
    settings = ON_THE_POOL | {"wave_mib": 1, "blocks": 1}
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    cases: dict[str, dict[str, Any]] = {"hook": {}, "rope": {"rope_parameters": rope, "max_position_embeddings": 64}}
    for name, more in cases.items():
        folder = save_model("llama", tmp_path / name, **more)
        with in_threads(folder, pool_ranks=2, **settings) as pair, torch.no_grad():
            ids, mask = padded_batch([300, 300 if name == "hook" else 233, 300])
            for model in (pair.model, pair.reference):
                if name == "hook":
                    model.model.layers[0].register_forward_hook(mean_of_all)
            answers = [
                model(ids, attention_mask=mask, use_cache=True).logits[mask == 1]
                for model in (pair.model, pair.reference)
            ]
            assert_close(*answers, what=name)
            assert pair.model.fa_pool.stats()["prefill"]["pooled_calls"] == 2


def all_of_it(model: Any) -> None:
    """All weights are trained."""


def queries_alone(model: Any) -> None:
    """Keys require no gradients, and are saved for those of queries."""
    for name, weight in model.named_parameters():
        weight.requires_grad_("q_proj" in name)


def nothing(cache: Any) -> None:
    """Between two turns."""


def read_in_between(cache: Any) -> None:
    assert cache.layers[1].keys.requires_grad == cache.layers[1].values.requires_grad


def cut_without_gradients(cache: Any) -> None:
    with torch.no_grad():
        cache.crop(-1)


def rows_exchanged(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("trained", [all_of_it, queries_alone])
@pytest.mark.parametrize("between", [nothing, read_in_between, cut_without_gradients, rows_exchanged])
@pytest.mark.parametrize(("prefix", "block"), [(8, 4), (60, 64)])
def test_turns_with_gradients_on_a_prefix(
    folder: Path, home: str, trained: Callable[[Any], None], between: Callable[[Any], None], prefix: int, block: int
) -> None:
    """A prefix without gradients, two turns with, a step without, one backward: storage grows, and does not."""
    with in_threads(folder, pool_ranks=2, kv_block=block, **HOMES[home]) as pair:
        gradients: list[list[Tensor]] = []
        answers: list[Tensor] = []
        for model in (pair.model, plain(folder)):
            trained(model)
            with torch.no_grad():
                cache = model(random_ids(2, prefix), use_cache=True).past_key_values
            loss = model(ids := random_ids(2, 3, 1), past_key_values=cache, labels=ids).loss
            between(cache)
            loss = loss + model(ids := random_ids(2, 3, 2), past_key_values=cache, labels=ids).loss
            between(cache)
            with torch.no_grad():
                answers.append(model(random_ids(2, 1), past_key_values=cache).logits)
                answers.append(model(random_ids(2, 1, 3), past_key_values=cache).logits)
            loss.backward()
            gradients.append([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert_close(*(torch.cat(grads) for grads in gradients), what="gradients")
        assert_close(answers[0], answers[2], what="a step without gradients")
        assert_close(answers[1], answers[3], what="one more")
        assert pair.model.fa_pool.stats()["faults"] == 0


def weights(layer: Any) -> None:
    layer.kv_b_proj.weight.mul_(1.3)


def data_of_weights(layer: Any) -> None:
    layer.kv_b_proj.weight.data = layer.kv_b_proj.weight.data * 1.3


def another_module(layer: Any) -> None:
    old = layer.kv_b_proj
    layer.kv_b_proj = nn.Linear(old.in_features, old.out_features, bias=False).eval()
    layer.kv_b_proj.weight.copy_(1.3 * old.weight)


def adapter(layer: Any) -> None:
    """Switched off, and on again with the next change."""
    layer.kv_b_proj.enable_adapters(layer.kv_b_proj.disable_adapters)


def hook(layer: Any) -> None:
    layer.kv_b_proj.register_forward_hook(lambda module, args, output: 1.3 * output)


def expansion(layer: Any) -> None:
    old = layer.expand_kv
    layer.expand_kv = lambda kv, rot: tuple(1.3 * x for x in old(kv, rot))


@pytest.mark.parametrize("change", [weights, data_of_weights, another_module, adapter, hook, expansion])
def test_latents_are_expanded_otherwise(tmp_path: Path, change: Callable[[Any], None]) -> None:
    """Keys that ranks hold are what latents were expanded to before."""
    with in_threads(save_model("deepseek_v3", tmp_path), pool_ranks=2) as pair, torch.no_grad():
        for model in (pair.model, pair.reference) if change is adapter else ():
            torch.manual_seed(1)
            lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["kv_b_proj"], init_lora_weights=False)
            get_peft_model(model, lora).eval()
        steps = Steps(pair, *padded_batch(LENGTHS))
        steps(1, "before")
        for layer in (1, 0, 1):
            for model in (pair.model, pair.reference):
                change(model.model.layers[layer].self_attn)
            steps(1, f"{change.__name__} of layer {layer}")
        with pair.forwards(decode=int(change not in (hook, expansion))):
            steps(1, "as before")
        reasons = [x for x in pair.model.fa_pool.stats()["local_reasons"] if "expands keys by" in x]
        assert bool(reasons) == (change in (hook, expansion))


def keys_are_evicted(model: Any, cache: Any, layer: int) -> None:
    one = cache.layers[layer]
    keys, values = one.keys, one.values
    one.keys, one.values = (torch.cat([x[:, :, :4], x[:, :, -20:]], 2) for x in (keys, values))


def is_skipped_for_a_step(model: Any, cache: Any, layer: int) -> None:
    one = model.model.layers[layer]
    one.forward = lambda hidden, *args, **kwargs: hidden
    model(random_ids(2, 1), past_key_values=cache)
    del one.forward


def interrupted(module: nn.Module, args: Any, output: Any) -> None:
    raise KeyError("interrupted")


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("way", [keys_are_evicted, is_skipped_for_a_step])
@pytest.mark.parametrize("layer", [0, 1])
def test_layers_of_different_lengths(folder: Path, home: str, way: Callable[..., None], layer: int) -> None:
    """One is computed with the keys that it has, at home, and costs no rank; the next cache's are on the pool again."""
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        answers: list[list[Tensor]] = []
        for model in (pair.model, plain(folder)):
            cache = model(random_ids(2, 90), use_cache=True).past_key_values
            way(model, cache, layer)
            if model is pair.model:
                hook = model.model.layers[1].mlp.register_forward_hook(interrupted)
                with pytest.raises(KeyError, match="interrupted"):
                    model(random_ids(2, 1), past_key_values=cache)
                hook.remove()
            positions = [torch.tensor([[91 + step]]) for step in range(3)]
            answers.append(
                [model(random_ids(2, 1, 3), past_key_values=cache, position_ids=at).logits for at in positions]
            )
        for step, (actual, expected) in enumerate(zip(*answers, strict=True)):
            assert_close(actual, expected, what=f"step {step}")
        stats = pair.model.fa_pool.stats()
        assert stats["faults"] == 0
        assert any("not what its forward was decided for" in reason for reason in stats["local_reasons"])
        if home == "pool":
            assert Steps(pair, *padded_batch(LENGTHS)).are_away()


@pytest.mark.parametrize("layer", [0, 1])
def test_no_replay_brings_a_skipped_step_back(folder: Path, layer: int) -> None:
    with in_threads(folder, pool_ranks=2, **HOMES["pool"]) as pair, torch.no_grad():
        cache = pair.model(random_ids(2, 90), use_cache=True).past_key_values
        is_skipped_for_a_step(pair.model, cache, layer)
        cut(pair.model)
        with pytest.raises(RuntimeError, match="no replay brings them back"):
            pair.model(random_ids(2, 1), past_key_values=cache)
