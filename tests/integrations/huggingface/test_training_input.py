"""Training on what is wrong, not finite, or another shape at every step: as without the plugin, and never a hang."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.ranks import local as local_pool
from tests.models import assert_close, eager, padded_batch, plain, pooled, random_ids, save_model, workers
from tests.training import assert_alike, gradients, same_gradients, trained

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]
LONG = 40


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=4096)


@pytest.mark.parametrize("length", [LONG - 3, LONG + 3])
def test_labels_of_another_length(llama: Path, length: int) -> None:
    """The model's own error, and the next step is as if nothing had been."""
    ids, labels, reference = random_ids(2, LONG), random_ids(2, length), eager(llama)
    with pytest.raises(ValueError, match="batch_size") as expected:
        reference(ids, labels=labels)
    with pooled(llama, blocks=None) as model:
        with pytest.raises(ValueError, match="batch_size") as found:
            model(ids, labels=labels)
        assert str(found.value) == str(expected.value)
        del found
        gc.collect()
        model.fa_pool.reap()
        assert model.fa_pool.stats()["state"] == "idle", "the lease is kept"
        assert_alike(model, reference, ids)


@pytest.mark.parametrize(
    ("attention", "first", "alike"), [("sdpa", True, True), ("eager", False, True), ("eager", True, False)]
)
def test_labels_of_first_tokens_behind_padding(llama: Path, attention: str, first: bool, alike: bool) -> None:
    """They are predicted from the last padded position, where pooled attention is eager attention's no more."""
    ids, mask = padded_batch([LONG, 25])
    labels = ids.masked_fill(mask == 0, -100)
    if not first:
        labels[1, LONG - 25] = -100
    found, arguments = [], {"attn_implementation": attention}
    with pooled(llama, arguments) as model:
        for net in (model, plain(llama, **arguments)):
            loss = net(ids, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            found.append({name: p.grad for name, p in net.named_parameters()} | {"loss": loss.detach()})
    if alike:
        same_gradients(*found)
    else:
        with pytest.raises(AssertionError, match="largest difference"):
            same_gradients(*found)


def spoilt(model: Any, ids: Tensor, spoil: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss of spoilt logits."""
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    spoil(logits).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "a loss of nan": lambda logits: logits * torch.nan,
    "a loss of inf": lambda logits: logits * torch.inf,
    "too large": lambda logits: logits.square() * 1e38,
    "one position": lambda logits: logits[:, 25] * torch.nan,
    "one row": lambda logits: logits[:1] * torch.inf,
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.full), None])
def test_gradients_that_are_not_finite(llama: Path, spoil: str, blocks: int | None) -> None:
    """In the same places as without the plugin, alike elsewhere, and none is left for the next step."""
    ids, reference = random_ids(2, LONG), plain(llama, attn_implementation="sdpa")
    expected = spoilt(reference, ids, SPOILS[spoil])
    with pooled(llama, blocks=blocks) as model:
        found = spoilt(model, ids, SPOILS[spoil])
        assert not all(grad.isfinite().all() for grad in expected.values())
        for name, grad in expected.items():
            elsewhere = grad.isfinite()
            apart = int((found[name].isfinite() != elsewhere).sum())
            assert not apart, f"gradient of {name}: {apart} of {grad.numel()} are finite in one of both only"
            if grad[elsewhere].any():
                assert_close(found[name][elsewhere], grad[elsewhere], what=f"gradient of {name}")
        trained(model, 2, parts=1 if blocks else 2)
        same_gradients(gradients(model, ids)[1], gradients(reference, ids)[1])
        assert model.fa_pool.stats()["faults"] == 0


@pytest.mark.parametrize("when", ["never started", "killed, and not replaced"])
def test_a_pool_smaller_than_asked_for(llama: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Two of three ranks are leased, step after step."""
    start, refuse = local_pool.LocalPool._start, when == "never started"

    def started(pool: local_pool.LocalPool, rank: int) -> None:
        start(pool, rank)
        if rank == 1 and refuse:
            pool._processes[rank].kill()

    monkeypatch.setattr(local_pool.LocalPool, "_start", started)
    reference = eager(llama)
    with pooled(llama, pool_ranks=3, blocks=None) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not refuse:
            assert_alike(model, reference, random_ids(2, LONG, seed=1))
            refuse = True
            os.kill(sorted(workers())[1], signal.SIGKILL)
        for seed in (2, 3):
            loss = model(random_ids(2, LONG, seed), labels=random_ids(2, LONG, seed)).loss
            if seed == 3:
                assert model.fa_pool.stats()["leased_ranks"] == [0, 2], model.fa_pool.stats()["events"]
            loss.backward()
            del loss
            assert_alike(model, reference, random_ids(2, LONG, seed))
        assert model.fa_pool.stats()["backward"]["local_calls"] == 0
        used = {rank["rank"]: rank["calls"] for rank in model.fa_pool.stats()["ranks"]}
        assert set(used) == ({0, 2} if when == "never started" else {0, 1, 2}), used
        assert used[0] == used[2] > used.get(1, 0), used


def test_a_lost_rank_keeps_no_graph(llama: Path) -> None:
    """Its activations, and the lease, are gone with the last reference, not when garbage is collected."""
    ids = random_ids(2, LONG)
    with pooled(llama, timeout_s=1.0) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients(model, ids)
        # Stopped, it still takes what it is asked: the answer is waited for, and its link is lost meanwhile.
        stop = model.model.layers[0].register_forward_hook(lambda *_: os.kill(sorted(workers())[0], signal.SIGSTOP))
        gc.collect()
        gc.disable()
        try:
            gradients(model, ids)
            stats = model.fa_pool.stats()
        finally:
            gc.enable()
            stop.remove()
        assert (stats["faults"], stats["state"]) == (1, "idle"), f"something keeps the graph: {stats['events']}"


SHAPES = [(2, 512), (1, 375), (3, 250)]
LARGE = [(2, 4096), (1, 3000), (3, 2000)]


@pytest.mark.timeout(280)
@pytest.mark.parametrize("shapes", [SHAPES, pytest.param(LARGE, marks=pytest.mark.full)], ids=["small", "large"])
def test_another_shape_at_every_step(llama: Path, shapes: list[tuple[int, int]]) -> None:
    reference = eager(llama).train()
    with pooled(llama, blocks=None) as model:
        for seed, shape in enumerate([*shapes, shapes[0]]):
            assert_alike(model.train(), reference, random_ids(*shape, seed))
        stats = model.fa_pool.stats()
        assert (stats["training"]["pooled_forwards"], stats["training"]["overlapped_forwards"]) == (4, 4), stats
        assert (stats["backward"]["local_calls"], stats["faults"], stats["local_reasons"]) == (0, 0, {}), stats
