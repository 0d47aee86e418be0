"""Large batches: rows alike share tiles, unequal ones do not, and every row equals the plain model's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base.asking import AttentionRequests
from tests.models import (
    TOLERANCE,
    Pair,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    padded_batch,
    pooled,
    random_ids,
    save_model,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

NEW = 5
LARGE = [24, pytest.param(256, marks=pytest.mark.full)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with Pair.of(save_model("llama", tmp_path_factory.mktemp("llama")), pool_ranks=3) as pair:
        yield pair


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tiles each request has."""
    message, counts = AttentionRequests.message, list[int]()

    def counted(self: Any, request: Any) -> Any:
        counts.append(len(request.tiles))
        return message(self, request)

    monkeypatch.setattr(AttentionRequests, "message", counted)
    return counts


@pytest.mark.processes
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rows", LARGE)
@pytest.mark.parametrize("beams", [1, 3])
def test_rows_of_unequal_lengths(pair: Pair, rows: int, beams: int) -> None:
    ids, mask = padded_batch([40 - (7 * row) % 24 for row in range(rows)])
    arguments = greedily(NEW, mask, num_beams=beams, output_logits=True, return_dict_in_generate=True)
    found, expected = pair.generate(ids, prefill=1, decode=NEW - 1, **arguments)
    for step, (logits_BV, wanted_BV) in enumerate(zip(found.logits, expected.logits, strict=True)):
        assert_close(logits_BV, wanted_BV, what=f"logits of step {step}")
    clear = torch.stack(expected.logits).topk(2).values.diff(dim=-1).abs().amin() > 10 * TOLERANCE
    assert clear or beams > 1, "choose another seed"
    assert_same_tokens(found.sequences, expected.sequences)


@pytest.mark.processes
@pytest.mark.parametrize("rows", LARGE)
def test_rows_alike_are_a_handful_of_tiles(pair: Pair, tiles: list[int], rows: int) -> None:
    """However many rows: the rest of a lane, heads of a row, whole rows, heads, the beginning of a lane."""
    ids = random_ids(rows, 33)
    found, expected = pair.generate(ids, prefill=1, decode=NEW - 1, **greedily(NEW, torch.ones_like(ids)))
    assert_same_tokens(found, expected)
    assert 0 < max(tiles) <= 5, f"a request has {max(tiles)} tiles"


@pytest.mark.processes
def test_rows_that_come_and_go(pair: Pair) -> None:
    """Rows are chosen, doubled and reordered between steps, so that what ranks hold of them differs from row to row."""
    before = pair.model.fa_pool.stats()
    with torch.no_grad():
        ids, mask = padded_batch([30, 22, 30, 17, 30, 22])
        caches = [net(ids, attention_mask=mask).past_key_values for net in (pair.model, pair.reference)]
        for step, chosen in enumerate(([0, 0, 3, 5], [3, 2, 1, 0], [1, 1, 1, 1, 2, 0])):
            rows = torch.tensor(chosen)
            mask = torch.cat([mask[rows], torch.ones(len(chosen), 1, dtype=mask.dtype)], dim=1)
            ids = random_ids(len(chosen), 1, seed=step)
            logits = []
            for net, cache in zip((pair.model, pair.reference), caches, strict=True):
                cache.reorder_cache(rows)
                logits.append(net(ids, attention_mask=mask, past_key_values=cache).logits)
            assert_close(logits[0], logits[1], what=f"logits after {chosen}")
    after = pair.model.fa_pool.stats()
    assert after["decode"]["pooled_calls"] > before["decode"]["pooled_calls"]
    assert (after["faults"], after["stale"]) == (before["faults"], before["stale"])


@pytest.mark.full
@pytest.mark.processes
@pytest.mark.timeout(900)
def test_a_thousand_rows_of_a_thousand_tokens(tmp_path: Path) -> None:
    """Equal on a sample of rows, which the plain model computes by themselves."""
    folder = save_model("llama", tmp_path, num_hidden_layers=4, max_position_embeddings=2048)
    ids, sample = random_ids(1024, 1100), torch.tensor([0, 341, 342, 682, 683, 1023])
    with pooled(folder, pool_ranks=3, memory_limit_mib=2048) as model, torch.no_grad():
        reference = eager(folder)
        found = model(ids, use_cache=True, logits_to_keep=1)
        expected = reference(ids[sample], use_cache=True, logits_to_keep=1)
        for step in range(3):
            assert_close(found.logits[sample], expected.logits, what=f"logits of step {step}")
            new = random_ids(1024, 1, seed=step)
            found = model(new, past_key_values=found.past_key_values)
            expected = reference(new[sample], past_key_values=expected.past_key_values)
        stats = model.fa_pool.stats()
        assert stats["prefill"]["pooled_calls"] == 4
        assert stats["decode"]["pooled_calls"] == 3 * 4
        assert (stats["faults"], stats["stale"]) == (0, 0), stats["events"]
