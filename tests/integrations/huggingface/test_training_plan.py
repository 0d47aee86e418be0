"""Training as the plan has it: what it decides, and that measuring a profile on the way changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fapool_plugin.integrations.huggingface import calibrate as huggingface_calibrate
from fapool_plugin.plan.clocks import Cores
from fapool_plugin.plan.forecast import choose_prefill
from fapool_plugin.plan.line import Row
from fapool_plugin.plan.profile import Fit
from tests.base.test_advisor import DEAR, kinds, planned, profile_of
from tests.blocks import save_long
from tests.models import eager, one_thread, plain, random_ids
from tests.training import assert_alike, gradients

LENGTH = 600
"""Two of the shortest blocks that a plan makes."""
WEIGHTY = Fit(b=600.0)
"""The linear part: half as long as attention, so that the best share is neither nothing nor half."""


@pytest.fixture(autouse=True)
def _one_thread_of_eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with one_thread():
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"), attention_dropout=0.0)


@pytest.mark.parametrize(("batch", "most"), [(1, 4), (2, 2)])
def test_the_share_is_the_best_for_a_prompt_in_as_many_pieces(llama: Path, batch: int, most: int) -> None:
    reference, seen = eager(llama).train(), []
    told = profile_of(reference, linear=WEIGHTY)
    expected = choose_prefill(
        told, [Row(0, LENGTH, LENGTH, batch)], ranks=1, cores=Cores(1, 1, 7), max_blocks=most, alone=False
    )
    assert 0 < expected.base_share < 0.5, f"{expected}: a share that a plan finds, and chance does not"
    with planned(llama, told) as model:
        begin = model.fa_pool.begin

        def noted(*args: Any, **keys: Any) -> Any:
            seen.append(begin(*args, **keys))
            return seen[-1]

        model.fa_pool.begin = noted
        assert_alike(model.train(), reference, random_ids(batch, LENGTH))
        (decided,) = seen
        assert (decided.ranks != (), decided.base_share) == (True, expected.base_share)
        assert decided.blocks == (expected.blocks if batch == 1 else 2)


def test_what_pays_nothing_is_local(llama: Path) -> None:
    reference = eager(llama).train()
    with planned(llama, profile_of(reference, link=DEAR)) as model:
        assert_alike(model.train(), reference, random_ids(1, LENGTH))
        stats = model.fa_pool.stats()
        assert stats["training"]["pooled_calls"] == stats["backward"]["pooled_calls"] == 0
        assert list(stats["local_reasons"]) == ["the plan: training is predicted to be faster without pool ranks"]


def test_measuring_on_the_way_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither gradients, nor random numbers of dropout, nor which modules train; a second step measures nothing."""
    monkeypatch.setattr(huggingface_calibrate, "user_cache_dir", lambda name: str(tmp_path / "kept"))
    folder = save_long("gpt2", tmp_path / "model", attn_pdrop=0.0, resid_pdrop=0.2, embd_pdrop=0.1)
    reference, ids = plain(folder, attn_implementation="eager").train(), random_ids(1, LENGTH)
    with planned(folder) as model:
        for net in (model.train(), reference):
            net.transformer.h[0].mlp.dropout.eval()
        modes = {name: module.training for name, module in model.named_modules()}
        for step in range(2):
            torch.manual_seed(step)
            loss, found = gradients(model, ids)
            drawn = torch.get_rng_state()
            torch.manual_seed(step)
            expected_loss, expected = gradients(reference, ids)
            assert torch.equal(drawn, torch.get_rng_state()), "random numbers were drawn"
            worst = max((found[name] - grad).abs().max().item() for name, grad in expected.items())
            largest = max(grad.abs().max().item() for grad in expected.values())
            assert worst < 1e-5 * largest, f"gradients differ by {worst:.3g}, the largest is {largest:.3g}"
            assert abs(loss - expected_loss) < 1e-5 * expected_loss
            assert {name: module.training for name, module in model.named_modules()} == modes
            assert kinds(model).count("profile") == 1
    assert "measuring this machine once" in capfd.readouterr().err
