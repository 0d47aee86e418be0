"""Bodies in shared memory, with real ranks: the same tokens and gradients as without the plugin, and one that dies in
the middle of a body changes none."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.config import FAPoolConfig, FAPoolConfigError
from fapool_plugin.ranks import linked
from fapool_plugin.ranks.launch import Launch
from fapool_plugin.ranks.launched import LaunchedPool
from fapool_plugin.wire import slotted
from fapool_plugin.wire.messages import Body, Header
from fapool_plugin.wire.shm import Shm
from tests.models import assert_close, eager, load_pooled, random_ids, save_model

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

PROMPT, NEW = 200, 6
SMALL_RING = 2**16
"""What is longer than 1 KiB goes through it, and what is longer than 32 in chunks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[Tensor]:
    """What the model says without the plugin."""
    return work(eager(folder))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that the base took out of its rings, piece by piece."""
    monkeypatch.setattr(linked, "RING_BYTES", SMALL_RING)
    found, copy_out = list[int](), Shm.copy_out

    def seen(self: Shm, header: Header, body: Body, done: int) -> int:
        found.append(copy_out(self, header, body, done))
        return found[-1]

    monkeypatch.setattr(Shm, "copy_out", seen)
    return found


def work(model: Any) -> list[Tensor]:
    """Tokens, and the gradients of a step of training."""
    ids = random_ids(2, PROMPT)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [tokens, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("carrier", ["auto", "shm", "inline"])
def test_tokens_and_gradients_are_the_same_whatever_carries_bodies(
    folder: Path, expected: list[Tensor], taken: list[int], carrier: str
) -> None:
    model = load_pooled(folder, pool_ranks=2, carrier=carrier)
    with model.fa_pool:
        got = work(model)
        stats = model.fa_pool.stats()
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert_close(one, other)
    assert stats["faults"] == 0
    assert min(stats[phase]["pooled_calls"] for phase in ("prefill", "decode", "training")) > 0
    kind = "inline" if carrier == "inline" else "shm"
    assert [rank["carrier"] for rank in stats["ranks"]] == [kind, kind]
    assert (sum(taken) > PROMPT * 1024) == (kind == "shm"), sum(taken)
    if kind == "shm":
        assert max(taken) <= SMALL_RING // 2 < stats["bytes_received"]


@pytest.mark.parametrize("piece", [1, 9])
@pytest.mark.parametrize("when", ["writing", "reading"])
def test_a_rank_killed_in_the_middle_of_a_body_changes_no_token(
    folder: Path, expected: list[Tensor], taken: list[int], monkeypatch: pytest.MonkeyPatch, when: str, piece: int
) -> None:
    """While the base writes what it asks, or takes what was answered: the other rank and the base go on."""
    model = load_pooled(folder, pool_ranks=2, carrier="shm", timeout_s=2.0)
    home, name = (slotted, "_said") if when == "writing" else (Shm, "copy_out")
    real: Callable[..., Any] = getattr(home, name)
    seen = 0

    def strike(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == piece:
            os.kill(model.fa_pool.leases.pool.pids()[0], signal.SIGKILL)
        return real(*arguments)

    monkeypatch.setattr(home, name, strike)
    with model.fa_pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = work(model)
        stats = model.fa_pool.stats()
    assert torch.equal(got[0], expected[0])
    for one, other in zip(got[1:], expected[1:], strict=True):
        assert_close(one, other)
    assert stats["faults"] == 1
    assert seen > piece, "the other rank works on"


def test_ranks_of_several_machines_share_no_memory() -> None:
    launch = Launch.__new__(Launch)
    object.__setattr__(launch, "one_machine", False)
    with pytest.raises(FAPoolConfigError, match="carrier is shm"):
        LaunchedPool(launch, FAPoolConfig(pool="launch", carrier="shm"))
