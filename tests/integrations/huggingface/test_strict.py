"""Long forwards that stay local for a reason known beforehand: told once in training, refused if that is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from tests.models import THRESHOLD, padded_batch, pooled, random_ids, save_model, workers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]
LONG = 40
DROPOUT = "attention dropout 0.3: its random numbers are the model's own; set it to 0 to train pooled"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@contextmanager
def refused(model: Any, reason: str, tokens: int = LONG) -> Iterator[None]:
    """What runs inside is refused for ``reason`` before any layer runs and any rank is asked for."""

    def runs(*_: Any) -> None:
        raise AssertionError("a layer ran")

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_pre_hook(runs) for module in leaves]
    before = workers()
    with pytest.raises(ValueError, match="fa_pool is strict") as caught:
        yield
    for hook in hooks:
        hook.remove()
    assert workers() == before, "pool ranks were started"
    told = str(caught.value)
    for part in (reason, f"forward of {tokens} tokens, above threshold {THRESHOLD}", f"raise threshold to {tokens}"):
        assert part in told, told
    assert not model.fa_pool.in_pooled_forward
    assert model.fa_pool.stats()["training"]["local_forwards"] == 0


def test_dropout_is_told_once(tmp_path: Path) -> None:
    with pooled(save_model("llama", tmp_path, attention_dropout=0.3)) as model:
        ids = random_ids(1, LONG)
        with warnings.catch_warnings(record=True, action="always") as told:
            for _ in range(3):
                model.train()(ids, labels=ids).loss.backward()
        ours = [str(one.message) for one in told if "fa_pool" in str(one.message)]
        assert ours == [f"fa_pool: training is not pooled: {DROPOUT}"]
        assert model.fa_pool.stats()["local_reasons"] == {DROPOUT: 3}


def test_inference_is_not_told(llama: Path) -> None:
    """A user who asks for attention weights there knows."""
    arguments = {"attn_implementation": "eager"}
    with pooled(llama, arguments) as model, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model(random_ids(1, LONG), output_attentions=True)
        assert len(model.fa_pool.stats()["local_reasons"]) == 1


def test_dropout_is_refused(tmp_path: Path) -> None:
    with pooled(save_model("llama", tmp_path, attention_dropout=0.3), strict=True) as model:
        ids = random_ids(2, LONG)
        model.train()
        with refused(model, DROPOUT):
            model(ids, labels=ids)
        # Rows that are long by their padding only.
        padded, mask = padded_batch([THRESHOLD, 9])
        wide = [nn.functional.pad(x, (LONG - THRESHOLD, 0)) for x in (padded, mask)]
        with pytest.warns(RuntimeWarning, match="not pooled"):
            model(wide[0], attention_mask=wide[1])
        model(random_ids(1, THRESHOLD))
        with torch.no_grad():
            model.eval()(ids)
        assert model.fa_pool.stats()["prefill"]["pooled_forwards"] == 1, "without dropout nothing is refused"


def test_other_reasons_are_refused(llama: Path) -> None:
    ids = random_ids(1, LONG)
    with pooled(llama, {"attn_implementation": "eager"}, strict=True) as model:
        with torch.no_grad():
            with refused(model, "output_attentions: pool ranks return no attention weights; ask for none"):
                model(ids, output_attentions=True)
            with refused(model, "a cache of type DynamicCache is not pooled: pass none"):
                model(ids, past_key_values=DynamicCache(config=model.config))
            with refused(model, "a cache of type DynamicCache is not pooled: pass none"):
                model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=2)
            packed = torch.arange(LONG).repeat(2, 1) % (LONG // 2)
            with pytest.raises(ValueError, match=r"fa_pool is strict, and this .* packed into 2 row"):
                model(random_ids(2, LONG), position_ids=packed, use_cache=False)
            short = model(ids[:, :THRESHOLD], use_cache=True)
        with refused(model, "gradients through a cache: pass none while training"):
            model(ids[:, THRESHOLD:], past_key_values=short.past_key_values)
        with torch.no_grad():
            model(ids)
        model(ids, labels=ids).loss.backward()
        stats = model.fa_pool.stats()
        assert (stats["local_reasons"], stats["backward"]["pooled_calls"]) == ({}, 2), stats


def test_a_model_without_full_attention_is_refused(tmp_path: Path) -> None:
    with pooled(save_model("mistral_window", tmp_path), strict=True) as model:
        with refused(model, "no layer has full attention: load the model without fa_pool"), torch.no_grad():
            model(random_ids(1, LONG))
        model(random_ids(1, THRESHOLD))


def test_megatron(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    from fapool_plugin.integrations.megatron.attention import OUTSIDE
    from tests import megatron_models as mm

    folder, ids = mm.save_llama(tmp_path), random_ids(1, LONG)
    with mm.alone() as groups:
        dropped, mask = {"attention_dropout": 0.3}, mm.causal_mask([0], LONG)
        model = mm.build(folder, groups, megatron=dropped)
        with model.train().fa_pool, pytest.warns(RuntimeWarning, match=f"not pooled: {DROPOUT}"):
            mm.logits_of(model, ids)
        model = mm.build(folder, groups, megatron=dropped, strict=True)
        with model.fa_pool, torch.no_grad():
            with refused(model.train(), DROPOUT):
                mm.logits_of(model, ids)
            mask[..., 30:, 10:20] = True
            with refused(model.eval(), "attention_mask hides more than padding and the future"):
                mm.logits_of(model, ids, mask)
            hidden, rotary = model.embedding(ids, mm.positions(ids)), model.rotary_pos_emb(LONG)
            with pytest.raises(ValueError, match="fa_pool is strict") as caught:
                model.decoder(hidden, None, rotary_pos_emb=rotary)
            assert OUTSIDE in str(caught.value)
            mm.logits_of(model, ids)
            assert model.fa_pool.stats()["prefill"]["pooled_calls"] == mm.LAYERS
