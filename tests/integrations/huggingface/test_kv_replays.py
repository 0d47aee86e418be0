"""Losses of keys on the pool where something else is under way: windows and states, waves, turns, a replay; and what
becomes of keys where there is nothing to replay."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.base import admission
from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.base.owned import OwnedKeys
from fapool_plugin.ranks.local import LocalPool
from tests.kv_home import LENGTHS, ON_THE_POOL, Steps, kill
from tests.models import Pair, assert_close, assert_same_tokens, eager, greedily, padded_batch, random_ids, save_config
from tests.models import save_model as save_family
from tests.survey import tiny

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]

FULL = pytest.mark.full


class Lose:
    """Ends pool ranks when it is called for the ``at``-th time."""

    def __init__(self, at: int, count: int = 1) -> None:
        self.at, self.count, self.calls = at, count, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.calls == self.at:
            kill(self.count)


def losing(monkeypatch: pytest.MonkeyPatch, lose: Lose) -> None:
    """Calls it each time that a layer's keys have been sent to their owners."""
    sent = OwnedKeys.sent

    def watched(self: Any, *args: Any) -> None:
        sent(self, *args)
        lose()

    monkeypatch.setattr(OwnedKeys, "sent", watched)


@pytest.mark.parametrize(
    ("name", "at"),
    [("qwen3_next", 3)]
    + [pytest.param(*each, marks=FULL) for each in product(("gemma2", "qwen3_next", "falcon_h1"), (1, 3))],
)
def test_windows_and_states_of_the_base_go_back(tmp_path: Path, name: str, at: int) -> None:
    """To where they were before the forward in whose last layer an owner is lost."""
    folder = save_family(name, tmp_path) if name == "gemma2" else save_config(tiny(name), tmp_path)
    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair, torch.no_grad():
        pair.model(random_ids(1, 40), use_cache=True)
        lose = Lose(at)
        hook = pair.model.model.layers[-1].register_forward_pre_hook(lose)
        steps = Steps(pair, random_ids(2, 50), torch.ones(2, 50, dtype=torch.long))
        for number in range(3):
            steps(1, f"step {number}")
        hook.remove()
        steps(7, "at last")
        stats = pair.model.fa_pool.stats()
    assert lose.calls > at
    assert stats["faults"] == 1
    assert stats["decode"]["pooled_calls"]


@FULL
@pytest.mark.parametrize(("settings", "at"), [({"wave_mib": 1, "blocks": 2}, 7), ({"turns": 2}, 11)])
def test_a_loss_in_waves_and_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], at: int
) -> None:
    lose = Lose(at)
    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL | settings) as pair, torch.no_grad():
        pair.model(random_ids(1, 40), use_cache=True)
        losing(monkeypatch, lose)
        steps = Steps(pair, *padded_batch([300] * 4))
        for number in range(4):
            steps(1, f"step {number}")
        stats = pair.model.fa_pool.stats()
    assert lose.calls > at
    assert stats["faults"] == 1
    assert stats["replays"] == ("turns" in settings)


def test_another_rank_is_lost_in_the_replay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair.of(folder, pool_ranks=3, **ON_THE_POOL) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch(LENGTHS))
        kill(1)
        lose = Lose(1)
        losing(monkeypatch, lose)
        steps(1, "a step")
        stats = pair.model.fa_pool.stats()
        assert (stats["faults"], stats["replays"]) == (2, 1)
        steps(1, "another step")


def test_ranks_that_are_half_full_have_room_for_a_replay(folder: Path) -> None:
    """Each of three has 0.55 MiB of 1; of two, each needs 0.83."""
    settings = ON_THE_POOL | {"memory_limit_mib": 1, "base_share": 0.0, "kv_block": 16}
    with Pair.of(folder, pool_ranks=3, **settings) as pair, torch.no_grad():
        steps = Steps(pair, *padded_batch([240] * 18))
        held = pair.model.fa_pool.stats()["kv_bytes"]["ranks"]
        assert 1.5 * 2**20 < sum(held.values()) < 2 * 2**20
        kill(1)
        steps(1, "a step")
        assert pair.model.fa_pool.stats()["replays"] == 1


@FULL
def test_a_base_that_is_left_alone_says_what_it_would_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on once it has it."""

    def none(self: Any, *_: Any) -> Any:
        raise RuntimeError("no more pool ranks")

    with Pair.of(folder, pool_ranks=2, **ON_THE_POOL) as pair, torch.no_grad(), monkeypatch.context() as patch:
        steps = Steps(pair, *padded_batch([250] * 8))
        mask = steps.mask
        patch.setattr(LocalPool, "acquire", none)
        kill(2)
        for limit in ("left_for_job", "left_for_process"):
            with monkeypatch.context() as short:
                short.setattr(admission, limit, lambda: 2**19)
                with pytest.raises(PoolMemoryError, match=r"8 sequences of 250 tokens .* need 1 MiB, and it has 0"):
                    steps(1, "without room")
            steps.mask = mask
        steps(1, "with room")
        assert pair.model.fa_pool.stats()["replays"] == 1


def test_other_padding_has_keys_dealt_anew(steps: Steps) -> None:
    """They come home for it, and what owners got then stays with them."""
    steps(1, "a step")
    steps.mask[1, :60] = 0
    for number in range(3):
        steps(1, f"step {number} of a row that has lost its beginning")
        assert steps.are_away()
    stats = steps.pair.model.fa_pool.stats()
    assert (stats["replays"], stats["faults"]) == (0, 0)
    assert sum(stats["kv_bytes"]["ranks"].values())
    kill(1)
    steps(1, "a step after a loss: what was seen before is seen in the replay")
    assert steps.pair.model.fa_pool.stats()["replays"] == 1


@FULL
def test_assisted_decoding(pair: Pair, tmp_path: Path) -> None:
    """Candidates are kept and cropped."""
    ids, arguments = random_ids(1, 40), greedily(16)
    assistant = eager(pair.folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    expected = pair.reference.generate(ids, assistant_model=assistant, **arguments)
    assert_same_tokens(pair.model.generate(ids, assistant_model=assistant, **arguments), expected)
    stats = pair.model.fa_pool.stats()
    assert 0 < stats["decode"]["pooled_calls"] < 16 * pair.layers, "no candidate was kept"


@FULL
def test_training_sends_keys_with_each_call(pair: Pair) -> None:
    """``kv_home`` is no word on it: the same gradients, and no key has an owner."""
    ids, mask = padded_batch(LENGTHS)
    labels = ids.masked_fill(mask.cumsum(1) <= 1, -100)  # neither padding nor what a padded query says
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (pair.model, pair.reference)]
    for loss in losses:
        loss.backward()
    assert_close(losses[0], losses[1], what="loss")
    for (name, one), other in zip(pair.model.named_parameters(), pair.reference.parameters(), strict=True):
        assert_close(one.grad, other.grad, what=f"gradient of {name}")
    stats = pair.model.fa_pool.stats()
    assert stats["backward"]["pooled_calls"]
    assert stats["kv_bytes"] == {"base": 0, "ranks": {}}
