"""A pooled model is a real transformers model: its class, files, copies, pipelines, its end; and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, pipeline

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests.models import (
    Pair,
    assert_same_tokens,
    eager,
    greedily,
    load_pooled,
    logits_equal,
    padding_mask,
    plain,
    pooled,
    pools,
    random_ids,
    save_config,
    tiny_config,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

ROOT = Path(__file__).resolve().parents[3]
NEW = 5
ENDING_S = 5.0


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[Pair]:
    with Pair.of(folder) as pair:
        yield pair


def wait_until(done: Callable[[], bool]) -> bool:
    """Whether ``done`` became true in time."""
    deadline = time.monotonic() + ENDING_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    return done()


def pooled_generate(model: Any, reference: Any) -> None:
    """The model generates what the reference does, on the pool."""
    ids = random_ids(2, 40)
    with pools(model, prefill=2, decode=2 * (NEW - 1)):
        tokens = model.generate(ids, **greedily(NEW))
    assert_same_tokens(tokens, reference.generate(ids, **greedily(NEW)))


def through_pickle(model: Any) -> Any:
    """The model, pickled and back."""
    return pickle.loads(pickle.dumps(model))


# What it is


@pytest.mark.processes
def test_it_is_an_instance_of_the_real_class(pair: Pair) -> None:
    for kind in (LlamaForCausalLM, FAPoolForCausalLM, PreTrainedModel):
        assert isinstance(pair.model, kind)
    assert type(pair.model).__name__ == "LlamaForCausalLM"
    assert type(pair.model).__module__ == LlamaForCausalLM.__module__
    assert not isinstance(pair.reference, FAPoolForCausalLM), "the real class itself was changed"


@pytest.mark.processes
def test_weights_are_the_plain_models(pair: Pair) -> None:
    ours, theirs = pair.model.state_dict(), pair.reference.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.processes
def test_every_attention_layer_shows_its_pool(pair: Pair) -> None:
    assert str(pair.model).count("FAPoolAttention(pool_ranks=2, threshold=16") == 1, "two layers print as one: 2 x"
    assert "(0-1): 2 x LlamaDecoderLayer" in str(pair.model)
    for layer in pair.model.model.layers:
        assert isinstance(layer.self_attn.fa_pool, FAPoolAttention)
        assert not list(layer.self_attn.fa_pool.parameters())
        assert not list(layer.self_attn.fa_pool.buffers())


@pytest.mark.processes
def test_wrapping_twice_is_refused(pair: Pair) -> None:
    with pytest.raises(ValueError, match="pooled already"):
        FAPoolForCausalLM.wrap(pair.model)


# Files, copies, pipelines


@pytest.mark.processes
def test_saved_and_loaded_again(pair: Pair, tmp_path: Path) -> None:
    pair.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlamaForCausalLM"]
    stock = plain(tmp_path)
    assert type(stock) is LlamaForCausalLM
    logits_equal(stock, pair.reference, random_ids(2, 40))
    again = FAPoolForCausalLM.from_pretrained(tmp_path).eval()
    with again.fa_pool:
        assert again.fa_pool.config == pair.model.fa_pool.config
        pooled_generate(again, pair.reference)
    other = FAPoolForCausalLM.from_pretrained(tmp_path, fa_pool={"threshold": 9})
    assert other.fa_pool.config == FAPoolConfig(threshold=9), "an argument takes the saved configuration's place"


@pytest.mark.processes
def test_text_generation_pipeline(pair: Pair) -> None:
    words = {f"w{number}": number for number in range(99)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w3")
    text = " ".join(f"w{number}" for number in random_ids(1, 40)[0].tolist())
    with pools(pair.model, prefill=2, decode=2 * (NEW - 1)):
        ours = pipeline("text-generation", pair.model, tokenizer=tokenizer)(text, **greedily(NEW))
    theirs = pipeline("text-generation", pair.reference, tokenizer=tokenizer)(text, **greedily(NEW))
    assert ours == theirs
    assert ours[0]["generated_text"].count("w") == 40 + NEW


@pytest.mark.processes
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_its_own_pool(pair: Pair, way: Callable[[Any], Any]) -> None:
    pooled_generate(pair.model, pair.reference)
    before = workers()
    twin = way(pair.model)
    assert type(twin) is type(pair.model)
    assert twin.fa_pool is not pair.model.fa_pool
    assert twin.fa_pool.config == pair.model.fa_pool.config
    assert workers() == before, "a copy starts no rank before it needs one"
    with twin.fa_pool, torch.no_grad():
        twin.lm_head.weight.mul_(1.0)  # its weights are its own to change
        pooled_generate(twin, pair.reference)
        assert len(workers() - before) == 2
        twin.lm_head.weight.zero_()
        pooled_generate(pair.model, pair.reference)
    assert workers() == before
    pooled_generate(pair.model, pair.reference)


# Its end


@pytest.mark.processes
def test_after_close_everything_is_local(folder: Path) -> None:
    before, reference, ids = workers(), plain(folder), random_ids(2, 40)
    model = load_pooled(folder)
    with model.fa_pool, torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        assert workers() - before
    assert workers() == before
    model.fa_pool.close()
    assert model.fa_pool.stats()["state"] == "closed"
    with pools(model, prefill=0, decode=0), torch.no_grad():
        assert torch.equal(model(ids).logits, reference(ids).logits)
        assert_same_tokens(model.generate(ids, **greedily(NEW)), reference.generate(ids, **greedily(NEW)))
        # What the base holds of a pooled sequence is enough to go on.
        model(random_ids(2, 9), past_key_values=cache)
    assert workers() == before


@pytest.mark.processes
def test_leaving_the_interpreter_without_close_leaves_no_process(folder: Path) -> None:
    script = f"""
import os, torch
from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
torch.set_num_threads(1)
settings = dict(threshold=16, pool_ranks=2, memory_limit_mib=64, activation="length", blocks=1)
model = FAPoolForCausalLM.from_pretrained({str(folder)!r}, fa_pool=settings).eval()
kept = model.generate(torch.arange(3, 43)[None], max_new_tokens=3, return_dict_in_generate=True)
stats = model.fa_pool.stats()
print(os.getpid(), stats["prefill"]["pooled_calls"], stats["decode"]["pooled_calls"], stats["faults"])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    parent, *counts = map(int, done.stdout.split())
    assert counts == [2, 4, 0]
    assert wait_until(lambda: not workers(parent)), f"pool ranks outlive their base: {workers(parent)}"


@pytest.mark.processes
def test_a_model_dies_with_its_last_reference(folder: Path) -> None:
    """Without the garbage collector: large models must not wait for it."""
    before, model = workers(), load_pooled(folder)
    model.generate(random_ids(2, 40), **greedily(NEW))
    assert workers() - before
    alive = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert alive() is None, "something refers to the model in a circle"
        assert wait_until(lambda: workers() == before), "its pool ranks outlive it"
    finally:
        gc.enable()


# Refusals


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (tiny_config("bloom", n_layer=2, n_head=6), "BloomForCausalLM computes attention by itself"),
        (tiny_config("falcon", without=("head_dim",)), "FalconForCausalLM computes attention by itself"),
        (
            tiny_config("llama4_text", attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=64),
            "chunked_attention",
        ),
    ],
    ids=["bloom", "falcon", "llama4"],
)
def test_models_that_cannot_be_pooled_exactly(tmp_path: Path, config: Any, told: str) -> None:
    save_config(config, tmp_path)
    with pytest.raises(ValueError, match=told):
        load_pooled(tmp_path)


HOLE = torch.ones(2, 40, dtype=torch.long).index_fill(1, torch.tensor([5]), 0)
INPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "4-D mask": ({"attention_mask": torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()}, "4-dimensional"),
    "4-D float mask": ({"attention_mask": torch.zeros(2, 1, 40, 40)}, "4-dimensional"),
    "masks by layer kind": ({"attention_mask": {"full_attention": None}}, "dict"),
    "hole": ({"attention_mask": HOLE}, "row 0 has 39 tokens between columns 0 and 40"),
    "short mask": ({"attention_mask": HOLE[:, :30]}, "30 columns"),
}


@pytest.mark.processes
@pytest.mark.parametrize("inputs", INPUTS)
def test_inputs_that_cannot_be_pooled_exactly(pair: Pair, inputs: str) -> None:
    given, told = INPUTS[inputs]
    ids, computed = random_ids(2, 40), []
    hook = pair.model.model.layers[0].register_forward_pre_hook(lambda *_: computed.append(1))
    with torch.no_grad(), pools(pair.model, prefill=0, decode=0), pytest.raises(ValueError, match=told):
        pair.model(ids, **given)
    assert not computed, "it was refused only after a layer had been computed"
    hook.remove()
    with pools(pair.model, prefill=2, decode=0):  # nothing of the refused call stays behind
        logits_equal(pair.model, pair.reference, ids)


@pytest.mark.processes
def test_short_calls_take_any_mask(pair: Pair) -> None:
    """At or under the threshold every mask that the plain model takes is taken."""
    ids, stock = random_ids(2, 12), plain(pair.folder)
    for given in (
        {"attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()},
        {"attention_mask": HOLE[:, :12]},
        {"position_ids": torch.arange(6).repeat(2, 2), "use_cache": False},
    ):
        with torch.no_grad(), pools(pair.model, prefill=0, decode=0):
            assert torch.equal(pair.model(ids, **given).logits, stock(ids, **given).logits), list(given)


@pytest.mark.processes
def test_generate_batch_is_refused(pair: Pair) -> None:
    with pytest.raises(NotImplementedError, match="continuous batching"):
        pair.model.generate_batch([[3, 4, 5]])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pool_ranks": 0}, "no pool rank to pool with"),
        ({"pool_ranks": 1000, "memory_limit_mib": 2**20}, r"pool_ranks \(1000\) \* \(memory_limit_mib \(1048576\)"),
        ({"threshold": -1}, "threshold = -1: must be a whole number >= 0"),
        ({"treshold": 16}, 'treshold = 16: unknown key; did you mean "threshold"'),
    ],
)
def test_wrong_settings_are_told_before_a_model_is_looked_for(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(FAPoolConfigError, match=told):
        FAPoolForCausalLM.from_pretrained("/no/such/folder", fa_pool=settings)


@pytest.mark.parametrize("path", ["/no/such/folder", "./no-such-folder", "no/such/folder"])
def test_a_model_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=path):
        FAPoolForCausalLM.from_pretrained(path)


def test_switched_off_it_changes_nothing(folder: Path) -> None:
    before, reference = workers(), plain(folder)
    mask = padding_mask([22, 40, 31])
    ids = random_ids(*mask.shape)
    for settings in ({"enabled": False}, {"enabled": False, "pool_ranks": 0}):
        model = load_pooled(folder, **settings)
        with torch.no_grad():
            logits, expected = (net(ids, attention_mask=mask).logits for net in (model, reference))
        assert torch.equal(logits, expected), f"largest difference {(logits - expected).abs().max():.3g}"
        for others in ({}, {"num_beams": 3}):
            given = greedily(NEW, mask, **others)
            assert_same_tokens(model.generate(ids, **given), reference.generate(ids, **given))
        assert model.fa_pool.stats()["activations"] == 0
    assert workers() == before


@pytest.mark.processes
def test_a_loaded_model_can_be_wrapped(folder: Path) -> None:
    before, model = workers(), plain(folder)
    weights = {key: value.data_ptr() for key, value in model.state_dict().items()}
    settings = {"threshold": 16, "memory_limit_mib": 64, "activation": "length", "blocks": 1}
    assert FAPoolForCausalLM.wrap(model, settings) is model
    with model.fa_pool:
        pooled_generate(model, eager(folder))
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == weights
    assert workers() == before


def test_a_layer_called_in_another_thread_during_a_pooled_forward_is_refused(folder: Path) -> None:
    """Its mask would be that of the pooled forward, which leaves padding to the plan."""
    with pooled(folder) as model:
        attention = model.model.layers[0].self_attn
        original = attention.forward

        def elsewhere(*args: Any, **kwargs: Any) -> Any:
            with ThreadPoolExecutor(1) as other:
                return other.submit(original, *args, **kwargs).result()

        attention.forward = elsewhere
        with torch.no_grad(), pytest.raises(RuntimeError, match="in another thread"):
            model(random_ids(1, 40))
