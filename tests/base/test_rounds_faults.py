"""Blocks in flight when something goes wrong: errors inside a round, ranks that die with calls outstanding.

Whatever happens, results are the model's own, ranks that communicate agree on the order, and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.plan.line import Tile
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import Message
from tests.blocks import in_blocks, overlaps, save_long
from tests.models import (
    FAMILIES,
    assert_close,
    assert_same_tokens,
    eager,
    greedily,
    load_pooled,
    logits_equal,
    pooled,
    random_ids,
)

pytestmark = pytest.mark.usefixtures("one_thread_each")

ROOT = Path(__file__).resolve().parents[2]
BLOCKS, LAYERS, PROMPT, NEW = 8, 2, 530, 4


# Errors in the middle of a round


@contextmanager
def failing(module: Any, at_call: int, error: type[BaseException]) -> Iterator[list[int]]:
    """``module`` raises when it is called the ``at_call``-th time; yields the calls made."""
    calls: list[int] = []
    original = type(module).forward

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is module:
            calls.append(len(calls) + 1)
            if len(calls) == at_call:
                raise error("in the middle")
        return original(self, *args, **kwargs)

    # In the class: a hook, or a forward of its own, would be a reason for another trial.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", fail)
        yield calls


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2_mixed"])
def test_an_error_in_the_middle_of_a_round_does_no_harm(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    """A cache that the caller gave is as it was, in layers that slide, too, and goes on."""
    folder, full = save_long(name, tmp_path), FAMILIES[name].full_layers
    reference, ids, more = eager(folder), random_ids(2, PROMPT), random_ids(2, 200, seed=1)
    with in_blocks(folder, BLOCKS) as model, torch.no_grad():
        model(ids, attention_mask=torch.ones_like(ids))  # with its trial
        cache = model(ids, use_cache=True).past_key_values
        lengths = [layer.get_seq_length() for layer in cache.layers]
        before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
        with failing(model.model.layers[1], 3, error) as calls, pytest.raises(error, match="in the middle"):
            model(more, past_key_values=cache)
        assert len(calls) == 3, f"{len(calls)} blocks came to layer 1, the third one fails there"
        assert [layer.get_seq_length() for layer in cache.layers] == lengths == [PROMPT] * LAYERS
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)
            assert torch.equal(layer.values, values)
        with overlaps(model, 3, full):
            logits = model(more, past_key_values=cache).logits
        assert_close(logits, reference(torch.cat([ids, more], 1)).logits[:, PROMPT:])

        for given in ({}, {"use_cache": False}):
            with failing(model.model.layers[1], 3, error), pytest.raises(error, match="in the middle"):
                model(ids, **given)
        with failing(model.model.layers[1], 3, error), pytest.raises(error, match="in the middle"):
            model.generate(ids, **greedily(NEW))
        with overlaps(model, BLOCKS, full, decode=NEW - 1):
            tokens = model.generate(ids, **greedily(NEW))
        assert_same_tokens(tokens, reference.generate(ids, **greedily(NEW)))
        assert not model.fa_pool.in_pooled_forward


def test_an_error_while_answers_are_awaited_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answers are taken, the others come late, and are dropped."""
    folder, ids, answered = save_long("llama", tmp_path), random_ids(2, PROMPT), []
    original = PoolRank.answer

    def fail(self: PoolRank, call: int) -> Message:
        answered.append(call)
        if len(answered) == 3:
            raise MemoryError("while waiting")
        return original(self, call)

    with in_blocks(folder, BLOCKS) as model, torch.no_grad():
        monkeypatch.setattr(PoolRank, "answer", fail)
        with pytest.raises(MemoryError, match="while waiting"):
            model(ids)
        monkeypatch.undo()
        with overlaps(model, BLOCKS):
            logits_equal(model, eager(folder), ids)


# Ranks that die


class Striker:
    """Counts what is asked and answered, and strikes pool ranks just before a chosen question to rank 0."""

    def __init__(self, model: Any, strikes: dict[int, Callable[[Striker], None]]) -> None:
        self.model, self.strikes = model, strikes
        self.asked, self.answered, self.outstanding = 0, 0, 0
        self.counts: dict[str, int] = {}
        self.work: dict[tuple[int, int], list[int]] = {}
        """By (rank, layer): the queries times heads of each question of a prompt."""

    def kill(self, *ranks: int) -> None:
        self.outstanding, began = self.asked - self.answered, time.monotonic()
        for rank in ranks:
            process = psutil.Process(self.pids[rank])
            process.kill()  # the system may collect it before the next line
            psutil.wait_procs([process], 5)
            link = self.model.fa_pool.ranks[rank].link
            assert link.loop.wait(lambda link=link: link.lost, lambda: began + 10)

    def stop(self) -> None:
        os.kill(self.pids[0], signal.SIGSTOP)

    @property
    def pids(self) -> dict[int, int]:
        pool = self.model.fa_pool.leases.pool
        assert isinstance(pool, LocalPool)
        return pool.pids()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        ask, answer = PoolRank.ask, PoolRank.answer

        def asked(rank: PoolRank, header: Any, tensors: Any, expected: Any) -> int:
            if rank.number == 0:
                self.asked += 1
                self.strikes.get(self.asked, lambda _: None)(self)
            call = ask(rank, header, tensors, expected)
            queries = sum(Tile(*at[:8]).lanes * (at[5] - at[4]) for at in tensors[0].tolist())
            self.work.setdefault((rank.number, header.layer), []).append(queries)
            return call

        def answered(rank: PoolRank, call: int) -> Message:
            message = answer(rank, call)
            self.answered += rank.number == 0
            return message

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(PoolRank, "ask", asked)
            patched.setattr(PoolRank, "answer", answered)
            yield


@contextmanager
def struck(folder: Path, ranks: int, strikes: dict[int, Callable[[Striker], None]], faults: int) -> Iterator[Striker]:
    """A prompt of eight blocks during which ranks are struck: logits are right, and so is the next answer."""
    reference, ids = eager(folder), random_ids(2, PROMPT)
    model = load_pooled(folder, blocks=BLOCKS, pool_ranks=ranks, timeout_s=5.0)
    with model.fa_pool, torch.no_grad():
        model(ids)  # ranks are started, and their lease goes back
        before = model.fa_pool.stats()
        striker = Striker(model, strikes)
        with striker.at_work(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = model(ids).logits
        assert_close(logits, reference(ids).logits)
        stats = model.fa_pool.stats()
        assert stats["faults"] - before["faults"] == faults, stats["events"]
        assert len([w for w in caught if "lost" in str(w.message)]) == faults
        striker.counts = {
            key: stats["prefill"][key] - before["prefill"][key] for key in ("pooled_calls", "local_calls")
        }
        yield striker
        # The next sequence has all its ranks.
        with overlaps(model, BLOCKS, decode=NEW - 1):
            tokens = model.generate(ids, **greedily(NEW))
        assert_same_tokens(tokens, reference.generate(ids, **greedily(NEW)))
        assert not model.fa_pool.in_pooled_forward


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_rank_killed_with_four_calls_outstanding(folder: Path) -> None:
    """It is stopped first, so that it answers none of them; the base computes them all."""
    strikes: dict[int, Callable[[Striker], None]] = {1: Striker.stop, 5: lambda striker: striker.kill(0)}
    with struck(folder, 1, strikes, faults=1) as striker:
        assert striker.outstanding >= 4, f"only {striker.outstanding} calls were outstanding"
        assert striker.answered == 0
        assert striker.counts == {"pooled_calls": 0, "local_calls": LAYERS * BLOCKS}


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_both_ranks_killed_in_the_second_round(folder: Path) -> None:
    with struck(folder, 2, {BLOCKS + 4: lambda striker: striker.kill(0, 1)}, faults=2) as striker:
        counts = striker.counts
        assert counts["pooled_calls"] + counts["local_calls"] == LAYERS * BLOCKS
        assert counts["pooled_calls"] >= 4, "four blocks had been answered when they came to layer 1"
        assert counts["local_calls"] >= BLOCKS - 3, "of layer 1 three blocks were asked for, and may have been answered"


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_one_of_two_ranks_killed_and_the_other_takes_its_part(folder: Path) -> None:
    with struck(folder, 2, {4: lambda striker: striker.kill(0)}, faults=1) as striker:
        assert striker.counts == {"pooled_calls": LAYERS * BLOCKS, "local_calls": 0}
        assert (0, 1) not in striker.work, "a lost rank was asked"
        heads_by_queries = 2 * 3 * PROMPT
        first, second = sum(striker.work[1, 0][:3]), sum(striker.work[1, 1])
        assert len(striker.work[1, 1]) == BLOCKS
        assert second > 0.4 * heads_by_queries, f"{second} of {heads_by_queries} in layer 1, shared with the base alone"
        assert first < 0.4 * heads_by_queries * 3 / BLOCKS


# Base ranks that communicate


BASE_RANK = """
import json, os, signal, sys, warnings
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from tests.models import load_pooled, random_ids
from fapool_plugin.base.lease import PoolRank
from transformers.models.llama.modeling_llama import LlamaMLP

me, folder, victim = int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
patience = timedelta(seconds=30)
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=me, world_size=2, timeout=patience)
model = load_pooled(folder, blocks=4, pool_ranks=1)
order, asked = [], [0]

def together(layer):
    def meet(hidden):
        if not counting:
            return
        block = sum(at == layer for at, _ in order)
        mine = torch.tensor([layer, block, hidden.shape[1], hidden.double().abs().sum().item()], dtype=torch.float64)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(both[0][:3], both[1][:3]), f"ranks are at {both[0].tolist()} and {both[1].tolist()}"
        torch.testing.assert_close(both[0], both[1], rtol=1e-5, atol=0.0)
        order.append((layer, block))
    return meet

meets = {block.mlp: together(layer) for layer, block in enumerate(model.model.layers)}
forward, counting = LlamaMLP.forward, False

def meeting(self, x):
    hidden = forward(self, x)
    meets[self](hidden)
    return hidden

# In the class: hooks are a reason to leave a model whole.
LlamaMLP.forward = meeting
original = PoolRank.ask

def ask(rank, header, tensors, expected):
    asked[0] += 1
    if me == victim and asked[0] == 4 + 2:
        os.kill(model.fa_pool.leases.pool.pids()[0], signal.SIGKILL)
        rank.link.loop.wait(lambda: rank.link.lost)
    return original(rank, header, tensors, expected)

warnings.simplefilter("ignore")
with model.fa_pool, torch.no_grad():
    model(random_ids(2, 300))  # with its trial
    before = model.fa_pool.stats()["prefill"]
    PoolRank.ask, counting = ask, True
    logits = model(random_ids(2, 300)).logits
    counting = False
    dist.barrier()
    stats = model.fa_pool.stats()
torch.save(logits, folder / f"logits{me}.pt")
calls = [stats["prefill"][name] - before[name] for name in ("pooled_calls", "local_calls")]
print(json.dumps([order, stats["faults"], *calls]))
dist.destroy_process_group()
"""


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_base_ranks_agree_on_the_order_when_one_loses_its_pool_rank(tmp_path: Path) -> None:
    """A collective in every layer of every block would wait for ever if one of them went another way."""
    folder = save_long("llama", tmp_path)
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", BASE_RANK, str(rank), str(folder), "1"],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        told = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors for _, errors in told)
    (order, *healthy), (other, *struck) = (json.loads(lines.splitlines()[-1]) for lines, _ in told)
    # Block c's part after the attention of layer 0 comes in the round after, when block c has handed over once.
    assert order == other == [[layer, block] for layer in range(LAYERS) for block in range(4)]
    assert healthy == [0, LAYERS * 4, 0]
    faults, pooled, local = struck
    assert (faults, pooled + local) == (1, LAYERS * 4)
    assert local >= 3, "the rank was lost in the second layer"
    with torch.no_grad():
        expected = eager(folder)(random_ids(2, 300)).logits
    for name in ("logits0.pt", "logits1.pt"):
        assert_close(torch.load(folder / name), expected, what=name)


# Memory


@pytest.mark.processes
def test_a_prompt_in_blocks_takes_no_more_memory_than_in_one_piece(tmp_path: Path) -> None:
    """Every allocation of the base is counted. Blocks need less: no more than one of them is at its FFN at a time."""
    tokens, layers, hidden = 2048, 6, 192
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": 32, "num_hidden_layers": layers}
    folder = save_long("llama", tmp_path, max_position_embeddings=tokens, **sizes)
    peaks = []
    for blocks in (1, BLOCKS):
        with pooled(folder, blocks=blocks, pool_ranks=1) as model, torch.inference_mode():
            model(random_ids(1, PROMPT))
            watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            with watch as watched, overlaps(model, blocks, layers):
                model(random_ids(1, tokens), logits_to_keep=1)
        events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks.append(max(accumulate(changes)))
    whole, cut = (peak / 2**20 for peak in peaks)
    assert whole > tokens * hidden * 4 / 2**20, f"only {whole:.1f} MiB were seen"
    assert cut <= whole, f"{cut:.2f} MiB in blocks, {whole:.2f} MiB in one piece"
