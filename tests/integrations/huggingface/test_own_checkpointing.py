"""Layers, or a whole model, that torch's own checkpoints run a second time, without transformers' flag."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from tests.blocks import in_blocks
from tests.models import THRESHOLD, padded_batch, plain, random_ids, save_model
from tests.survey import survey
from tests.training import assert_alike, gradients, same_gradients

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("one_thread_each")]
LONG = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def wrapped(model: Any, reentrant: bool) -> None:
    """As with FSDP."""
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=kind)
    apply_activation_checkpointing(
        model, checkpoint_wrapper_fn=wrapper, check_fn=lambda x: isinstance(x, LlamaDecoderLayer)
    )


def patched(model: Any, reentrant: bool, layers: slice = slice(None)) -> None:
    """Nothing shows it before such a layer runs."""

    def again(forward: Callable[..., Any], hidden: Any, **kwargs: Any) -> Any:
        return checkpoint(functools.partial(forward, **kwargs), hidden, use_reentrant=reentrant)

    for layer in model.model.layers[layers]:
        layer.forward = functools.partial(again, layer.forward)


def last_patched(model: Any, reentrant: bool) -> None:
    """A layer has been pooled by the time that one shows it."""
    patched(model, reentrant, slice(1, None))


WAYS = {"wrapped": wrapped, "patched": patched, "last layer": last_patched}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(("attention", "padded"), [("eager", False), ("sdpa", True)], ids=["eager", "padded"])
@pytest.mark.parametrize("blocks", [1, None])
def test_layers(llama: Path, way: str, reentrant: bool, attention: str, padded: bool, blocks: int | None) -> None:
    """Pooled both times, with the masks that the forward had."""
    ids, mask = padded_batch([LONG, 25]) if padded else (random_ids(2, LONG), None)
    reference = plain(llama, attn_implementation=attention).train()
    with in_blocks(llama, blocks, arguments={"attn_implementation": attention}) as model:
        for net in (model, reference):
            net.enable_input_require_grads()
            WAYS[way](net, reentrant)
        model.train()
        assert_alike(model, reference, ids, mask, use_cache=False)
        before = model.fa_pool.stats()["training"]["pooled_calls"]
        assert_alike(model, reference, ids, mask, use_cache=False)
        stats = model.fa_pool.stats()
        calls = stats["training"]["pooled_calls"] - before
        assert calls == (3 if way == "last layer" else 4), f"checkpointed layers twice: {calls} calls"
        assert (stats["backward"]["pooled_calls"], stats["local_reasons"]) == (4, {}), stats


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("blocks", [1, None])
def test_a_whole_model(llama: Path, reentrant: bool, blocks: int | None) -> None:
    found, ids = [], random_ids(2, LONG)
    with in_blocks(llama, blocks) as model:
        for net in (model, plain(llama)):
            embedded = net.get_input_embeddings()(ids).detach().requires_grad_()

            def loss(x: Any, net: Any = net) -> Any:
                return net(inputs_embeds=x, use_cache=False).logits.logsumexp(-1).sum()

            checkpoint(loss, embedded, use_reentrant=reentrant).backward()
            named = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            found.append(named | {"embedded": embedded.grad})
        same_gradients(*found)
        assert model.fa_pool.stats()["backward"]["pooled_calls"] >= 2


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_random_numbers_are_the_models_own(tmp_path: Path, reentrant: bool) -> None:
    """A forward that is begun anew, as the first layer that is checkpointed shows, draws none twice."""
    folder = save_model("llama", tmp_path)
    reference = plain(folder)
    with in_blocks(folder, 1) as model:
        for net in (model, reference):
            net.train().enable_input_require_grads()
            net.model.embed_tokens.register_forward_hook(lambda _m, _a, out: torch.nn.functional.dropout(out, 0.2))
            patched(net, reentrant)
        found = []
        for net in (model, reference):
            torch.manual_seed(3)
            found.append(gradients(net, random_ids(2, LONG), use_cache=False)[1])
        same_gradients(*found)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("padded", [True, False])
def test_short_rows_are_as_without_the_plugin(llama: Path, reentrant: bool, padded: bool) -> None:
    ids, mask = padded_batch([THRESHOLD, 9]) if padded else (random_ids(2, THRESHOLD), None)
    reference = plain(llama)
    with in_blocks(llama, 1) as model:
        for net in (model, reference):
            net.train().enable_input_require_grads()
            patched(net, reentrant)
        found, expected = (gradients(net, ids, mask, use_cache=False)[1] for net in (model, reference))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert model.fa_pool.stats()["activations"] == 0


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_frozen_weights_in_evaluation(llama: Path, reentrant: bool) -> None:
    """Gradients of the input alone: the second time is the model's own, with the masks of the first."""
    ids, mask = padded_batch([LONG, 25])
    found = []
    with in_blocks(llama, 1, arguments={"attn_implementation": "eager"}) as model:
        for net in (model, plain(llama, attn_implementation="eager")):
            net.requires_grad_(False)
            patched(net, reentrant)
            vector = torch.zeros(48, requires_grad=True)
            net.model.embed_tokens.register_forward_hook(lambda _m, _a, out, vector=vector: out + vector)
            net(ids, attention_mask=mask, use_cache=False).logits[mask == 1].logsumexp(-1).sum().backward()
            assert vector.grad is not None
            found.append({"vector": vector.grad})
        same_gradients(*found)


@pytest.mark.parametrize("trained", [True, False])
def test_keys_that_would_be_cached_twice(llama: Path, trained: bool) -> None:
    """As with the plain model, whose gradients are wrong then: refused."""
    with in_blocks(llama, 1) as model:
        patched(model.requires_grad_(trained), reentrant=True)
        model.enable_input_require_grads()
        loss = model(random_ids(2, LONG)).logits.sum()
        with pytest.raises(RuntimeError, match="use_cache=False"):
            loss.backward()


def test_a_second_time_that_was_not_seen(llama: Path) -> None:
    """Hooks on tensors inside hide a checkpoint: no layer is computed without the masks that it needs."""

    def hidden_in(forward: Callable[..., Any], **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu():
            return forward(**kwargs)

    ids, mask = padded_batch([LONG, 25])
    with in_blocks(llama, 1) as model:
        patched(model.train(), reentrant=False)
        for layer in model.model.layers:
            layer.self_attn.forward = functools.partial(hidden_in, layer.self_attn.forward)
        loss = model(ids, attention_mask=mask, use_cache=False).logits[mask == 1].logsumexp(-1).sum()
        with pytest.raises(RuntimeError, match="gradient_checkpointing_enable"):
            loss.backward()


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_layers_that_a_model_runs_without_gradients_are_not_checkpointed() -> None:
    outcome = survey("hrm_text").uses["gradients"]
    assert (outcome.kind, outcome.in_blocks) == ("equal", 1), outcome
