"""One training row as blocks in flight: loss, outputs and gradients of the same weights in eager attention."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.wire.messages import LinkLost, Message, Op
from tests.blocks import in_blocks, save_long
from tests.models import FAMILIES, assert_close, eager, padded_batch, plain, random_ids
from tests.training import (
    TRAINED,
    WITHOUT_DROPOUT,
    assert_alike,
    assert_taken_as_asked,
    gradients,
    noted,
    trained,
)

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("one_thread_each")]
LENGTH = 330
"""More than five blocks of the shortest length."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_long("llama", tmp_path_factory.mktemp("llama"))


def overlapped(model: Any, forwards: int = 1) -> None:
    stats = model.fa_pool.stats()
    assert (stats["training"]["overlapped_forwards"], stats["not_overlapped_reasons"]) == (forwards, {}), stats


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_of_every_kind_of_model(name: str, tmp_path: Path) -> None:
    """Layers that slide, sinks, latent attention, learned positions."""
    folder = save_long(name, tmp_path, **WITHOUT_DROPOUT.get(name, {}))
    with in_blocks(folder, 3) as model:
        assert_alike(model.train(), eager(folder).train(), random_ids(1, LENGTH))
        trained(model, FAMILIES[name].full_layers, parts=3)
        overlapped(model)


@pytest.mark.parametrize("window", [20, 200])
@pytest.mark.parametrize("blocks", [2, 5])
def test_windows_smaller_and_larger_than_a_block(tmp_path: Path, window: int, blocks: int) -> None:
    folder = save_long("qwen2_mixed", tmp_path, sliding_window=window)
    with in_blocks(folder, blocks) as model:
        assert_alike(model.train(), eager(folder).train(), random_ids(1, LENGTH))
        overlapped(model)


@pytest.mark.parametrize(
    "settings",
    [{"pool_ranks": 3}, {"base_share": 0}, {"base_share": 0.7}, {"partition": "query_blocks", "pool_ranks": 2}],
    ids=str,
)
def test_ways_to_cut(llama: Path, settings: dict[str, Any]) -> None:
    with in_blocks(llama, 4, **settings) as model:
        assert_alike(model.train(), eager(llama).train(), random_ids(1, LENGTH))
        trained(model, 2, parts=4)


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_row(llama: Path, left: bool) -> None:
    """Blocks that are padding in part, and as a whole."""
    ids, mask = padded_batch([210, LENGTH], left=left)
    with in_blocks(llama, 4) as model:
        assert_alike(model.train(), eager(llama).train(), ids[:1], mask[:1])
        overlapped(model)


def test_four_blocks_unless_told_otherwise(llama: Path) -> None:
    with in_blocks(llama, None) as model:
        assert_alike(model.train(), eager(llama).train(), random_ids(1, LENGTH))
        trained(model, 2, parts=4)
        gradients(model, random_ids(1, 130))
        assert model.fa_pool.stats()["training"]["pooled_calls"] == 2 * (4 + 2), "none is shorter than 64 positions"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(llama: Path, dtype: torch.dtype) -> None:
    ids, tolerance = random_ids(1, LENGTH), 1e-9 if dtype == torch.float64 else 0.1
    with in_blocks(llama, 4, arguments={"dtype": dtype}) as model:
        _, found = gradients(model.train(), ids)
        # Eager attention takes its softmax in fp32, whatever the dtype.
        _, expected = gradients(plain(llama, dtype=dtype, attn_implementation="sdpa").train(), ids)
        for name, grad in expected.items():
            assert_close(found[name], grad, tolerance=tolerance, what=f"gradient of {name}")
        overlapped(model)


def test_outputs_are_those_of_one_forward(llama: Path) -> None:
    ids = random_ids(1, LENGTH)
    expected = eager(llama).train()(ids, labels=ids, output_hidden_states=True)
    with in_blocks(llama, 4) as model:
        output = model.train()(ids, labels=ids, output_hidden_states=True)
        assert output.keys() == expected.keys()
        assert_close(output.logits, expected.logits)
        for mine, other in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
            assert type(mine) is type(other)
            assert_close(mine.keys, other.keys, what="keys of the cache")
        for index, (states, wanted) in enumerate(zip(output.hidden_states, expected.hidden_states, strict=True)):
            assert_close(states, wanted, what=f"hidden states {index}")
        overlapped(model)


def test_a_loss_of_some_positions(llama: Path) -> None:
    """Later blocks get no gradient, but those of attention to earlier ones."""
    ids = random_ids(1, LENGTH)
    reference = eager(llama).train()
    with in_blocks(llama, 4) as model:
        for net in (model.train(), reference):
            net(ids).logits[:, 90:100].square().mean().backward()
        for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            assert_close(p.grad, q.grad, tolerance=1e-5, what=f"gradient of {name}")


def test_frozen_layers(llama: Path) -> None:
    """As adapters in upper layers do: keys of the lower ones have no gradient."""
    ids, reference = random_ids(1, LENGTH), eager(llama).train()
    with in_blocks(llama, 4) as model:
        for net in (model, reference):
            net.requires_grad_(False)
            net.model.layers[1].requires_grad_(True)
        assert_alike(model.train(), reference, ids)


def test_backward_overlaps_as_forward_did(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's gradients are asked for before those of the block after it are waited for."""
    with in_blocks(llama, 3) as model:
        gradients(model.train(), random_ids(1, LENGTH))  # with its trial
        order = noted(monkeypatch)
        gradients(model, random_ids(1, LENGTH))
    kinds = "".join(name[0] for name, _ in order)
    assert kinds == "pp" + "pw" * 4 + "ww", kinds
    assert_taken_as_asked(order)


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("at", [1, 5])
def test_a_rank_lost_in_the_middle(llama: Path, monkeypatch: pytest.MonkeyPatch, op: str, at: int) -> None:
    ids, original, calls = random_ids(1, LENGTH), PoolRank.answer, [0]

    def answer(self: PoolRank, call: int) -> Message:
        message = original(self, call)
        if self.number == 0 and (message.header.op == Op.BACKWARD) == (op == "backward"):
            calls[0] += 1
            if calls[0] == at:
                self.link.close()
                raise LinkLost("in the middle")
        return message

    with in_blocks(llama, 4, pool_ranks=2) as model, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.setattr(PoolRank, "answer", answer)
        assert_alike(model.train(), eager(llama).train(), ids)
        assert model.fa_pool.stats()["faults"] == 1


def test_an_error_in_the_middle_does_no_harm(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, calls, original = random_ids(1, LENGTH), [], LlamaMLP.forward

    def fail(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return original(self, x)

    with in_blocks(llama, 4) as model:
        model.train()(ids, labels=ids)  # with its trial
        monkeypatch.setattr(LlamaMLP, "forward", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            model(ids, labels=ids)
        monkeypatch.undo()
        gc.collect()
        model.fa_pool.reap()
        assert model.fa_pool.stats()["state"] == "idle", "nothing of the forward is left"
        assert_alike(model, eager(llama).train(), ids)


def test_two_graphs_at_a_time_and_twice(llama: Path) -> None:
    """Backward in another order than forward, and a second time through the same graph."""
    reference, first, second = eager(llama).train(), random_ids(1, LENGTH), random_ids(1, 200, seed=1)
    with in_blocks(llama, 3) as model:
        for net in (model.train(), reference):
            one, two = (net(ids, labels=ids).loss for ids in (first, second))
            one.backward(retain_graph=True)
            two.backward()
            one.backward()
        for (name, p), (_, q) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
            assert_close(p.grad, q.grad, tolerance=1e-5, what=f"gradient of {name}")
