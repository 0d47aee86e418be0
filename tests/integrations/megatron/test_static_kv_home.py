"""Megatron's static inference with keys on the pool: no storage here, and what transformers' eager attention gives."""

from __future__ import annotations

import copy
import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from torch import Tensor

from fapool_plugin.base.admission import PoolMemoryError
from fapool_plugin.config import FAPoolConfigError
from fapool_plugin.integrations.megatron import get_fapool_layer_spec
from fapool_plugin.integrations.megatron.weights import llama_config
from tests import megatron_models as mm
from tests.kv_home import ON_THE_POOL
from tests.models import assert_close, eager, pools, random_ids, workers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]

LAYERS, LONG, NEW = mm.LAYERS, 60, 5
POSITION = LAYERS * 2 * mm.KV_HEADS * mm.DIM * 4
"""Bytes of a token's keys and values, fp32."""


@contextmanager
def model_of(folder: Path, groups: Any, **settings: Any) -> Iterator[Any]:
    """A model whose keys live on two pool ranks, unless other settings are given."""
    model = mm.build(folder, groups, **({"pool_ranks": 2} | ON_THE_POOL | settings))
    with model.fa_pool, torch.no_grad():
        yield model


@pytest.fixture(scope="module")
def model(folder: Path, groups: Any) -> Iterator[Any]:
    """For tests that end no rank of it."""
    with model_of(folder, groups) as model:
        yield model


@pytest.fixture
def struck(folder: Path, groups: Any) -> Iterator[Any]:
    """A model whose ranks the test ends."""
    with model_of(folder, groups) as model:
        yield model


FULL = pytest.mark.full


def close(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    assert_close(actual, expected, tolerance=mm.TOLERANCE, what=what)


class Steps:
    """A sequence in pieces, by Megatron's model and its context, each beside the reference."""

    def __init__(self, model: Any, reference: Any, context: Any) -> None:
        self.model, self.reference, self.context = model, reference, context
        self.ids = torch.zeros(0, 0, dtype=torch.long)

    def __call__(self, new: Tensor, what: str = "logits") -> None:
        past = self.context.sequence_len_offset
        self.ids = torch.cat([self.ids[:, :past], new], 1) if past else new
        (logits,) = mm.steps(self.model, self.context, [new])
        with torch.no_grad():
            close(logits, self.reference(self.ids).logits[:, -1], f"{what} after {self.ids.shape[1]}")

    def greedily(self, count: int) -> None:
        """So many steps, of the tokens that the reference would choose."""
        for _ in range(count):
            with torch.no_grad():
                token = self.reference(self.ids).logits[:, -1].argmax(-1, keepdim=True)
            self(token, "a step's logits")


def kill(model: Any, count: int = 1) -> None:
    """Ends pool ranks of this model."""
    for pid in list(model.fa_pool.leases.pool.pids().values())[:count]:
        os.kill(pid, signal.SIGKILL)


def held(model: Any) -> tuple[int, int]:
    """Bytes of keys that the base and all ranks own."""
    found = model.fa_pool.stats()["kv_bytes"]
    return found["base"], sum(found["ranks"].values())


def tensor_bytes() -> int:
    """Of all tensors that are alive in this process, but those without numbers that other tests may have left."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter)]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize(
    ("ranks", "base_share"), [pytest.param(1, 0.0, marks=FULL), (2, None), pytest.param(3, 0.0, marks=FULL)]
)
def test_every_key_has_an_owner_and_no_other_place(
    folder: Path, groups: Any, reference: Any, ranks: int, base_share: float | None
) -> None:
    with model_of(folder, groups, pool_ranks=ranks, base_share=base_share) as model:
        steps = Steps(model, reference, StaticInferenceContext(2, 100))
        with pools(model, prefill=LAYERS, decode=NEW * LAYERS):
            steps(random_ids(2, LONG))
            steps.greedily(NEW)
        base, pool = held(model)
        assert base + pool == 2 * (LONG + NEW) * POSITION
        assert bool(base) == (base_share is None)
        assert steps.context.key_value_memory_dict == {}
        del steps.context
        assert held(model) == (0, 0)
        assert model.fa_pool.stats()["leased_ranks"] == []


@pytest.mark.parametrize("home", ["pool", pytest.param("base", marks=FULL)])
def test_the_storage_is_gone(folder: Path, groups: Any, home: str) -> None:
    """All tensors of this process: with keys at home they are more by the context's whole storage."""
    rows, room = 4, 1000
    with model_of(folder, groups, kv_home=home, base_share=0.0) as model:
        mm.steps(model, StaticInferenceContext(1, 50), [random_ids(1, 40)])
        before, context = tensor_bytes(), StaticInferenceContext(rows, room)
        mm.steps(model, context, [random_ids(rows, 300), random_ids(rows, 1)])
        more = tensor_bytes() - before
    storage = rows * room * POSITION
    assert more < storage / 20 if home == "pool" else more >= storage, f"{more} bytes more, the storage has {storage}"


def test_a_short_sequence_grows(model: Any, reference: Any) -> None:
    """As Megatron's static engine begins with the shortest prompt of a batch, and goes on token by token."""
    steps = Steps(model, reference, StaticInferenceContext(3, 64))
    steps(random_ids(3, mm.THRESHOLD - 3))
    assert held(model) == (0, 0)
    for step in range(6):
        steps(random_ids(3, 1, seed=step))
        assert bool(sum(held(model))) == (step >= 3), f"step {step}"
    assert sum(held(model)) == 3 * (mm.THRESHOLD + 3) * POSITION
    steps(random_ids(3, 20, seed=9), "a chunk's logits")


def test_a_context_that_is_taken_back_and_used_again(model: Any, reference: Any) -> None:
    steps = Steps(model, reference, StaticInferenceContext(2, 200))
    for new in (50, 12, 1, 1):
        steps(random_ids(2, new, seed=new))
    for back in (40, mm.THRESHOLD - 6, 30):
        steps.context.sequence_len_offset = min(back, steps.ids.shape[1])
        steps(random_ids(2, 10, seed=back), f"logits of another end from {back} on")
        steps(random_ids(2, 12, seed=back))
    steps.context.reset()
    steps(random_ids(2, 29, seed=6), "another prompt's logits")
    steps.greedily(1)
    assert sum(held(model)) == 2 * 30 * POSITION


def test_batches_in_the_rows_of_one_context(model: Any, reference: Any) -> None:
    context, ids = StaticInferenceContext(3, 64), random_ids(3, 42)
    for start, stop in ((0, 40), (40, 41), (41, 42)):
        for first, count in ((0, 1), (1, 2)):
            context.batch_size_offset = first
            rows = ids[first : first + count]
            logits = mm.logits_of(model, rows[:, start:stop], inference_context=context)[:, -1]
            close(logits, reference(rows[:, :stop]).logits[:, -1], f"rows from {first} on, after {stop}")
        context.increment_sequence_len_offset(stop - start)
    assert sum(held(model)) == 3 * 42 * POSITION
    context.reset()
    logits = mm.logits_of(model, ids[:2, :30], inference_context=context)[:, -1]
    close(logits, reference(ids[:2, :30]).logits[:, -1], "another batch in rows of both")
    assert sum(held(model)) == 2 * 30 * POSITION


def test_padded_rows(model: Any, reference: Any) -> None:
    """Before a row's tokens, and behind them, where steps go on: that mask has holes, and its forwards are local."""
    columns = LONG + 3
    ids = random_ids(2, columns)
    for starts, hole in (([0, 20], []), ([0, 0], range(33, LONG))):
        real, context = mm.real(starts, [columns] * 2), StaticInferenceContext(2, 100)
        real[1, list(hole)] = False
        expected = reference(ids, attention_mask=real.long(), position_ids=mm.positions(ids)).logits
        for start, stop in ((0, LONG), (LONG, LONG + 1), (LONG + 1, columns)):
            mask = mm.causal_mask([0], stop, past=start) | ~real[:, None, None, :stop]
            logits = mm.logits_of(model, ids[:, start:stop], mask, inference_context=context)[:, -1]
            seen = real[:, stop - 1]
            close(logits[seen], expected[seen, stop - 1], f"starts {starts}, hole {hole}, after {stop}")
            context.increment_sequence_len_offset(stop - start)
        assert bool(sum(held(model))) == (not hole)
        if not hole:
            with pytest.raises(ValueError, match="row 1 of this context began with 20 columns of padding"):
                mm.logits_of(model, ids[:, :1], inference_context=context)
        del context


def test_padding_behind_a_row_may_be_seen_later(model: Any, reference: Any) -> None:
    """No token of its row sees it, so it is computed as if it were not hidden, and steps may show it."""
    context, ids = StaticInferenceContext(2, 100), random_ids(2, LONG + 1)
    mask = mm.causal_mask([0, 0], LONG, [LONG, 33])
    mm.logits_of(model, ids[:, :LONG], mask, inference_context=context)
    context.increment_sequence_len_offset(LONG)
    logits = mm.logits_of(model, ids[:, LONG:], inference_context=context)
    close(logits[:, -1], reference(ids).logits[:, -1])
    assert not model.fa_pool.stats()["replays"], "keys of padding were missing"


@pytest.mark.parametrize(
    ("at", "lost"),
    [("step", 1), *(pytest.param(*each, marks=FULL) for each in product(("prompt", "step", "between"), (1, 2)))],
)
def test_lost_keys_are_computed_once_more(struck: Any, reference: Any, at: str, lost: int) -> None:
    calls = 0

    def lose(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == {"prompt": 2, "step": 5, "between": 0}[at]:
            kill(struck, lost)

    Steps(struck, reference, StaticInferenceContext(1, 64))(random_ids(1, 40))  # has the ranks started
    hook = struck.decoder.layers[0].mlp.register_forward_hook(lose)
    calls = 1
    steps = Steps(struck, reference, StaticInferenceContext(2, 100))
    steps(random_ids(2, 50))
    for step in range(4):
        steps(random_ids(2, 1, seed=step))
        if at == "between" and step == 1:
            kill(struck, lost)
    hook.remove()
    steps(random_ids(2, 7, seed=7), "a chunk's logits")
    stats = struck.fa_pool.stats()
    assert stats["faults"] == lost
    assert stats["replays"] == (at != "prompt")
    assert steps.context.key_value_memory_dict == {}
    # A hook is the user's: it sees what the user's forwards do, begun again or not, and no replay.
    assert calls == 6 + (at != "between"), calls


@FULL
def test_a_peer_takes_a_lost_owners_place(folder: Path, groups: Any, reference: Any) -> None:
    with model_of(folder, groups, pool_ranks=3, kv_redundancy="peer", base_share=0.0) as model:
        steps = Steps(model, reference, StaticInferenceContext(2, 100))
        steps(random_ids(2, LONG))
        assert held(model) == (0, 2 * 2 * LONG * POSITION)
        kill(model)
        steps.greedily(3)
        assert (model.fa_pool.stats()["faults"], model.fa_pool.stats()["replays"]) == (1, 0)


def test_what_was_given_is_replayed(struck: Any, reference: Any) -> None:
    """Embeddings where no ids were given, padding, pieces, and what came while the sequence was short."""
    ids, starts, context = random_ids(2, 40), [0, 5], StaticInferenceContext(2, 100)
    real = mm.real(starts, [40, 40])
    expected = reference(ids, attention_mask=real.long(), position_ids=mm.positions(ids)).logits
    embedded = struck.embedding(ids, mm.positions(ids))
    for start, stop in ((0, 12), (12, 30), (30, 31), (31, 32), (32, 40)):
        given: dict[str, Any] = {"decoder_input": embedded[start:stop].clone()} if start in (12, 30) else {}
        mask = mm.causal_mask(starts, stop, past=start)
        logits = mm.logits_of(struck, ids[:, start:stop], mask, inference_context=context, **given)[:, -1]
        close(logits, expected[:, stop - 1], f"logits after {stop}")
        for tensor in given.values():
            tensor.zero_()  # what was given is the caller's to change
        context.increment_sequence_len_offset(stop - start)
        if stop == 31:
            kill(struck)
    assert struck.fa_pool.stats()["replays"] == 1


@FULL
def test_changed_weights_bring_no_keys_back(struck: Any, reference: Any) -> None:
    context = StaticInferenceContext(1, 100)
    mm.steps(struck, context, [random_ids(1, LONG)])
    struck.output_layer.weight.mul_(2.0)
    kill(struck)
    with pytest.raises(RuntimeError, match="weights or adapters have changed"):
        mm.steps(struck, context, [random_ids(1, 1)])


def test_an_error_leaves_a_context_as_it_was(model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, last = Steps(model, reference, StaticInferenceContext(2, 100)), model.decoder.layers[-1].mlp

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    for new in (mm.THRESHOLD - 2, 10, 30, 1):
        with monkeypatch.context() as patch:
            patch.setattr(last, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                mm.steps(model, steps.context, [random_ids(2, new, seed=99)])
        steps(random_ids(2, new, seed=new))


def test_by_megatrons_own_wrapper_in_inference_mode(struck: Any, reference: Any, groups: Any) -> None:
    """It slices masks and positions of the whole length, and counts the context on."""
    settings = {"hidden_size": 64, "params_dtype": torch.float32, "fp32_residual_connection": False}
    settings |= {"inference_batch_times_seqlen_threshold": -1, "padded_vocab_size": 100}
    context, ids = StaticInferenceContext(2, 64), random_ids(2, 45)
    wrapper = GPTInferenceWrapper(struck, InferenceWrapperConfig(**settings), context, groups)
    wrapper.prep_model_for_inference()
    with torch.inference_mode():
        given = wrapper.prep_inference_input(ids)
        for start, stop in ((0, 12), (12, 40), (40, 41), (41, 45)):
            logits = wrapper.run_one_forward_step(wrapper.get_batch_for_context_window(given, start, stop))
            close(logits[:, -1], reference(ids[:, :stop]).logits[:, -1], f"logits after {stop}")
            if stop == 41:
                kill(struck)
    assert struck.fa_pool.stats()["replays"] == 1
    assert sum(held(struck)) == 2 * 45 * POSITION


@FULL
def test_what_does_not_fit_is_refused_before_anything_is_sent(folder: Path, groups: Any, reference: Any) -> None:
    """Of the context's whole length."""
    with model_of(folder, groups, memory_limit_mib=1, base_share=0.0) as model:
        with pytest.raises(PoolMemoryError, match=r"15 sequences of up to 500 tokens need 4 MiB.*Raise pool_ranks"):
            mm.steps(model, StaticInferenceContext(15, 500), [random_ids(15, 40)])
        assert [rank["calls"] for rank in model.fa_pool.stats()["ranks"]] == [0, 0]
        Steps(model, reference, StaticInferenceContext(7, 500))(random_ids(7, 40))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda context: setattr(context, "batch_size_offset", 1), r"rows 1 to 2 of this context go on at column 40"),
        (lambda context: setattr(context, "sequence_len_offset", 41), "at column 41, and this model knows 40"),
        (lambda context: setattr(context, "max_sequence_length", 40), "make a larger StaticInferenceContext"),
    ],
)
def test_keys_that_are_nowhere_are_refused(model: Any, change: Callable[[Any], Any], told: str) -> None:
    context = StaticInferenceContext(4, 64)
    mm.steps(model, context, [random_ids(2, 40)])
    change(context)
    with pytest.raises(ValueError, match=told):
        mm.logits_of(model, random_ids(2, 1), inference_context=context)


def test_rows_are_not_exchanged_and_a_copy_of_a_context_has_no_keys(model: Any) -> None:
    context = StaticInferenceContext(2, 64)
    mm.steps(model, context, [random_ids(2, 40)])
    with pytest.raises(ValueError, match=r'swap_key_value_dict.*set kv_home to "base"'):
        context.swap_key_value_dict([1, 0])
    with pytest.raises(ValueError, match="a copy of a context has none"):
        mm.steps(model, copy.deepcopy(context), [random_ids(2, 1)])
    mm.steps(model, context, [random_ids(2, 1)])


@pytest.mark.parametrize(("name", "value"), [("num_moe_experts", 4), ("sequence_parallel", True)])
def test_models_whose_replay_was_not_tried_are_refused(folder: Path, name: str, value: Any) -> None:
    config = llama_config(eager(folder).config.to_dict())
    setattr(config, name, value)
    with pytest.raises(FAPoolConfigError, match=f'kv_home = "pool" with {name} = {value}.*set kv_home to "base"'):
        get_fapool_layer_spec(config, mm.OURS | ON_THE_POOL)


@FULL
def test_without_a_pool_keys_are_here(folder: Path, groups: Any, reference: Any) -> None:
    before = workers()
    with model_of(folder, groups, enabled=False) as model:
        steps = Steps(model, reference, StaticInferenceContext(2, 100))
        steps(random_ids(2, LONG))
        steps.greedily(2)
        assert steps.context.key_value_memory_dict == {}
    assert workers() == before
