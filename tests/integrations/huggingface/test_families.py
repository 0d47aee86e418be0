"""Every model family gives the same logits and tokens with pool ranks as with its own eager attention, and exactly
the plain model's bits at or under the threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.integrations.huggingface import FAPoolForCausalLM
from tests.models import (
    FAMILIES,
    THRESHOLD,
    assert_clear_choices,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    load_pooled,
    logits_too,
    padded_batch,
    plain,
    pooled,
    pools,
    random_ids,
    save_model,
    workers,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

NEW_TOKENS = 12
KEYS_ON_THE_POOL = ("llama", "gemma2", "deepseek_v3")
CASES = [
    *[pytest.param(name, 2, "line", id=f"{name}-2") for name in FAMILIES],
    *[pytest.param("llama", ranks, "line", id=f"llama-{ranks}") for ranks in (1, 3)],
    *[
        pytest.param(name, 2, "query_blocks", id=f"{name}-2-query_blocks")
        for name in ("llama", "gemma2", "deepseek_v3")
    ],
    *[
        pytest.param(name, ranks, "line", id=f"{name}-{ranks}", marks=pytest.mark.full)
        for name in FAMILIES
        for ranks in (1, 3)
        if name != "llama"
    ],
]


@pytest.mark.processes
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in KEYS_ON_THE_POOL else [pytest.mark.full]) for name in FAMILIES],
)
def test_long_calls_with_keys_on_the_pool_equal_eager(tmp_path: Path, name: str) -> None:
    test_long_calls_equal_eager(tmp_path, name, 2, "line", kv_home="pool")


@pytest.mark.processes
@pytest.mark.parametrize(("name", "ranks", "partition"), CASES)
def test_long_calls_equal_eager(tmp_path: Path, name: str, ranks: int, partition: str, **settings: Any) -> None:
    folder, full = save_model(name, tmp_path), FAMILIES[name].full_layers
    reference = eager(folder)
    ids, mask = padded_batch([33, 40, 39])
    asked = greedily(NEW_TOKENS, mask)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).logits
    greedy = reference.generate(ids, **asked, **logits_too())
    assert_clear_choices(greedy.logits)
    beams = reference.generate(ids, **asked, num_beams=3)

    with pooled(folder, pool_ranks=ranks, partition=partition, **settings) as model:
        with pools(model, prefill=full, decode=0), torch.no_grad():
            logits = model(ids, attention_mask=mask).logits
        assert_close(logits[mask == 1], expected[mask == 1])

        with pools(model, prefill=full, decode=full * (NEW_TOKENS - 1)):
            result = model.generate(ids, **asked, **logits_too())
        assert_same_tokens(result.sequences, greedy.sequences)
        assert_close(torch.stack(result.logits), torch.stack(greedy.logits), what="logits of decode")

        with pools(model, prefill=full, decode=full * (NEW_TOKENS - 1)):
            assert_same_tokens(model.generate(ids, **asked, num_beams=3), beams)

        stats = model.fa_pool.stats()
        assert stats["prefill"]["local_calls"] == (2 - full) * 3
        assert stats["decode"]["local_calls"] == (2 - full) * 2 * (NEW_TOKENS - 1)
        assert stats["faults"] == 0
        calls = [rank["calls"] for rank in stats["ranks"]]
        assert (len(calls) == ranks and all(calls)) if full else not any(calls), calls


@pytest.mark.parametrize("name", FAMILIES)
def test_short_calls_are_the_plain_models(tmp_path: Path, name: str) -> None:
    folder, before = save_model(name, tmp_path), workers()
    reference, model = plain(folder), load_pooled(folder)
    for lengths in ([THRESHOLD], [13, THRESHOLD, 1]):
        ids, mask = padded_batch(lengths)
        with torch.no_grad():
            logits, expected = (net(ids, attention_mask=mask).logits for net in (model, reference))
        assert torch.equal(logits, expected), f"largest difference {(logits - expected).abs().max():.3g}, not 0"
        # The last forward is of 16 tokens.
        settings = greedily(7, mask[:, -10:]) | logits_too()
        got, wanted = (net.generate(ids[:, -10:], **settings) for net in (model, reference))
        assert_same_tokens(got.sequences, wanted.sequences)
        worst = (torch.stack(got.logits) - torch.stack(wanted.logits)).abs().max()
        assert worst == 0, f"largest difference of generate's logits {worst:.3g}, not 0"
    stats = model.fa_pool.stats()
    assert stats["prefill"]["local_calls"] == 2 * 4
    assert stats["decode"]["local_calls"] == 2 * 2 * 6
    assert stats["activations"] == stats["prefill"]["pooled_calls"] == stats["decode"]["pooled_calls"] == 0
    assert workers() == before, "a pool rank was started for short calls"


@pytest.mark.processes
def test_a_model_that_only_slides_borrows_nothing(tmp_path: Path) -> None:
    before = workers()
    with pooled(save_model("mistral_window", tmp_path)) as model, torch.no_grad():
        model(random_ids(1, 40))
        stats = model.fa_pool.stats()
        assert workers() == before, "pool ranks were started for layers that never use them"
    assert (stats["activations"], stats["prefill"]["pooled_forwards"]) == (0, 0)


@pytest.mark.processes
def test_a_window_wider_than_the_prompt(tmp_path: Path) -> None:
    """Such layers are full for a while; beyond the window they must slide again."""
    folder = save_model("mistral", tmp_path, sliding_window=40)
    reference, ids = eager(folder), random_ids(2, 36)
    settings = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = reference.generate(ids, **settings)
    assert_clear_choices(expected.logits)
    with pooled(folder) as model:
        result = model.generate(ids, **settings)
        assert model.fa_pool.stats()["faults"] == 0
    assert_same_tokens(result.sequences, expected.sequences)
    assert_close(torch.stack(result.logits), torch.stack(expected.logits))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_scores_that_sdpa_would_not_cap_are_refused(tmp_path: Path, implementation: str) -> None:
    """Transformers before 5.23 loads such a model with sdpa, which leaves the cap out."""
    model = plain(save_model("gemma2", tmp_path), attn_implementation="eager")
    model.config._attn_implementation_internal = implementation
    if implementation == "eager":
        FAPoolForCausalLM.wrap(model).fa_pool.close()
        return
    with pytest.raises(ValueError, match=r'Gemma2ForCausalLM caps its scores .*attn_implementation="eager"'):
        FAPoolForCausalLM.wrap(model)
