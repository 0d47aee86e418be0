"""Gradients through a frozen model in evaluation, asked of what only its layers see, where keys have owners."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests.blocks import in_blocks
from tests.integrations.huggingface.test_vision_models import IMAGE, built, prompt
from tests.models import assert_close, padded_batch, plain, random_ids, save_model
from tests.thread_pool import ThreadPool

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread_each")]
LONG = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def embeddings(model: Any) -> Tensor:
    """As enable_input_require_grads() has it: gradients of what the embedding gives."""
    kept = torch.zeros(48, requires_grad=True)
    model.model.embed_tokens.register_forward_hook(lambda _m, _a, out: out.detach().requires_grad_() + kept)
    return kept


def steering_vector(model: Any) -> Tensor:
    """Added after the first layer, whose own keys want no gradients: they are with owners by then."""
    vector = torch.zeros(48, requires_grad=True)
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out: out + vector)
    return vector


WAYS: dict[str, Callable[[Any], Tensor]] = {"embeddings": embeddings, "steering vector": steering_vector}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blocks", [1, None])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_hidden_states(llama: Path, way: str, blocks: int | None, padded: bool) -> None:
    """Such a forward is one of training, and pooled, with its default use_cache, too."""
    ids, mask = padded_batch([LONG, 25]) if padded else (random_ids(2, LONG), None)
    real = torch.ones_like(ids) if mask is None else mask
    found: list[Any] = []
    with in_blocks(llama, blocks, kv_home="pool") as model:
        for net in (model, plain(llama)):
            vector = WAYS[way](net.requires_grad_(False))
            net(ids, attention_mask=mask).logits[real == 1].logsumexp(-1).sum().backward()
            found.append(vector.grad)
        assert_close(*found, what=f"gradient of the {way}")
        stats = model.fa_pool.stats()
        assert stats["backward"]["pooled_calls"] >= 1, stats
        assert stats["local_reasons"] == {}, stats


@pytest.mark.parametrize("blocks", [1, None])
def test_gradients_of_pixels(blocks: int | None) -> None:
    found: list[Any] = []
    settings = {"threshold": 16, "pool_ranks": 2, "activation": "length", "memory_limit_mib": 64, "blocks": blocks}
    model = FAPoolForCausalLM.wrap(built("llava"), settings | {"kv_home": "pool"})
    model.fa_pool.leases.source = ThreadPool
    ids = prompt().clone()
    ids[0, 5:9] = IMAGE
    with model.fa_pool:
        for net in (model, built("llava")):
            torch.manual_seed(1)
            pixels = torch.randn(1, 3, 16, 16, requires_grad=True)
            logits = net.requires_grad_(False)(input_ids=ids, pixel_values=pixels).logits
            logits[:, -1].logsumexp(-1).sum().backward()
            found.append(pixels.grad)
        assert_close(*found, what="gradient of the pixels")
        assert model.fa_pool.stats()["backward"]["pooled_calls"] >= 2


def test_keys_of_before_stay_those_of_their_sequence(llama: Path) -> None:
    """A continued cache: local, with a reason; the sequence goes on as if no gradient had been asked for."""
    first, second, third = (random_ids(2, LONG, seed=seed) for seed in range(3))
    found: list[Any] = []
    logits = []
    with in_blocks(llama, 1, kv_home="pool") as model:
        for net in (model, plain(llama)):
            net.requires_grad_(False)
            with torch.no_grad():
                cache = net(first).past_key_values
            vector = torch.zeros(48, requires_grad=True)
            hook = net.model.layers[0].mlp.register_forward_hook(lambda _m, _a, out, vector=vector: out + vector)
            net(second, past_key_values=cache).logits.logsumexp(-1).sum().backward()
            hook.remove()
            with torch.no_grad():
                logits.append(net(third, past_key_values=cache).logits)
            found.append(vector.grad)
        assert_close(*found, what="gradient of the vector")
        assert_close(*logits)
        (reason,) = model.fa_pool.stats()["local_reasons"]
        assert reason.startswith("gradients through a cache"), reason


def test_inference_keeps_its_owners(llama: Path) -> None:
    """Without gradients in it a forward outside of no_grad() is one of inference."""
    with in_blocks(llama, 1, kv_home="pool") as model:
        cache = model.requires_grad_(False)(random_ids(2, LONG)).past_key_values
        assert model.fa_pool.stats()["prefill"]["pooled_calls"] == 2
        assert cache.get_seq_length() == LONG
