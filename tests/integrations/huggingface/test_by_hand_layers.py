"""Attention that a user has put in the place of a model's own: the plain model's answer, pooled or with a reason."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    apply_rotary_pos_emb,
    eager_attention_forward,
    repeat_kv,
)

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests.kv_home import ON_THE_POOL, Steps, in_threads
from tests.models import Pair, assert_close, eager, padded_batch, random_ids
from tests.thread_pool import ThreadPool

pytestmark = [
    pytest.mark.processes,
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]
HOMES: dict[str, dict[str, Any]] = {"base": {}, "pool": ON_THE_POOL}
BY_ITSELF = "computes attention by itself"


@contextmanager
def both_eager(folder: Path, **settings: Any) -> Iterator[Pair]:
    """Both models are given masks of the same kind."""
    with in_threads(folder, pool_ranks=2, **settings) as pair:
        pair.model.set_attn_implementation("eager")
        yield pair


def reasons(model: Any) -> str:
    return "; ".join(model.fa_pool.stats()["local_reasons"])


def textbook(
    self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any = None, past_key_values: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention as many libraries patch it in, which adds a mask if it is given any."""
    shape = (*hidden_states.shape[:2], -1, self.head_dim)
    query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    key, value = (repeat_kv(x, self.num_key_value_groups) for x in (key, value))
    weights = query @ key.transpose(2, 3) * self.scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(-1)
    return self.o_proj((weights @ value).transpose(1, 2).flatten(2)), weights


def all_layers(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.forward = types.MethodType(textbook, layer.self_attn)


def last_layer(model: Any) -> None:
    attention = model.model.layers[-1].self_attn
    attention.forward = types.MethodType(textbook, attention)


def another_class(model: Any) -> None:
    kind: Any = type("OtherAttention", (LlamaAttention,), {"forward": textbook})
    for layer in model.model.layers:
        layer.self_attn.__class__ = kind


PATCHES = [all_layers, last_layer, another_class]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("when", ["before", "after", "within"])
def test_attention_that_was_patched_is_local(folder: Path, home: str, patch: Callable[[Any], None], when: str) -> None:
    """Before the model was pooled, after it, and after a prompt; in blocks where nothing speaks against it."""
    ids, mask = padded_batch([150, 97])
    with both_eager(folder, blocks=2, **HOMES[home]) as pair, torch.no_grad():
        if when == "before":
            net = eager(folder)
            patch(net)
            pair.model = FAPoolForCausalLM.wrap(net, pair.model.fa_pool.config.to_dict())
            pair.model.fa_pool.leases.source = ThreadPool
        if when != "within":
            patch(pair.reference)
        if when == "after":
            patch(pair.model)
        with pair.model.fa_pool:
            answers = [
                model(ids, attention_mask=mask, use_cache=False).logits[mask == 1]
                for model in (pair.model, pair.reference)
            ]
            assert_close(*answers, what="a prompt")
            steps = Steps(pair, ids, mask)
            if when == "within":
                assert not reasons(pair.model)
                patch(pair.reference)
                patch(pair.model)
            steps(1, "a step")
            steps(3, "more")
            found = reasons(pair.model)
            assert BY_ITSELF in found or "was changed after pooling" in found, found
            if when != "within":
                assert pair.model.fa_pool.stats()["prefill"]["pooled_forwards"] == 0


@pytest.mark.parametrize("home", HOMES)
def test_attention_whose_class_was_patched(folder: Path, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = padded_batch([150, 97])
    with both_eager(folder, **HOMES[home]) as pair, torch.no_grad():
        Steps(pair, ids, mask)(1, "pooled")
        assert not reasons(pair.model)
        monkeypatch.setattr(LlamaAttention, "forward", textbook)
        Steps(pair, ids, mask)(1, "patched")
        assert BY_ITSELF in reasons(pair.model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_patched_attention_is_trained_locally(folder: Path, checkpointing: bool) -> None:
    ids, mask = padded_batch([60, 41])
    with both_eager(folder) as pair:
        gradients = []
        for model in (pair.model, pair.reference):
            all_layers(model)
            model.train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False).loss.backward()
            gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
        assert_close(*gradients, what="gradients")
        assert ("computes with a mask" if checkpointing else BY_ITSELF) in reasons(pair.model)


def test_strict_refuses_patched_attention(folder: Path) -> None:
    with in_threads(folder, pool_ranks=1, strict=True) as pair, torch.no_grad():
        all_layers(pair.model)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"strict.*LlamaAttention 0 computes attention by itself"):
                pair.model(random_ids(1, 40))


def sharper(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """An attention function of a user's, with larger scores."""
    return sdpa_attention_forward(module, query * 1.5, *args, **kwargs)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {"sharper": sharper, "sharper_wrapped": functools.wraps(sdpa_attention_forward)(sharper)}
    functions["sharper_partial"] = functools.partial(sharper)
    for name, function in functions.items():
        monkeypatch.setitem(AttentionInterface._global_mapping, name, function)
        monkeypatch.setitem(AttentionMaskInterface._global_mapping, name, sdpa_mask)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("name", ["sharper", "sharper_wrapped", "sharper_partial", "sdpa"])
@pytest.mark.parametrize("when", ["loaded", "set", "within"])
def test_attention_functions_of_a_users_are_local(
    folder: Path, home: str, name: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen by their name when the model is loaded, later, or between two steps; or put behind a known name."""
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        models = [pair.model, pair.reference]

        def choose() -> None:
            if name == "sdpa":
                monkeypatch.setitem(AttentionInterface._global_mapping, name, sharper)
            for model in models:
                model.set_attn_implementation(name)

        if when == "loaded":
            config = pair.model.fa_pool.config.to_dict()
            arguments = {} if name == "sdpa" else {"attn_implementation": name}
            pair.model = FAPoolForCausalLM.from_pretrained(folder, fa_pool=config, **arguments).eval()
            pair.model.fa_pool.leases.source = ThreadPool
            models = models[1:]
        if when != "within":
            choose()
        with pair.model.fa_pool:
            steps = Steps(pair, *padded_batch([90, 61]))
            if when == "within":
                choose()
            steps(1, "a step")
            assert f'attention function "{name}" is not transformers\' own' in reasons(pair.model)
            assert pair.model.fa_pool.stats()["prefill"]["pooled_forwards"] == (when == "within")
            assert not pair.model.fa_pool.stats()["decode"]["pooled_forwards"]


@pytest.mark.parametrize("own", [True, False])
def test_eager_attention_that_was_exchanged_is_local(folder: Path, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return eager_attention_forward(module, query * 1.5, *args, **kwargs)

    if not own:
        monkeypatch.setattr(modeling_llama, "eager_attention_forward", other)
    with both_eager(folder) as pair, torch.no_grad():
        Steps(pair, *padded_batch([90, 61]))(1, "a step")
        assert ("own" in reasons(pair.model)) != own


def wrapped(module: nn.Module) -> None:
    """As accelerate hooks a module: a forward of its own that ends in the one that was there."""
    module._old_forward = old = module.forward  # type: ignore[assignment]

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs)

    module.forward = forward


def hooked_by_accelerate(module: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(module, hooks.ModelHook())


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("wrap", [wrapped, hooked_by_accelerate])
def test_wrappers_of_attention_are_pooled(folder: Path, home: str, wrap: Callable[[nn.Module], None]) -> None:
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        for model in (pair.model, pair.reference):
            for layer in model.model.layers:
                wrap(layer.self_attn)
        steps = Steps(pair, *padded_batch([90, 61]))
        steps(1, "a step")
        stats = pair.model.fa_pool.stats()
        assert stats["prefill"]["pooled_forwards"] == stats["decode"]["pooled_forwards"] == 1
        assert not stats["local_reasons"]


@pytest.mark.parametrize("home", HOMES)
def test_a_decoder_that_is_pooled_elsewhere_is_refused(folder: Path, home: str) -> None:
    """And both models that have it compute as before."""
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        other = eager(folder)
        other.model = pair.model.model
        before = dict(vars(other)), type(other), dict(vars(other.config))
        with pytest.raises(ValueError, match="LlamaForCausalLM holds a LlamaModel that is pooled as part of another"):
            FAPoolForCausalLM.wrap(other)
        assert before == (dict(vars(other)), type(other), dict(vars(other.config)))
        ids, mask = padded_batch([60, 41])
        expected = pair.reference(ids, attention_mask=mask).logits[mask == 1]
        for model in (other, pair.model):
            assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected)


@pytest.mark.parametrize("home", HOMES)
def test_a_layer_may_go_to_another_pooled_model(folder: Path, home: str) -> None:
    with in_threads(folder, pool_ranks=2, **HOMES[home]) as pair, torch.no_grad():
        other = eager(folder)
        other.model.layers[0] = pair.model.model.layers[0]
        other = FAPoolForCausalLM.wrap(other, pair.model.fa_pool.config.to_dict())
        other.fa_pool.leases.source = ThreadPool
        ids, mask = padded_batch([60, 41])
        expected = pair.reference(ids, attention_mask=mask).logits[mask == 1]
        with other.fa_pool:
            for model in (other, pair.model):
                assert_close(model(ids, attention_mask=mask).logits[mask == 1], expected)
        assert "was changed after pooling" in reasons(pair.model)
        assert not reasons(other)
