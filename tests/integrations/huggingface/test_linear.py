"""Shapes are those of the weights, the linear part costs what was made to take time, and a model is left as it was.

Time passes only when the tests say so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fapool_plugin.integrations.huggingface import linear as huggingface_linear
from fapool_plugin.integrations.huggingface.calibrate import shape_of_path
from fapool_plugin.integrations.huggingface.linear import measure_linear, shape_of
from fapool_plugin.measure import calibrate
from fapool_plugin.plan.profile import Shape
from tests.measure.test_calibrate import Clock, assert_fit
from tests.models import FAMILIES, load_pooled, plain, random_ids, save_model, workers

NO_GROUPS = {"gpt2", "gpt_neox", "opt", "deepseek_v3"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (calibrate, huggingface_linear):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.full_layers])
def test_shapes_of_all_families(tmp_path: Path, name: str) -> None:
    folder = save_model(name, tmp_path)
    model = plain(folder)
    latent = name == "deepseek_v3"
    shape = shape_of(model)
    assert shape == Shape(
        hidden=48,
        layers=FAMILIES[name].full_layers,
        heads=6,
        kv_heads=6 if name in NO_GROUPS else 3,
        head_dim=16 if latent else 8,
        v_head_dim=12 if latent else 8,
        dtype="float32",
        parameters=model.num_parameters(),
    )
    assert shape_of(load_pooled(folder)) == shape
    assert shape_of_path(folder, "bfloat16") == shape.model_copy(update={"dtype": "bfloat16"})


def timed_model(tmp_path: Path, clock: Clock, name: str = "llama", layers: int = 6) -> Any:
    """A tiny model in which only embedding and FFNs take time: 1 ms a forward, and 10 us a token and layer."""
    model = plain(save_model(name, tmp_path, num_hidden_layers=layers))
    model.get_input_embeddings().register_forward_hook(clock.after(lambda *_: 1e-3))
    for module in model.modules():
        if type(module).__name__.endswith("MLP"):
            module.register_forward_hook(clock.after(lambda module, args, out: 1e-5 * args[0].shape[:2].numel()))
    return model


@pytest.mark.parametrize("quick", [True, False])
def test_the_linear_part_costs_what_the_model_takes(tmp_path: Path, clock: Clock, quick: bool) -> None:
    model = timed_model(tmp_path, clock)
    costs = measure_linear(model, [1, 2], 1e9, quick=quick)
    assert [cost.threads for cost in costs] == [1, 2]
    for cost in costs:
        assert_fit(cost.prefill, a=1e-3, b=6e-5)
        assert_fit(cost.decode, a=1e-3, b=6e-5)


def test_a_forward_that_is_broken_off_is_extrapolated(tmp_path: Path, clock: Clock) -> None:
    model, seen = timed_model(tmp_path, clock), []
    model.model.layers[2].mlp.register_forward_hook(lambda *_: seen.append("third layer"))
    cost = measure_linear(model, [1], 1e-9)[0]
    assert not seen, "the forward went on after two whole layers"
    assert_fit(cost.prefill, a=1e-3, b=6e-5)
    with torch.no_grad():
        out = model(random_ids(1, 8), output_hidden_states=True)
    assert len(out.hidden_states) == 7, "the break left something behind"
    assert huggingface_linear._CLOCK.get() is None


def test_attention_does_not_count(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timed_model(tmp_path, clock)
    monkeypatch.setattr(
        torch.Tensor, "new_zeros", lambda self, *sizes: clock.after(lambda: 7.0)() or self.new_empty(sizes).zero_()
    )
    assert_fit(measure_linear(model, [1], 1e9, quick=True)[0].prefill, a=1e-3, b=6e-5)


def test_sliding_layers_are_computed(tmp_path: Path) -> None:
    """They are local in every plan, so their attention belongs to the linear part: it must be the real one."""
    model = plain(save_model("gemma2", tmp_path), attn_implementation="eager")
    ids, seen = random_ids(1, 12), []
    sliding = model.model.layers[0].self_attn.o_proj
    sliding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
        with huggingface_linear._Model.opened(model) as opened:
            opened.run(ids, 1e9, opened.local)
    assert torch.equal(seen[0], seen[1]), f"largest difference {(seen[0] - seen[1]).abs().max():.3g}, not 0"


class Everything:
    """What measuring must leave alone."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.state = (
            config.to_dict(),
            config._attn_implementation,
            {name: module.training for name, module in model.named_modules()},
            {name: sorted(vars(module)) for name, module in model.named_modules()},
            {name: vars(module).get("fapool_forwards") for name, module in model.named_modules()},
            torch.is_grad_enabled(),
            torch.get_num_threads(),
            model.fa_pool.stats() if hasattr(model, "fa_pool") else None,
        )
        self.grads = [parameter.grad is None and parameter.requires_grad for parameter in model.parameters()]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Everything) and (self.state, self.grads) == (other.state, other.grads)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("kind", ["plain", "pooled"])
def test_a_model_is_left_as_it_was(tmp_path: Path, name: str, kind: str) -> None:
    folder, ranks = save_model(name, tmp_path), workers()
    model = plain(folder) if kind == "plain" else load_pooled(folder)
    model.train()
    next(m for m in model.modules() if isinstance(m, nn.Embedding)).eval()  # not all alike
    before = Everything(model)
    measure_linear(model, [1], 1e-9)
    assert Everything(model) == before
    assert shape_of(model).layers == FAMILIES[name].full_layers

    def interrupt(stage: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_linear(model, [1], 1e-9, interrupt)
    assert Everything(model) == before
    assert workers() == ranks, "measuring a pooled model's linear part started pool ranks"

    reference = plain(folder)
    ids = random_ids(1, 12)
    with torch.no_grad():
        got, expected = model.eval()(ids).logits, reference(ids).logits
    assert torch.equal(got, expected), f"largest difference {(got - expected).abs().max():.3g}, not 0"


def test_models_that_cannot_be_pooled_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no layer of full attention"):
        shape_of(plain(save_model("mistral_window", tmp_path)))
    with pytest.raises(ValueError, match="not a transformers model"):
        shape_of(nn.Linear(2, 2))
