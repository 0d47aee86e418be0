"""Training with pool ranks: loss and gradients of the same weights in eager attention, without the plugin."""

from __future__ import annotations

import copy
import gc
import os
import signal
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import (
    FAMILIES,
    THRESHOLD,
    assert_close,
    eager,
    padded_batch,
    plain,
    pooled,
    random_ids,
    save_model,
    workers,
)
from tests.training import (
    TRAINED,
    WITHOUT_DROPOUT,
    assert_alike,
    assert_taken_as_asked,
    gradients,
    noted,
    same_gradients,
    trained,
)

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]
LONG = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_every_kind_of_model(name: str, tmp_path: Path) -> None:
    folder = save_model(name, tmp_path, **WITHOUT_DROPOUT.get(name, {}))
    with pooled(folder) as model:
        assert_alike(model.train(), eager(folder).train(), random_ids(1, LONG))
        trained(model, FAMILIES[name].full_layers)


@pytest.mark.parametrize(
    ("pool_ranks", "left"),
    [*((ranks, True) for ranks in (1, 2, 3, 4)), (2, False),
     *(pytest.param(ranks, False, marks=pytest.mark.full) for ranks in (1, 3, 4))],
)  # fmt: skip
def test_ranks_and_padded_rows(llama: Path, pool_ranks: int, left: bool) -> None:
    with pooled(llama, pool_ranks=pool_ranks) as model:
        ids, mask = padded_batch([LONG, 23, 31], left=left)
        assert_alike(model.train(), eager(llama).train(), ids, mask)
        trained(model, 2)


@pytest.mark.parametrize("settings", [{"partition": "query_blocks"}, {"base_share": 0}, {"base_share": 0.7}], ids=str)
def test_ways_to_cut(llama: Path, settings: dict[str, Any]) -> None:
    with pooled(llama, **settings) as model:
        assert_alike(model, eager(llama), random_ids(2, LONG))
        trained(model, 2)


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_parts_of_a_batch_in_flight(llama: Path, batch: int) -> None:
    ids, mask = padded_batch([LONG, 23, 31, 17, 40][:batch])
    with pooled(llama, blocks=None) as model:
        assert_alike(model.train(), eager(llama).train(), ids, mask)
        trained(model, 2, parts=2)
        stats = model.fa_pool.stats()
        assert (stats["training"]["overlapped_forwards"], stats["not_overlapped_reasons"]) == (1, {})


def test_backward_overlaps_as_forward_did(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between asking for one part's gradients and waiting for them the other part goes on."""
    with pooled(llama, blocks=None) as model:
        gradients(model.train(), random_ids(2, LONG))  # with its trial
        order = noted(monkeypatch)
        gradients(model, random_ids(2, LONG))
    kinds = [name for name, _ in order]
    assert kinds == ["post", "post", "wait", "post", "wait", "post", "wait", "wait"], order
    assert_taken_as_asked(order)


def test_dropout_elsewhere_draws_the_same_random_numbers(tmp_path: Path) -> None:
    """Parts would draw theirs in another order: the batch stays whole."""
    folder = save_model("gpt2", tmp_path, attn_pdrop=0.0, resid_pdrop=0.2, embd_pdrop=0.1)
    reference, ids = eager(folder).train(), random_ids(2, LONG)
    with pooled(folder, blocks=None) as model:
        torch.manual_seed(3)
        loss, _ = gradients(model.train(), ids)
        torch.manual_seed(3)
        assert_close(loss, gradients(reference, ids)[0], what="loss")
        trained(model, 2)
        (reason,) = model.fa_pool.stats()["not_overlapped_reasons"]
        assert reason.startswith("dropout: pieces"), reason


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("left", [None, True])
def test_gradient_checkpointing(llama: Path, reentrant: bool, left: bool | None) -> None:
    ids, mask = (random_ids(2, LONG), None) if left is None else padded_batch([LONG, 25])
    with pooled(llama, blocks=None) as model:
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        reference = eager(llama).train()
        assert_alike(model, reference, ids, mask)
        stats = model.fa_pool.stats()
        assert stats["training"]["pooled_calls"] == 4, "each layer twice"
        assert stats["backward"]["pooled_calls"] == 2
        assert stats["not_overlapped_reasons"] == {"gradient checkpointing runs layers by themselves": 1}


def test_two_graphs_at_a_time(llama: Path) -> None:
    """Forwards of which backward comes later, in another order, and after a short forward that gives the lease back."""
    reference, first, second = eager(llama), random_ids(1, LONG), random_ids(2, LONG, seed=1)
    with pooled(llama) as model:
        for net in (model, reference):
            one, two = (net(ids, labels=ids).loss for ids in (first, second))
            with torch.no_grad():
                net(random_ids(1, 4))
            one.backward()
            two.backward()
        same_gradients(*({name: p.grad for name, p in net.named_parameters()} for net in (model, reference)))
        assert model.fa_pool.stats()["backward"]["pooled_calls"] == 4
        del one, two
        gc.collect()
        model.fa_pool.reap()
        stats = model.fa_pool.stats()
        assert (stats["state"], stats["activations"], stats["releases"]) == ("idle", 2, 2), stats["events"]


def test_the_lease_lasts_as_long_as_the_graph(llama: Path) -> None:
    with pooled(llama) as model:
        loss = model(random_ids(1, LONG), labels=random_ids(1, LONG)).loss
        assert model.fa_pool.stats()["state"] == "active"
        loss.backward()
        del loss
        gc.collect()
        model.fa_pool.reap()
        assert model.fa_pool.stats()["state"] == "idle"


@pytest.mark.parametrize("moment", ["forward", "backward"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("settings", [{}, {"training_residency": True, "reduction": "tree"}], ids=["plain", "kept"])
def test_a_lost_rank_changes_no_gradient(
    llama: Path, moment: str, sign: signal.Signals, settings: dict[str, Any]
) -> None:
    ids, reference = random_ids(2, LONG), eager(llama)
    with pooled(llama, timeout_s=1.0, **settings) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients(model, ids)
        victims = sorted(workers())
        if moment == "forward":
            os.kill(victims[0], sign)
        loss = model(ids, labels=ids).loss
        if moment == "backward":
            os.kill(victims[0], sign)
        model.zero_grad()
        loss.backward()
        _, expected = gradients(reference, ids)
        same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
        # One that died between two leases is replaced, not lost.
        assert model.fa_pool.stats()["faults"] == 1 or moment == "forward"
        # The next step borrows a replacement.
        assert_alike(model, reference, ids)


def packed(lengths: list[int]) -> dict[str, Any]:
    """Documents in one row, as positions tell them apart."""
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {"position_ids": positions, "use_cache": False}


def test_models_that_mix_documents_stay_local(tmp_path: Path) -> None:
    """transformers' masks of gpt-oss take the row for one sequence."""
    folder, ids = save_model("gpt_oss", tmp_path), random_ids(1, 68)
    with pooled(folder) as model, torch.no_grad():
        assert_close(model(ids, **packed([LONG, 28])).logits, eager(folder)(ids, **packed([LONG, 28])).logits)
        (reason,) = model.fa_pool.stats()["local_reasons"]
        assert "see each other" in reason, reason


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("training", [True, False])
def test_packed_documents(tmp_path: Path, name: str, training: bool) -> None:
    """Each is a sequence of its own, as it is alone."""
    lengths, folder = [LONG, 5, 23, 1], save_model(name, tmp_path)
    ids, reference = random_ids(1, sum(lengths)), eager(folder)
    edges = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    with pooled(folder, blocks=None) as model:
        if training:
            assert_alike(model, reference, ids, **packed(lengths))
            trained(model, FAMILIES[name].full_layers)
        with torch.no_grad():
            found = model(ids, **packed(lengths)).logits
            for start, stop in pairwise(edges):
                assert_close(found[:, start:stop], reference(ids[:, start:stop]).logits, what=f"document from {start}")
            # Of another first document the others know nothing.
            changed = ids.clone()
            changed[:, : lengths[0]] = random_ids(1, lengths[0], seed=9)
            other = model(changed, **packed(lengths)).logits
            assert torch.equal(other[:, lengths[0] :], found[:, lengths[0] :])
        assert model.fa_pool.stats()["prefill"]["pooled_calls"] == 2 * FAMILIES[name].full_layers


def test_packed_documents_by_their_edges(llama: Path) -> None:
    lengths = [LONG, 5, 23]
    edges = torch.tensor([0, *lengths]).cumsum(0).int()
    given = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": LONG, "max_length_k": LONG}
    ids = random_ids(1, sum(lengths))
    with pooled(llama) as model, torch.no_grad():
        by_positions = model(ids, **packed(lengths)).logits
        assert torch.equal(model(ids, **packed(lengths), **given).logits, by_positions)


def test_short_documents_stay_local(llama: Path) -> None:
    """However long the row: no sequence in it is longer than the threshold."""
    lengths = [THRESHOLD, 10, THRESHOLD, 9]
    with pooled(llama) as model, torch.no_grad():
        model(random_ids(1, sum(lengths)), **packed(lengths))
        assert model.fa_pool.stats()["activations"] == 0


def test_steps_of_an_optimizer(llama: Path) -> None:
    """Losses stay those of the reference, step after step."""
    losses: dict[str, list[float]] = {}
    with pooled(llama) as model:
        for name, net in (("pooled", model), ("eager", eager(llama))):
            optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-2)
            losses[name] = []
            for step in range(6):
                loss, _ = gradients(net, random_ids(2, LONG, seed=step % 2))
                optimizer.step()
                losses[name].append(float(loss))
    worst = max(abs(a - b) / b for a, b in zip(losses["pooled"], losses["eager"], strict=True))
    assert worst < 1e-5, f"losses differ by {worst:.3g}: {losses}"
    assert losses["eager"][-1] < 0.8 * losses["eager"][0], losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(llama: Path, dtype: torch.dtype) -> None:
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-9
    with pooled(llama, arguments={"dtype": dtype}) as model:
        _, found = gradients(model, random_ids(2, LONG))
        # Eager attention takes its softmax in fp32, whatever the dtype.
        _, expected = gradients(plain(llama, dtype=dtype, attn_implementation="sdpa"), random_ids(2, LONG))
        for name, grad in expected.items():
            assert_close(found[name], grad, tolerance=tolerance, what=f"gradient of {name}")
        trained(model, 2)


def test_autocast(llama: Path) -> None:
    ids = random_ids(2, LONG)
    with pooled(llama) as model, torch.autocast("cpu", dtype=torch.bfloat16):
        sdpa = copy.deepcopy(eager(llama))
        sdpa.set_attn_implementation("sdpa")
        loss, found = gradients(model, ids)
        expected_loss, expected = gradients(sdpa, ids)
        assert loss.dtype == expected_loss.dtype
        assert_close(loss, expected_loss, tolerance=0.01, what="loss")
        for name, grad in expected.items():
            assert_close(found[name], grad, tolerance=0.1, what=f"gradient of {name}")
        trained(model, 2)


def test_attention_dropout_stays_the_models_own(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path, attention_dropout=0.3)
    with pooled(folder) as model:
        net = eager(folder)
        net.set_attn_implementation("sdpa")
        torch.manual_seed(3)
        loss, found = gradients(model.train(), random_ids(1, LONG))
        torch.manual_seed(3)
        expected_loss, expected = gradients(net.train(), random_ids(1, LONG))
        assert torch.equal(loss, expected_loss), "the same random numbers"
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        (reason,) = model.fa_pool.stats()["local_reasons"]
        assert reason.startswith("attention dropout 0.3"), reason


def test_short_rows_train_as_without_the_plugin(llama: Path) -> None:
    with pooled(llama) as model:
        sdpa = eager(llama)
        sdpa.set_attn_implementation("sdpa")
        loss, found = gradients(model, random_ids(2, THRESHOLD))
        expected_loss, expected = gradients(sdpa, random_ids(2, THRESHOLD))
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert model.fa_pool.stats()["activations"] == 0


def test_second_derivatives_are_refused(llama: Path) -> None:
    with pooled(llama) as model:
        loss = model(random_ids(1, LONG), labels=random_ids(1, LONG)).loss
        weight = model.model.layers[0].self_attn.q_proj.weight
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_frozen_weights_get_nothing_and_others_all(llama: Path) -> None:
    """As with adapters: only some projections are trained."""
    reference = eager(llama)
    with pooled(llama) as model:
        for net in (model, reference):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_("v_proj" in name)
        assert_alike(model, reference, random_ids(1, LONG))
        trained(model, 2)
