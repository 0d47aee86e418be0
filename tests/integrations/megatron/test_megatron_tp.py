"""Megatron's own GPT model on two tensor-parallel ranks, each with a pool rank: what one process without Megatron
and without a pool gives."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core")

from fapool_plugin.base.agreement import agree_over
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.integrations.megatron.weights import llama_config
from fapool_plugin.ranks.local import LocalPool
from tests import megatron_models as mm
from tests.megatron_ranks import LONG, NEW, SIZE
from tests.models import assert_close, assert_same_tokens, eager, random_ids

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[3]
LAYERS = mm.LAYERS


@pytest.fixture(scope="module")
def answers(folder: Path) -> list[dict[str, Any]]:
    """What the two ranks computed."""
    ranks = []
    try:
        for rank in range(SIZE):
            command = [sys.executable, "-m", "tests.megatron_ranks", str(folder), str(rank)]
            with (folder / f"rank{rank}.txt").open("w") as output:
                ranks.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
        codes = [process.wait(timeout=200) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    told = "\n".join((folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(SIZE))
    assert codes == [0, 0], told
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(SIZE)]


def close(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    assert_close(actual, expected, tolerance=mm.TOLERANCE, what=what)


@torch.no_grad()
def test_prompts_and_packs(answers: list[dict[str, Any]], reference: Any) -> None:
    ids, texts = random_ids(2, LONG), [random_ids(1, length, seed=length) for length in (40, 9, 30)]
    for rank, found in enumerate(answers):
        close(found["short"], reference(ids[:, :12]).logits, f"rank {rank}'s short logits")
        close(found["long"], reference(ids).logits, f"rank {rank}'s long logits")
        for part, text in zip(found["packed"].split([40, 9, 30], 1), texts, strict=True):
            close(part, reference(text).logits, f"rank {rank}'s packed logits")
        prefill = found["before_steps"]["prefill"]
        assert (prefill["pooled_calls"], prefill["local_calls"]) == (2 * LAYERS, LAYERS), prefill


@torch.no_grad()
def test_generation(answers: list[dict[str, Any]], reference: Any) -> None:
    ids = random_ids(2, LONG)
    tokens = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    wanted = reference(tokens).logits
    for rank, found in enumerate(answers):
        assert_same_tokens(found["tokens"], tokens)
        close(found["logits"], wanted[:, LONG - 1 : -1], f"rank {rank}'s logits")
        pooled = {
            phase: found["after_steps"][phase]["pooled_calls"] - found["before_steps"][phase]["pooled_calls"]
            for phase in ("prefill", "decode")
        }
        assert pooled == {"prefill": LAYERS, "decode": LAYERS * (NEW - 1)}, f"rank {rank}: {found['after_steps']}"


def test_loss_and_gradients(answers: list[dict[str, Any]], folder: Path) -> None:
    reference, ids = eager(folder), random_ids(2, LONG)
    expected = mm.loss_of(reference(ids).logits, ids)
    expected.backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters()}
    config = llama_config(reference.config.to_dict(), tp_size=SIZE)
    for rank, found in enumerate(answers):
        close(found["loss"], expected, f"rank {rank}'s loss")
        wanted = mm.llama_state(theirs, config, tp_rank=rank, tp_size=SIZE)
        assert wanted.keys() == found["gradients"].keys()
        for name, gradient in found["gradients"].items():
            close(gradient, wanted[name], f"rank {rank}'s gradient of {name}")
        assert found["end"]["backward"]["pooled_calls"] == config.num_layers, found["end"]


@torch.no_grad()
def test_one_of_two_pool_ranks_is_killed(answers: list[dict[str, Any]], reference: Any) -> None:
    wanted = reference(answers[0]["tokens"]).logits[:, -1]
    for rank, found in enumerate(answers):
        close(found["last"], wanted, f"rank {rank}'s logits")
        assert found["end"]["faults"] == rank, f"rank {rank}: {found['end']}"


def test_ranks_decide_as_the_first_does(answers: list[dict[str, Any]]) -> None:
    assert [found["agreed"] for found in answers] == [(1, 5), (1, 5)]


def test_an_agreement_is_copied_with_its_manager(folder: Path) -> None:
    manager = ResourceManager(FAPoolConfig(), LocalPool, agree_over())
    with mm.alone() as groups:
        for made in (copy.deepcopy(manager), pickle.loads(pickle.dumps(manager))):
            assert made._agree((2, 7)) == (2, 7)
        ours = agree_over(groups.tp)
        assert copy.deepcopy(ours)((2, 3)) == (2, 3)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(ours)
