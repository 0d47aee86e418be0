"""Ranks that lie: what cannot be right is always refused, and with spot checks every other lie is noticed, too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.pool.worker import Worker
from fapool_plugin.ranks import pools
from fapool_plugin.wire.messages import Header, Message, Payload, Status
from tests import thread_pool
from tests.models import assert_close, eager, pooled, random_ids
from tests.thread_pool import ThreadPool

Parts = list[list[Tensor]]


def scaled(header: Header, parts: Parts) -> Header:
    for x in parts[0]:
        x.mul_(1.01)
    return header


def not_a_number(header: Header, parts: Parts) -> Header:
    parts[0][0].view(-1)[-1] = torch.nan
    return header


def infinite_lse(header: Header, parts: Parts) -> Header:
    parts[1][0].view(-1)[0] = torch.inf
    return header


def zeros(header: Header, parts: Parts) -> Header:
    for part in parts:
        for x in part:
            x.zero_()
    return header


def wrong_lse(header: Header, parts: Parts) -> Header:
    for x in parts[1]:
        x.add_(0.5)
    return header


def another_call(header: Header, parts: Parts) -> Header:
    return header._replace(call=header.call + 1)


def too_much(header: Header, parts: Parts) -> Header:
    parts[0].append(torch.zeros(7, dtype=parts[0][0].dtype))
    return header._replace(q_elements=header.q_elements + 7)


def unknown_status(header: Header, parts: Parts) -> Header:
    parts.clear()  # nothing is announced by it
    return header._replace(status=9)


OBVIOUS = [not_a_number, infinite_lse, another_call, too_much, unknown_status]
"""What no rank can mean."""
SUBTLE = [scaled, zeros, wrong_lse]


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Header, Parts], Header], str], None]:
    """Lets the first rank that is made lie, in forward or backward; ranks are threads of this process."""
    made: list[Worker] = []
    told: dict[str, Any] = {}

    class Liar(Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

        def attend(self, message: Message) -> tuple[Header, Payload]:
            return self._lie("forward", *super().attend(message))

        def backward(self, message: Message) -> tuple[Header, Payload]:
            return self._lie("backward", *super().backward(message))

        def _lie(self, where: str, header: Header, tensors: Payload) -> tuple[Header, Payload]:
            if where != told.get("where") or self is not made[0] or header.status != Status.OK:
                return header, tensors
            parts = [
                [x.clone(memory_format=torch.contiguous_format) for x in ([part] if isinstance(part, Tensor) else part)]
                for part in tensors
            ]
            return told["lie"](header, parts), parts

    monkeypatch.setattr(thread_pool, "Worker", Liar)
    monkeypatch.setattr(pools, "LocalPool", ThreadPool)
    return lambda lie, where: told.update(lie=lie, where=where)


def prompt_and_steps(model: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model(random_ids(2, 150), use_cache=True)
        found, past = [out.logits], out.past_key_values
        for step in range(3):
            found.append(model(random_ids(2, 1, seed=step), past_key_values=past).logits)
    return found


@pytest.mark.parametrize("lie", OBVIOUS + SUBTLE, ids=lambda lie: lie.__name__)
def test_a_rank_that_lies_in_forward_changes_no_logit(folder: Path, liar: Any, lie: Any) -> None:
    want = prompt_and_steps(eager(folder))
    liar(lie, "forward")
    share = 0.0 if lie in OBVIOUS else 1.0
    with pooled(folder, pool_ranks=2, spot_check=share, timeout_s=20.0) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for got, expected in zip(prompt_and_steps(model), want, strict=True):
            assert_close(got, expected)
        stats = model.fa_pool.stats()
    assert stats["faults"] == 1, stats["events"]
    assert stats["spot_check_failures"] == (lie in SUBTLE)
    (fault,) = (event["reason"] for event in stats["events"] if event["kind"] == "fault")
    assert "closed" not in fault, f"it was to lie, and ended: {fault}"
    assert stats["ranks"][1]["calls"] > 0, "the other rank goes on"


@pytest.mark.parametrize("lie", [scaled, zeros, too_much], ids=lambda lie: lie.__name__)
def test_a_rank_that_lies_in_backward_changes_no_gradient(folder: Path, liar: Any, lie: Any) -> None:
    ids, reference = random_ids(2, 150), eager(folder)
    reference(ids, labels=ids).loss.backward()
    liar(lie, "backward")
    with pooled(folder, pool_ranks=2, spot_check=1.0, timeout_s=20.0) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model(ids, labels=ids).loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            assert_close(mine.grad, theirs.grad, what=name)
        stats = model.fa_pool.stats()
    assert stats["faults"] == 1, stats["events"]
    assert stats["backward"]["pooled_calls"] > 0


@pytest.mark.parametrize("reduction", ["direct", "tree"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_honest_ranks_pass_every_check(folder: Path, dtype: torch.dtype, reduction: str) -> None:
    settings = {"pool_ranks": 3, "spot_check": 1.0, "partition": "query_blocks", "reduction": reduction}
    ids = random_ids(2, 150)
    with pooled(folder, {"dtype": dtype}, **settings) as model:
        for _ in range(2):
            prompt_and_steps(model)
            model(ids, labels=ids).loss.backward()
        stats = model.fa_pool.stats()
    assert stats["spot_checks"] > 100
    assert (stats["faults"], stats["spot_check_failures"]) == (0, 0), stats["events"]


def test_a_rare_check_finds_a_rank_that_always_lies(folder: Path, liar: Any) -> None:
    """At 2 % of all answers, within 200 calls."""
    liar(scaled, "forward")
    with pooled(folder, pool_ranks=2, spot_check=0.02, timeout_s=20.0) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        model.fa_pool.spot_check._random.seed(1)
        with torch.no_grad():
            past = model(random_ids(1, 150), use_cache=True).past_key_values
            for step in range(200):
                if model.fa_pool.stats()["faults"]:
                    break
                model(random_ids(1, 1, seed=step), past_key_values=past)
        stats = model.fa_pool.stats()
    assert stats["spot_check_failures"] == 1
    assert stats["ranks"][0]["calls"] < 200


def test_a_model_whose_own_numbers_are_not_finite_loses_no_rank(folder: Path) -> None:
    with pooled(folder, pool_ranks=2) as model, torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = torch.nan
        assert model(random_ids(2, 150)).logits.isnan().all()
        assert model.fa_pool.stats()["faults"] == 0


def test_checking_leaves_the_programs_random_numbers_alone(folder: Path) -> None:
    with pooled(folder, pool_ranks=1, spot_check=1.0) as model, torch.no_grad():
        torch.manual_seed(7)
        before = torch.get_rng_state()
        model(random_ids(2, 150))
        assert torch.equal(torch.get_rng_state(), before)
