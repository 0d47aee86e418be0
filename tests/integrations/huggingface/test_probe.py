"""What depends on all positions, or all rows, of a forward: the model is left whole, with the plain model's values.

Each model here is wrong in pieces, which is shown once more without trials.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.integrations.neftune import neftune_post_forward_hook

from fapool_plugin.integrations.huggingface import forward as huggingface_forward
from fapool_plugin.integrations.huggingface.pieces import SURVEYED
from fapool_plugin.integrations.huggingface.probe import Probe
from tests.blocks import in_blocks, save_long
from tests.models import assert_close, eager, padded_batch, random_ids, save_config, tiny_config

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread_each"),
]
LENGTH = 200


class Wrapped(nn.Module):
    """An MLP with something before or after it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class Centred(Wrapped):
    """Looks at all positions of a row."""

    def forward(self, x_BSX: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x_BSX - x_BSX.mean(1, keepdim=True))
        return mixed


class AcrossRows(Wrapped):
    """Looks at all rows of a batch."""

    def forward(self, x_BSX: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x_BSX - x_BSX.mean(0, keepdim=True))
        return mixed


class Noisy(Wrapped):
    """Draws random numbers that are no dropout's."""

    def forward(self, x_BSX: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x_BSX + 0.3 * torch.randn_like(x_BSX))
        return mixed


class Capacity(Wrapped):
    """Computes a quarter of the tokens that it is given, as experts with a capacity do."""

    def forward(self, x_BSX: Tensor) -> Tensor:
        mixed: Tensor = self.mlp(x_BSX)
        keep = torch.arange(x_BSX.shape[1]) < x_BSX.shape[1] // 4
        return mixed * keep[None, :, None]


class Counting(Wrapped):
    """Remembers how often it was called, and uses it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.calls = 0
        self.total: Tensor
        self.register_buffer("total", torch.zeros(1))

    def forward(self, x_BSX: Tensor) -> Tensor:
        self.calls += 1
        self.total += 1
        mixed: Tensor = self.mlp(x_BSX)
        return mixed * self.calls


def replaced(kind: type[Wrapped]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        layer = model.model.layers[0]
        layer.mlp = kind(layer.mlp)
        return model

    return change


def noisy(model: Any) -> Any:
    """Between two attention calls a block draws twice, and so before the next block's first draw."""
    model.model.layers[1].input_layernorm = Noisy(model.model.layers[1].input_layernorm)
    return replaced(Noisy)(model)


def hooked(model: Any) -> Any:
    model.model.layers[0].register_forward_hook(lambda module, args, out: out - 0.3 * out.mean(1, keepdim=True))
    return model


def neftune(model: Any) -> Any:
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 15.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    return model


def quantized(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@dataclass
class Case:
    """A model, what is done to it, and how it is called."""

    change: Callable[[Any], Any]
    rows: int = 1
    training: bool = False
    name: str = "llama"
    reason: str = "a trial showed"
    padded: bool = False
    tolerance: float = 1e-5


CASES = {
    "left-padded roberta": Case(lambda model: model, name="roberta", padded=True),
    "a module that looks at all positions": Case(replaced(Centred)),
    "expert capacity": Case(replaced(Capacity)),
    "random numbers": Case(noisy),
    "state of its own": Case(replaced(Counting)),
    "random numbers in training": Case(noisy, rows=2, training=True),
    "a module that looks at all rows": Case(replaced(AcrossRows), rows=2, training=True),
    "a user's hook": Case(hooked, reason="a hook on layers.0"),
    "noise on embeddings": Case(neftune, training=True, reason="a hook on embed_tokens"),
    "dynamic quantization": Case(quantized, tolerance=1e-4),
}


def folder_of(case: Case, folder: Path) -> Path:
    if case.name == "roberta":
        return save_config(tiny_config("roberta", is_decoder=True, max_position_embeddings=600), folder)
    return save_long(case.name, folder)


def difference(case: Case, folder: Path) -> tuple[float, dict[str, int]]:
    """The largest difference of logits and gradients, relative to the largest, in two forwards that follow each other;
    and why it was not cut."""
    ids, mask = padded_batch([150, LENGTH]) if case.padded else (random_ids(case.rows, LENGTH), None)
    given = {} if mask is None else {"attention_mask": mask}
    with in_blocks(folder, None) as model:
        nets = [case.change(net).train(case.training) for net in (eager(folder), model)]
        worst = 0.0
        for seed in range(2):
            answers = []
            for net in nets:
                torch.manual_seed(seed)
                with torch.set_grad_enabled(case.training):
                    logits = net(ids, use_cache=False, **given).logits
                found = [logits[mask == 1] if mask is not None else logits]
                if case.training:
                    found += torch.autograd.grad(logits.square().mean(), list(net.parameters()))
                answers.append(found)
            for expected, got in zip(*answers, strict=True):
                worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        manager = nets[1].fa_pool
        reasons = manager.stats()["not_overlapped_reasons"]
        manager.close()
    return worst, reasons


@pytest.mark.parametrize("name", CASES)
def test_what_depends_on_the_whole_is_left_whole(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    worst, reasons = difference(case, folder_of(case, tmp_path))
    assert worst <= case.tolerance, f"largest difference {worst:.3g}; {reasons}"
    (reason,) = reasons
    assert reason.startswith(case.reason), reason


@pytest.mark.parametrize("name", CASES)
def test_in_pieces_it_would_be_wrong(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would show nothing."""
    case = CASES[name]

    def no_trial(self: Probe, key: Any, *rest: Any) -> str:
        return self.verdicts.setdefault(key, "")

    monkeypatch.setattr(Probe, "run", no_trial)
    monkeypatch.setattr(huggingface_forward, "hook_reason", lambda decoder: None)
    worst, reasons = difference(case, folder_of(case, tmp_path))
    assert worst > 100 * case.tolerance, f"largest difference only {worst:.3g}; {reasons}"


def test_gradients_where_a_layer_is_frozen_by_no_grad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block hands over inside of no_grad; the others go on with gradients, and so does the process."""
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    reference = eager(folder).train()

    def freeze(net: Any) -> None:
        layer, whole = net.model.layers[0], net.model.layers[0].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return whole(*args, **kwargs)

        layer.forward = forward

    with in_blocks(folder, 3) as model:
        answers = []
        for net in (reference, model.train()):
            freeze(net)
            upper = list(net.model.layers[1].parameters())
            answers.append(torch.autograd.grad(net(ids, labels=ids).loss, upper))
            assert torch.is_grad_enabled()
        for expected, got in zip(*answers, strict=True):
            assert_close(got, expected, what="gradient")


def test_a_trial_leaves_everything_as_it_was(tmp_path: Path) -> None:
    """Random numbers, gradients, buffers, attributes, counters; a user's gradients are not added to."""
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    with in_blocks(folder, None) as model:
        replaced(Counting)(model).train()
        counting = model.model.layers[0].mlp
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        numbers: list[Any] = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()]
        model(ids, use_cache=False)
        later: list[Any] = [torch.get_rng_state(), random.getstate(), numpy.random.get_state()]
        assert torch.equal(numbers[0], later[0])
        assert numbers[1] == later[1]
        assert numbers[2][1].tolist() == later[2][1].tolist()
        assert (counting.calls, float(counting.total)) == (1, 1.0)
        assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
        stats = model.fa_pool.stats()
        assert stats["training"]["pooled_calls"] == 2
        assert stats["training"]["local_calls"] == stats["backward"]["local_calls"] == 0
        assert [event["kind"] for event in stats["events"]].count("probe") == 1


def test_a_verdict_is_kept_for_what_it_depends_on(tmp_path: Path) -> None:
    folder = save_long("llama", tmp_path)

    def trials(model: Any) -> int:
        return sum(event["kind"] == "probe" for event in model.fa_pool.stats()["events"])

    with in_blocks(folder, None) as model, torch.no_grad():
        for ids in (random_ids(1, LENGTH), random_ids(3, 150)):
            model(ids)
            assert trials(model) == 1
        ids, mask = padded_batch([150, LENGTH])
        model(ids, attention_mask=mask)
        assert trials(model) == 2, "padding on the left"
        model.train()(random_ids(1, LENGTH))
        assert trials(model) == 3, "training mode"
        replaced(Wrapped)(model.eval())
        model.model.layers[0].mlp.forward = model.model.layers[0].mlp.mlp.forward
        model(random_ids(1, LENGTH))
        assert trials(model) == 4, "a module was replaced"
        assert model.fa_pool.stats()["not_overlapped_reasons"] == {}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_cut_and_checked(tmp_path: Path, dtype: torch.dtype) -> None:
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    for change, whole in ((lambda model: model, False), (replaced(Centred), True)):
        with in_blocks(folder, None, arguments={"dtype": dtype}) as model:
            change(model)(ids)
            stats = model.fa_pool.stats()
            assert (stats["prefill"]["overlapped_forwards"] == 0) == whole, stats["not_overlapped_reasons"]


@pytest.mark.parametrize("training", [False, True])
def test_the_default_device_is_not_the_models(tmp_path: Path, training: bool) -> None:
    """A script may have set any; what a trial makes by itself must not follow it."""
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    with in_blocks(folder, None) as model, torch.device("meta"):
        loss = model.train(training)(ids, labels=ids).loss
        assert loss.device.type == "cpu"
        stats = model.fa_pool.stats()
    assert stats["training"]["overlapped_forwards"] == 1, stats["not_overlapped_reasons"]
    assert stats["faults"] == 0, stats["events"]


@torch.no_grad()
@pytest.mark.parametrize("surveyed", [True, False])
def test_a_window_between_a_trial_and_the_forward(
    tmp_path: Path, surveyed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trial of a few tokens shows what a longer window does: only models that tests have tried are cut."""
    folder, ids = save_long("qwen2_mixed", tmp_path, sliding_window=100), random_ids(1, LENGTH)
    known = SURVEYED if surveyed else frozenset[str]()
    monkeypatch.setattr("fapool_plugin.integrations.huggingface.pieces.SURVEYED", known)
    with in_blocks(folder, None) as model:
        assert_close(model(ids).logits, eager(folder)(ids).logits)
        stats = model.fa_pool.stats()
        assert stats["prefill"]["overlapped_forwards"] == surveyed
        reasons = list(stats["not_overlapped_reasons"])
        assert reasons == [] if surveyed else "a trial's 48 tokens and this forward's 200" in reasons[0], reasons


@torch.no_grad()
def test_parametrized_weights_are_left_whole(tmp_path: Path) -> None:
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    with in_blocks(folder, None) as model:
        parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
        model(ids)
        (reason,) = model.fa_pool.stats()["not_overlapped_reasons"]
        assert reason.endswith("are parametrized"), reason


@pytest.mark.parametrize("known", [True, False])
def test_base_ranks_agree_on_a_verdict(tmp_path: Path, known: bool) -> None:
    """A rank that has shown nothing yet tries with the others; a rank whose trial differs leaves all whole."""
    folder, ids = save_long("llama", tmp_path), random_ids(1, LENGTH)
    asked: list[tuple[int, int]] = []

    def agree(mine: tuple[int, int]) -> tuple[int, int]:
        asked.append(mine)
        return (min(mine[0], int(known)), 0) if len(asked) == 3 else mine

    with in_blocks(folder, 3) as model, torch.no_grad():
        model.fa_pool._agree, model.fa_pool.base_ranks = agree, 2
        model(ids)
        # Mode and blocks, whether a verdict is known, the verdict.
        assert [mine[0] for mine in asked] == [2, 0, 1], asked
        stats = model.fa_pool.stats()
        assert stats["prefill"]["overlapped_forwards"] == known
        assert known or list(stats["not_overlapped_reasons"]) == [
            "a trial showed that pieces differ from the whole: another base rank's trial differs"
        ]
