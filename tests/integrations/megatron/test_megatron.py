"""Megatron's own GPT model with a pool rank: what transformers' eager attention gives for the same weights."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from torch import Tensor

from fapool_plugin.integrations.megatron.attention import OUTSIDE, Document, FAPoolCoreAttention
from fapool_plugin.integrations.megatron.weights import llama_arguments, llama_config
from fapool_plugin.kernels.forward import attend
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import HEADER_BYTES
from tests import megatron_models as mm
from tests.models import assert_close, eager, pools, random_ids, workers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]

LAYERS, LONG, SHORT = mm.LAYERS, 60, 12
FP32, GAPS = 4, 4 * 63
"""Bytes of a number, and at most between the tensors of a message."""
DROPOUT = "attention dropout 0.5: its random numbers are the model's own; set it to 0 to train pooled"
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="compares what the CPU does")


@pytest.fixture(scope="module")
def model(folder: Path, groups: Any) -> Iterator[Any]:
    before = workers()
    model = mm.build(folder, groups)
    with model.fa_pool:
        yield model
    assert not workers() - before, "close() left pool ranks behind"


def close(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    assert_close(actual, expected, tolerance=mm.TOLERANCE, what=what)


def local_forwards(model: Any) -> tuple[int, int]:
    """(forwards, calls) without ranks, of prompts."""
    prefill = model.fa_pool.stats()["prefill"]
    return prefill["local_forwards"], prefill["local_calls"]


@torch.no_grad()
def test_a_prompt_is_pooled_above_the_threshold_only(model: Any, reference: Any) -> None:
    ids = random_ids(2, LONG)
    with pools(model, prefill=LAYERS, decode=0):
        close(mm.logits_of(model, ids), reference(ids).logits)
    before = local_forwards(model)
    with pools(model, prefill=0, decode=0):
        close(mm.logits_of(model, ids[:, : mm.THRESHOLD]), reference(ids[:, : mm.THRESHOLD]).logits)
    assert local_forwards(model) == (before[0] + 1, before[1] + LAYERS)
    reasons = model.fa_pool.stats()["not_overlapped_reasons"]
    assert reasons.keys() == {"Megatron's own models run a prompt in one piece"}


@torch.no_grad()
def test_padding_on_either_side_is_pooled(model: Any, reference: Any) -> None:
    ids, starts, stops = random_ids(3, LONG), [0, 25, 0], [LONG, LONG, 33]
    real = mm.real(starts, stops)
    expected = reference(ids, attention_mask=real.long(), position_ids=mm.positions(ids)).logits
    with pools(model, prefill=LAYERS, decode=0):
        logits = mm.logits_of(model, ids, mm.causal_mask(starts, LONG, stops))
    close(logits[real], expected[real])
    with pools(model, prefill=LAYERS, decode=0):
        close(mm.logits_of(model, ids, mm.causal_mask([0], LONG)), reference(ids).logits, "one causal mask for all")
    short = ids[:, :SHORT]
    logits = mm.logits_of(model, short, mm.causal_mask([0, 5, 0], SHORT, [SHORT, SHORT, 7]))
    assert logits.isfinite().all(), "padded queries see nothing"
    real = mm.real([0, 5, 0], [SHORT, SHORT, 7])
    expected = reference(short, attention_mask=real.long(), position_ids=mm.positions(short)).logits
    close(logits[real], expected[real], "logits of a short batch")


@torch.no_grad()
def test_any_other_mask_is_computed_locally(model: Any, reference: Any) -> None:
    ids, mask = random_ids(1, LONG), mm.causal_mask([0], LONG)
    mask[..., 30:, 10:20] = True
    reason = "attention_mask hides more than padding and the future"
    before = model.fa_pool.stats()["local_reasons"].get(reason, 0)
    with pools(model, prefill=0, decode=0):
        logits = mm.logits_of(model, ids, mask)
    assert model.fa_pool.stats()["local_reasons"][reason] == before + 1
    additive = torch.zeros(mask.shape).masked_fill(mask, torch.finfo(torch.float32).min)
    close(logits, reference(ids, attention_mask=additive).logits)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_packed_documents_are_those_that_stand_alone(model: Any, reference: Any, padded: bool) -> None:
    lengths, room = [40, 9, 30, 17], [44, 9, 32, 20] if padded else [40, 9, 30, 17]
    texts = [random_ids(1, length, seed) for seed, length in enumerate(lengths)]

    def packed(texts: list[Tensor]) -> list[Tensor]:
        row = [torch.nn.functional.pad(ids, (0, n - ids.shape[1]), value=3) for ids, n in zip(texts, room, strict=True)]
        logits = mm.logits_of(model, torch.cat(row, 1), packed_seq_params=mm.pack(lengths, room if padded else None))
        return [part[:, :n] for part, n in zip(logits.split(room, 1), lengths, strict=True)]

    with pools(model, prefill=LAYERS, decode=0):
        found = packed(texts)
    for index, (logits, ids) in enumerate(zip(found, texts, strict=True)):
        close(logits, reference(ids).logits, f"document {index}'s logits")
    # Another second document: what it says reaches no other.
    others = packed([texts[0], random_ids(1, lengths[1], seed=99), *texts[2:]])
    apart = [(a - b).abs().max().item() for a, b in zip(found, others, strict=True)]
    assert [difference > 0 for difference in apart] == [False, True, False, False], f"differences: {apart}"


@torch.no_grad()
def test_only_long_documents_become_rows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, alone = [], []
    pooled, document = FAPoolCoreAttention._pooled, FAPoolCoreAttention._document

    def pooled_noted(self: Any, q: Tensor, k: Tensor, v: Tensor, decided: Any, columns: int, *, owned: bool) -> Tensor:
        rows.append((tuple(q.shape), decided.geometry.stops))
        return pooled(self, q, k, v, decided, columns, owned=owned)

    def document_noted(self: Any, one: Document, *given: Tensor) -> Tensor:
        alone.append(one)
        return document(self, one, *given)

    monkeypatch.setattr(FAPoolCoreAttention, "_pooled", pooled_noted)
    monkeypatch.setattr(FAPoolCoreAttention, "_document", document_noted)
    mm.logits_of(model, random_ids(1, 75), packed_seq_params=mm.pack([20, mm.THRESHOLD, 30, 9]))
    assert rows == [((2, mm.HEADS, 30, mm.DIM), (20, 30))] * LAYERS
    assert alone == [Document(20, 36), Document(66, 75)] * LAYERS


@torch.no_grad()
def test_short_documents_of_a_long_pack_stay_local(model: Any, reference: Any) -> None:
    texts = [random_ids(1, mm.THRESHOLD, seed) for seed in range(4)]
    before = local_forwards(model)
    with pools(model, prefill=0, decode=0):
        logits = mm.logits_of(model, torch.cat(texts, 1), packed_seq_params=mm.pack([mm.THRESHOLD] * 4))
    assert local_forwards(model) == (before[0] + 1, before[1] + LAYERS)
    for part, ids in zip(logits.split(mm.THRESHOLD, 1), texts, strict=True):
        close(part, reference(ids).logits)


def test_keys_stay_with_the_pool_rank(folder: Path, groups: Any, reference: Any) -> None:
    """A step sends queries, and each key once at most: less than a tenth of what its rank holds."""
    prompt, new = random_ids(2, 300), 8
    model, context = mm.build(folder, groups), StaticInferenceContext(2, 400)
    with torch.no_grad(), model.fa_pool as pool:
        sent, pieces = [0], [prompt]
        for step in range(new + 1):
            with pools(model, prefill=0 if step else LAYERS, decode=LAYERS if step else 0):
                (logits,) = mm.steps(model, context, pieces[-1:])
            close(logits, reference(torch.cat(pieces, 1)).logits[:, -1], f"logits of step {step}")
            pieces.append(logits.argmax(-1, keepdim=True))
            sent.append(pool.stats()["bytes_sent"])
        held = sent[1] - sent[0]
        queries = LAYERS * 2 * mm.HEADS * mm.DIM * FP32
        flushed = LAYERS * 2 * mm.KV_HEADS * 2 * mm.DIM * FP32 * mm.OURS["kv_block"]
        overhead = LAYERS * (HEADER_BYTES + GAPS + 2 * mm.KV_HEADS * 9 * 8)
        for step, took in enumerate(b - a for a, b in pairwise(sent[1:])):
            assert 0 < took <= queries + flushed + overhead, f"step {step}: {took} bytes"
            assert took < held / 10, f"step {step}: {took} bytes, the prompt took {held}"
        assert pool.stats()["leased_ranks"] == [0]
        del context
        gc.collect()
        assert pool.stats()["leased_ranks"] == [], "the context is gone, the lease is not"


@torch.no_grad()
def test_a_context_that_is_used_again_changed_or_taken_back(model: Any, reference: Any) -> None:
    context, ids = StaticInferenceContext(2, 200), random_ids(2, 80)
    pieces = [ids[:, :50], ids[:, 50:62], ids[:, 62:63], ids[:, 63:64]]  # a prompt in two chunks, two steps
    for found, stop in zip(mm.steps(model, context, pieces), (50, 62, 63, 64), strict=True):
        close(found, reference(ids[:, :stop]).logits[:, -1], f"logits after {stop}")

    context.sequence_len_offset = 40
    other = torch.cat([ids[:, :40], random_ids(2, 10, seed=5)], 1)
    (found,) = mm.steps(model, context, [other[:, 40:]])
    close(found, reference(other).logits[:, -1], "logits after taking back")

    context.swap_key_value_dict([1, 0])
    more = torch.cat([other.flip(0), ids[:, :1]], 1)
    (found,) = mm.steps(model, context, [more[:, -1:]])
    close(found, reference(more).logits[:, -1], "logits of exchanged rows")

    context.reset()
    fresh = random_ids(2, 30, seed=6)
    for found, stop in zip(mm.steps(model, context, [fresh[:, :29], fresh[:, 29:]]), (29, 30), strict=True):
        close(found, reference(fresh[:, :stop]).logits[:, -1], f"logits of another prompt after {stop}")


@torch.no_grad()
def test_two_sequences_in_the_rows_of_one_context(model: Any, reference: Any) -> None:
    """As a pipeline's microbatches share one: each call sees its own rows."""
    context, ids = StaticInferenceContext(2, 64), random_ids(2, 42)
    for start, stop in ((0, 40), (40, 41), (41, 42)):
        for row in range(2):
            context.batch_size_offset = row
            logits = mm.logits_of(model, ids[row : row + 1, start:stop], inference_context=context)[:, -1]
            close(logits, reference(ids[row : row + 1, :stop]).logits[:, -1], f"row {row}'s logits after {stop}")
        context.increment_sequence_len_offset(stop - start)


@torch.no_grad()
def test_left_padded_rows_decode(model: Any, reference: Any) -> None:
    """Megatron counts positions from the first column, padding included; the reference is told to."""
    ids, starts, context = random_ids(2, 42), [0, 20], StaticInferenceContext(2, 64)
    masks = [mm.causal_mask(starts, 40), mm.causal_mask(starts, 41, past=40), mm.causal_mask(starts, 42, past=41)]
    pieces = [ids[:, :40], ids[:, 40:41], ids[:, 41:]]
    with pools(model, prefill=LAYERS, decode=2 * LAYERS):
        found = mm.steps(model, context, pieces, masks)
    real = mm.real(starts, [42, 42])
    expected = reference(ids, attention_mask=real.long(), position_ids=mm.positions(ids)).logits
    for logits, column in zip(found, (39, 40, 41), strict=True):
        close(logits, expected[:, column], f"logits at column {column}")


@NO_CUDA
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_through_the_pool(model: Any, folder: Path, packed: bool) -> None:
    reference, ids = eager(folder), random_ids(1 if packed else 2, LONG)
    before = model.fa_pool.stats()
    lengths = [35, 25]
    given = {"packed_seq_params": mm.pack(lengths)} if packed else {}
    with pools(model, prefill=0, decode=0):
        logits = mm.logits_of(model, ids, **given)
    loss = mm.loss_of(logits, ids)
    loss.backward()
    after = model.fa_pool.stats()
    for phase in ("training", "backward"):
        made = after[phase]["pooled_calls"] - before[phase]["pooled_calls"]
        assert made == model.config.num_layers, (phase, after["local_reasons"])
    theirs = (
        torch.cat([reference(part).logits for part in ids.split(lengths, 1)], 1) if packed else reference(ids).logits
    )
    expected = mm.loss_of(theirs, ids)
    expected.backward()
    close(loss, expected, "loss")
    named = {name: parameter.grad for name, parameter in reference.named_parameters()}
    if "lm_head.weight" not in named:
        pytest.fail("the reference ties its head: choose another")
    wanted = mm.llama_state(named, model.config)
    for name, parameter in model.named_parameters():
        close(parameter.grad, wanted[name], f"gradient of {name}")
        parameter.grad = None


@torch.no_grad()
def test_training_mode_is_local_and_drops_out(folder: Path, groups: Any) -> None:
    model, ids = mm.build(folder, groups, megatron={"attention_dropout": 0.5}), random_ids(1, LONG)
    exact = mm.logits_of(model, ids[:, :SHORT])
    model.train()
    with pools(model, prefill=0, decode=0):
        mm.logits_of(model, ids)
    assert model.fa_pool.stats()["local_reasons"] == {DROPOUT: 1}
    torch.manual_seed(1)
    assert not torch.allclose(mm.logits_of(model, ids[:, :SHORT]), exact), "no dropout"


@torch.no_grad()
def test_a_killed_pool_rank_changes_nothing(folder: Path, groups: Any, reference: Any) -> None:
    model, ids, context = mm.build(folder, groups), random_ids(2, 80), StaticInferenceContext(2, 100)
    with model.fa_pool as pool:
        mm.steps(model, context, [ids[:, :70]])
        assert isinstance(pool.leases.pool, LocalPool)
        os.kill(pool.leases.pool.pids()[0], signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match="pool rank 0"):
            found = mm.steps(model, context, [ids[:, 70:71], ids[:, 71:72]])
        for logits, stop in zip(found, (71, 72), strict=True):
            close(logits, reference(ids[:, :stop]).logits[:, -1], f"logits after {stop}")
        assert pool.stats()["faults"] == 1
        context.reset()
        with pools(model, prefill=LAYERS, decode=0):
            (again,) = mm.steps(model, context, [ids[:, :30]])
        close(again, reference(ids[:, :30]).logits[:, -1], "logits of the next prompt")


@torch.no_grad()
def test_an_error_in_a_layer_ends_the_forward(model: Any, reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, last = random_ids(1, LONG), model.decoder.layers[-1].mlp

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(last, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            mm.logits_of(model, ids)
    assert not model.fa_pool.in_pooled_forward
    with pools(model, prefill=LAYERS, decode=0):
        close(mm.logits_of(model, ids), reference(ids).logits)


def test_a_layer_outside_its_models_forward_is_local(model: Any) -> None:
    core = next(m for m in model.modules() if isinstance(m, FAPoolCoreAttention))
    q, k = torch.randn(40, 2, mm.HEADS, mm.DIM), torch.randn(40, 2, mm.KV_HEADS, mm.DIM)
    before = model.fa_pool.stats()["local_reasons"].get(OUTSIDE, 0)
    with torch.no_grad():
        out = core(q, k, k, None)
    assert model.fa_pool.stats()["local_reasons"][OUTSIDE] == before + 1
    dense, _ = attend(*(x.transpose(0, 1) for x in (q, k, k)), softmax_scale=mm.DIM**-0.5, causal=True, kernel="dense")
    dense = dense.transpose(0, 1).flatten(-2)
    close(out, dense, "out")
    # With gradients, and keys before the first query: aligned to the end.
    close(core(q[25:].requires_grad_(), k, k, None), dense[25:], "out of the last queries")
    assert model.fa_pool.stats()["local_reasons"][OUTSIDE] == before + 1, "recomputed in a backward pass: no forward"


@torch.no_grad()
def test_closed_and_disabled_models_are_local(folder: Path, groups: Any, reference: Any) -> None:
    ids, before = random_ids(1, LONG), workers()
    disabled, closed = mm.build(folder, groups, enabled=False), mm.build(folder, groups)
    closed.fa_pool.close()
    for model in (disabled, closed):
        with pools(model, prefill=0, decode=0):
            close(mm.logits_of(model, ids), reference(ids).logits)
    assert workers() == before


def test_weights_have_the_names_of_megatrons_own(model: Any, groups: Any, reference: Any) -> None:
    """Checkpoints fit either way."""
    settings = reference.config.to_dict()
    config = llama_config(settings)
    own = GPTModel(
        config, get_gpt_layer_local_spec(normalization="RMSNorm"), pg_collection=groups, **llama_arguments(settings)
    )

    def shapes(state: dict[str, Any]) -> dict[str, Any]:
        return {name: getattr(value, "shape", getattr(value, "local_shape", None)) for name, value in state.items()}

    assert shapes(model.state_dict()) == shapes(own.state_dict())
    ours, theirs = (shapes(one.sharded_state_dict(metadata={"dp_cp_group": groups.tp})) for one in (model, own))
    assert ours == theirs, "distributed checkpoints"
