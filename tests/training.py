"""A step of training with pool ranks and without, and what is claimed of the two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base.gradients import Gradients
from tests.models import TOLERANCE, assert_close

WITHOUT_DROPOUT: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
TRAINED = ("llama", "qwen2_mixed", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3", "opt")


def gradients(model: Any, ids: Tensor, mask: Tensor | None = None, **others: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients by parameter) of one step."""
    model.zero_grad()
    labels = ids
    if mask is not None:
        # What padding predicts does not count: neither pads nor, where they stand on the left, the first token.
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        labels = ids.masked_fill((mask == 0) | (before == 0), -100)
    loss = model(ids, attention_mask=mask, labels=labels, **others).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: Any, reference: Any, ids: Tensor, mask: Tensor | None = None, **others: Any) -> None:
    loss, found = gradients(model, ids, mask, **others)
    expected_loss, expected = gradients(reference, ids, mask, **others)
    assert_close(loss, expected_loss, what="loss")
    same_gradients(found, expected)


def same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of fp32 models: each is alike by its largest value and by its norm."""
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        # Others are 0 but for rounding: a bias of keys moves every score of a query alike.
        if grad.abs().max() > 1e-6 * largest:
            assert_close(found[name], grad, what=f"gradient of {name}")
            apart = float((found[name].double() - grad.double()).norm() / grad.double().norm())
            assert apart < TOLERANCE, f"gradient of {name}: differs by {apart:.3g} of its norm"


def trained(model: Any, layers: int, forwards: int = 1, parts: int = 1) -> None:
    """So many layer calls were pooled, forward and backward, and none was local."""
    stats = model.fa_pool.stats()
    calls = layers * forwards * parts
    for phase in ("training", "backward"):
        assert stats[phase]["pooled_calls"] == calls, (phase, stats)
        assert stats[phase]["local_calls"] == (0 if phase == "backward" else stats[phase]["local_calls"])
    assert (stats["faults"], stats["local_reasons"]) == (0, {}), stats


def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(which, of which call), whenever gradients are asked for ("post") or waited for ("wait") from now on."""
    order: list[tuple[str, int]] = []
    for name in ("post", "wait"):
        original = getattr(Gradients, name)

        def note(self: Any, name: str = name, original: Any = original) -> Any:
            order.append((name, id(self)))
            return original(self)

        monkeypatch.setattr(Gradients, name, note)
    return order


def assert_taken_as_asked(order: list[tuple[str, int]]) -> None:
    """Answers are taken in the order of asking."""
    posted, waited = ([who for name, who in order if name == which] for which in ("post", "wait"))
    assert posted == waited, order
