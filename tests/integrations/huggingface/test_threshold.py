"""When a model's calls are pooled and when not: lengths around the threshold, the lease, and reasons to stay local."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.models import (
    THRESHOLD,
    Pair,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    greedily,
    logits_equal,
    logits_too,
    padded_batch,
    padding_mask,
    plain,
    pooled,
    pools,
    random_ids,
    save_model,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

NEW = 8


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair.of(save_model("llama", tmp_path_factory.mktemp("llama"))) as pair:
        yield pair


def local_reasons(before: dict[str, Any], after: dict[str, Any]) -> dict[str, int]:
    """Reasons for local forwards that came since ``before``, and how often."""
    old = before["local_reasons"]
    return {why: n - old.get(why, 0) for why, n in after["local_reasons"].items() if n != old.get(why, 0)}


@pytest.mark.processes
@pytest.mark.parametrize("length", [1, THRESHOLD - 1, THRESHOLD, THRESHOLD + 1])
def test_lengths_around_the_threshold(pair: Pair, length: int) -> None:
    # A forward is pooled if it ends beyond the threshold: the prompt at first, then one token more each time.
    decode = sum(end > THRESHOLD for end in range(length + 1, length + 4))
    arguments = greedily(4) | logits_too()
    result, expected = pair.generate(random_ids(2, length), prefill=int(length > THRESHOLD), decode=decode, **arguments)
    assert_same_tokens(result.sequences, expected.sequences)
    assert_close(torch.stack(result.logits), torch.stack(expected.logits))


@pytest.mark.processes
def test_lengths_around_the_default_threshold(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, max_position_embeddings=8192)
    with Pair.of(folder, threshold=4096, kv_block=256) as pair:
        for length, prefill, decode in ((4095, 0, 1), (4096, 0, 2), (4097, 1, 2)):
            ids, arguments = random_ids(1, 4097)[:, :length], greedily(3) | logits_too()
            result, expected = pair.generate(ids, prefill=prefill, decode=decode, **arguments)
            assert_clear_choices(expected.logits)
            assert_same_tokens(result.sequences, expected.sequences)
            assert_close(torch.stack(result.logits), torch.stack(expected.logits))


@pytest.mark.processes
def test_crossing_the_threshold_while_decoding(pair: Pair) -> None:
    before = pair.model.fa_pool.stats()
    tokens, expected = pair.generate(random_ids(2, 10), prefill=0, decode=5, **greedily(12))
    assert_same_tokens(tokens, expected)
    after = pair.model.fa_pool.stats()
    # Forwards end at 10, then 11 to 21; those up to 16 are local.
    assert after["prefill"]["local_calls"] - before["prefill"]["local_calls"] == pair.layers
    assert after["decode"]["local_calls"] - before["decode"]["local_calls"] == pair.layers * 6
    assert after["activations"] - before["activations"] == 1


@pytest.mark.processes
def test_padding_does_not_count(pair: Pair) -> None:
    """Forty columns, but no sequence beyond the threshold: local, to the last bit."""
    ids, mask = padded_batch([40, 12, THRESHOLD])
    stock = plain(pair.folder)
    with torch.no_grad(), pair.forwards():
        logits = pair.model(ids[1:], attention_mask=mask[1:]).logits
        expected = stock(ids[1:], attention_mask=mask[1:]).logits
    assert torch.equal(logits, expected), f"largest difference {(logits - expected).abs().max():.3g}"


@pytest.mark.processes
def test_a_cropped_prompt_is_short_again(pair: Pair) -> None:
    """A cache that generate() made for a long prompt, cropped and filled up to ten tokens."""
    ids, more = random_ids(1, 40), random_ids(1, 5, seed=1)
    cache = pair.model.generate(ids, **greedily(2, return_dict_in_generate=True)).past_key_values
    cache.crop(5 - cache.get_seq_length())
    with torch.no_grad():
        with pair.forwards():
            logits = pair.model(more, past_key_values=cache).logits
        expected = pair.reference(torch.cat([ids[:, :5], more], 1)).logits[:, 5:]
    assert_close(logits, expected)


@pytest.mark.processes
def test_threshold_zero_pools_everything(tmp_path: Path) -> None:
    with Pair.of(save_model("llama", tmp_path), threshold=0, pool_ranks=1) as pair:
        tokens, expected = pair.generate(random_ids(1, 1), prefill=1, decode=NEW - 1, **greedily(NEW))
    assert_same_tokens(tokens, expected)


@pytest.mark.processes
def test_the_lease_goes_back_when_sequences_are_short_again(pair: Pair) -> None:
    long, more = random_ids(1, 40), random_ids(1, 9, seed=1)
    with torch.no_grad():
        cache = pair.model(long, use_cache=True).past_key_values
        assert pair.model.fa_pool.stats()["state"] == "active"
        with pair.forwards():
            pair.model(random_ids(1, 12))
        assert pair.model.fa_pool.stats()["state"] == "active", "12 is not below half the threshold"
        with pair.forwards():
            pair.model(random_ids(1, 7))
    stats = pair.model.fa_pool.stats()
    assert (stats["state"], stats["leased_ranks"]) == ("idle", [])
    assert "a forward of 7 tokens, below 8" in [event["reason"] for event in stats["events"][-2:]]
    # The long sequence goes on: what the ranks held is gone, its keys are sent once more.
    with torch.no_grad():
        with pair.forwards(prefill=1):
            logits = pair.model(more, past_key_values=cache).logits
        expected = pair.reference(torch.cat([long, more], 1)).logits[:, 40:]
    assert_close(logits, expected)


@pytest.mark.processes
def test_two_generations_borrow_the_same_processes(pair: Pair) -> None:
    ids, before, processes = random_ids(1, 40), pair.model.fa_pool.stats(), []
    for _ in range(2):
        tokens, expected = pair.generate(ids, prefill=1, decode=NEW - 1, **greedily(NEW))
        assert_same_tokens(tokens, expected)
        processes.append(workers())
        assert pair.model.fa_pool.stats()["state"] == "idle"
    after = pair.model.fa_pool.stats()
    assert after["activations"] - before["activations"] == 2
    assert after["releases"] - before["releases"] == 2
    assert processes[0], "no pool rank is kept warm"
    assert processes[0] == processes[1], "pool ranks were started anew"


@pytest.mark.processes
def test_without_a_cache_ranks_are_borrowed_for_one_forward(pair: Pair) -> None:
    ids, mask = padded_batch([22, 40, 31])
    with pair.forwards(prefill=1):
        logits_equal(pair.model, pair.reference, ids, mask, use_cache=False)
    assert pair.model.fa_pool.stats()["state"] == "idle"
    # Each step is a whole prompt anew.
    tokens, expected = pair.generate(ids, prefill=4, decode=0, **greedily(4, mask, use_cache=False))
    assert_same_tokens(tokens, expected)
    assert pair.model.fa_pool.stats()["state"] == "idle"


@pytest.mark.processes
def test_a_cache_of_the_users_stays_local(pair: Pair) -> None:
    ids, before = random_ids(2, 40), pair.model.fa_pool.stats()
    caches = [DynamicCache(config=net.config) for net in (pair.reference, pair.model)]
    expected = pair.reference.generate(ids, past_key_values=caches[0], **greedily(4))
    with pair.forwards():
        tokens = pair.model.generate(ids, past_key_values=caches[1], **greedily(4))
    assert_same_tokens(tokens, expected)
    reasons = local_reasons(before, pair.model.fa_pool.stats())
    assert reasons == {"a cache of type DynamicCache is not pooled: pass none, and get the plugin's": 4}


@pytest.mark.processes
def test_forwards_with_gradients_are_pooled(pair: Pair) -> None:
    ids, before = random_ids(2, 40), pair.model.fa_pool.stats()
    gradients: list[Tensor] = []
    with pair.forwards():
        for net in (pair.reference, pair.model):
            loss = net(ids, labels=ids).loss
            gradients += torch.autograd.grad(loss, [net.get_input_embeddings().weight])
    assert_close(gradients[1], gradients[0], tolerance=1e-4, what="gradient")
    after = pair.model.fa_pool.stats()
    assert local_reasons(before, after) == {}
    for phase in ("training", "backward"):
        assert after[phase]["pooled_calls"] - before[phase]["pooled_calls"] == pair.layers, phase


@pytest.mark.processes
def test_gradients_of_inputs_are_pooled(pair: Pair) -> None:
    """Frozen weights and embeddings that are learned, as in prompt tuning."""
    embeds = pair.reference.get_input_embeddings()(random_ids(2, 40)).detach()
    gradients: list[Tensor] = []
    with pooled(pair.folder) as model:
        model.requires_grad_(False)
        with pools(model, prefill=0, decode=0):
            for net in (pair.reference, model):
                given = embeds.clone().requires_grad_()
                logits = net(inputs_embeds=given, use_cache=False).logits
                gradients += torch.autograd.grad(logits.logsumexp(-1).sum(), [given])
        assert model.fa_pool.stats()["backward"]["pooled_calls"] == pair.layers
    assert_close(gradients[1], gradients[0], tolerance=1e-4, what="gradient")


@pytest.mark.processes
@pytest.mark.parametrize("asked_by", ["call", "config"])
def test_attention_weights_stay_local(pair: Pair, asked_by: str) -> None:
    ids, mask = padded_batch([22, 40, 31])
    call = {"output_attentions": True} if asked_by == "call" else {}
    config = {"output_attentions": True} if asked_by == "config" else {}
    with pooled(pair.folder, {"attn_implementation": "eager", **config}) as model, torch.no_grad():
        expected = pair.reference(ids, attention_mask=mask, output_attentions=True)
        with pools(model, prefill=0, decode=0):
            output = model(ids, attention_mask=mask, **call)
        reasons = model.fa_pool.stats()["local_reasons"]
    assert list(reasons) == ["output_attentions: pool ranks return no attention weights; ask for none"]
    assert len(output.attentions) == pair.layers
    for weights, wanted in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(weights, wanted), f"weights differ by {(weights - wanted).abs().max():.3g}"


@pytest.mark.processes
@pytest.mark.parametrize("entry", ["model", "decoder"])
def test_an_interrupted_forward_decides_nothing_for_the_next(pair: Pair, entry: str, monkeypatch: Any) -> None:
    """torch calls no hook after an interrupt: the forward it left behind must not be taken for one around the next."""
    model = pair.model
    called = model if entry == "model" else model.model
    mask = padding_mask([40, 25])

    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(model.model.layers[1].mlp, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                called(random_ids(2, 40))
        if entry == "model":
            assert not model.fa_pool.in_pooled_forward
        for other in (called, model):
            got = other(random_ids(2, 40), attention_mask=mask)[0]
            reference = pair.reference if other is model else pair.reference.model
            want = reference(random_ids(2, 40), attention_mask=mask)[0]
            assert_close(got * mask[..., None], want * mask[..., None])
    assert not model.fa_pool.in_pooled_forward
