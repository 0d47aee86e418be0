"""The ways in which a survey uses a model: each asks any model the same, and returns what it answered.

Knows no plugin beyond its counters: the same function runs the plain model and the pooled one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.models import THRESHOLD, padded_batch, random_ids

Answers = dict[str, Tensor]
LONG, IN_BLOCKS, STEPS = 40, 200, 4
"""Tokens of a long prompt, of one that is long enough for three blocks, and of what is decoded."""

DOCUMENTS = (23, 19)
"""Tokens of documents in one row; each is above the threshold."""


class NoSuchUse(Exception):
    """The plain model cannot be used in this way; says why."""


@contextmanager
def exact_softmax() -> Iterator[None]:
    """Softmax of fp64 scores in fp64, where eager attention asks for fp32: there the lowest number of an fp64 mask is
    minus infinity, and rows that see nothing but padding become nan. Replaced for every model alike, and not by a
    torch function mode, which is a state of the thread."""
    original = functional.softmax

    def softmax(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if scores.dtype == torch.float64:
            kwargs.pop("dtype", None)
        return original(scores, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "softmax", softmax)
        yield


@dataclass
class Asked:
    """A model, and what its forwards above the threshold became. A plain model has no counters: nothing is noted."""

    model: Any
    length: int = 0
    """Tokens of the longest sequence after the last forward."""
    pooled: int = 0
    """Layer calls."""
    reasons: set[str] = field(default_factory=set)
    """Why forwards were local."""
    unaccounted: list[str] = field(default_factory=list)
    """Forwards that were neither pooled nor counted with a reason."""
    in_blocks: int = 0
    """Forwards of which blocks of positions were in flight."""
    in_one: set[str] = field(default_factory=set)
    """Why others were not cut."""

    def __call__(self, ids: Tensor, longest: int | None = None, **arguments: Any) -> Any:
        """One forward; ``longest`` is the longest document, where that is not the row."""
        past = self.length if arguments.get("past_key_values") is not None else 0
        self.length = longest or past + ids.shape[1]
        manager = getattr(self.model, "fa_pool", None)
        if manager is None or self.length <= THRESHOLD:
            return self.model(ids, **arguments)
        before = manager.stats()
        output = self.model(ids, **arguments)
        self._note(before, manager.stats(), ids, past)
        return output

    def _note(self, before: dict[str, Any], after: dict[str, Any], ids: Tensor, past: int) -> None:
        def grown(counter: str) -> int:
            return sum(after[phase][counter] - before[phase][counter] for phase in ("prefill", "decode", "training"))

        def more(counter: str) -> set[str]:
            return {reason for reason, times in after[counter].items() if times > before[counter].get(reason, 0)}

        pooled, reasons = grown("pooled_calls"), more("local_reasons")
        if not pooled and not reasons:
            self.unaccounted.append(f"{tuple(ids.shape)} after {past} tokens")
        self.pooled += pooled
        self.reasons |= reasons
        # Several rows in training are parts of a batch, not blocks of positions.
        if ids.shape[0] == 1:
            self.in_blocks += grown("overlapped_forwards")
        self.in_one |= more("not_overlapped_reasons")


def past_of(output: Any) -> Any:
    return getattr(output, "past_key_values", None)


@torch.no_grad()
def no_cache(model: Asked, short: bool) -> Answers:
    """A batch, without a cache."""
    return {"logits": model(random_ids(2, THRESHOLD if short else LONG), use_cache=False).logits}


@torch.no_grad()
def cached(model: Asked, short: bool) -> Answers:
    """A prompt and steps after it; then the same from a short prompt, which passes the threshold on its way."""
    answers: Answers = {}
    for start, stop in ((10, THRESHOLD),) if short else ((LONG, LONG + STEPS), (THRESHOLD - 2, THRESHOLD + STEPS)):
        answers |= _decoded(model, random_ids(2, stop), start)
    return answers


def _decoded(model: Asked, ids: Tensor, start: int) -> Answers:
    """Logits of a prompt and of every step after it."""
    output = model(ids[:, :start])
    answers = {f"logits of {start}": output.logits.detach()}
    if past_of(output) is None:
        raise NoSuchUse("it returns no past_key_values")
    for at in range(start, ids.shape[1]):
        output = model(ids[:, at : at + 1], past_key_values=past_of(output))
        answers[f"logits of {at} + 1"] = output.logits.detach()
    return answers


@torch.no_grad()
def blocks(model: Asked, short: bool) -> Answers:
    """A prompt of several blocks, without a cache and with one, which a step then reads."""
    length = THRESHOLD - 1 if short else IN_BLOCKS
    ids = random_ids(1, length + 1)
    answers = {"logits, no cache": model(ids[:, :length], use_cache=False).logits}
    output = model(ids[:, :length])
    answers["logits"] = output.logits
    if past_of(output) is not None:
        answers["logits of a step"] = model(ids[:, length:], past_key_values=past_of(output)).logits
    return answers


@torch.no_grad()
def padded(model: Asked, short: bool) -> Answers:
    """Rows of different lengths, padded on the left and on the right; only what is no padding is an answer."""
    answers = {}
    for side in ("left", "right"):
        ids, mask = padded_batch([13, THRESHOLD, 7] if short else [33, LONG, 29], left=side == "left")
        answers[f"logits, padded on the {side}"] = model(ids, attention_mask=mask).logits[mask == 1]
    return answers


@torch.no_grad()
def packed(model: Asked, short: bool) -> Answers:
    """Two documents in one row, told by positions that begin anew."""
    lengths = (12, 4) if short else DOCUMENTS
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    ids = random_ids(1, sum(lengths))
    return {"logits": model(ids, longest=max(lengths), position_ids=positions, use_cache=False).logits}


def with_grad(model: Asked, short: bool) -> Answers:
    """Decoding by hand, where torch.no_grad() was forgotten; where there is a past, it is one for both."""
    start, stop = (10, THRESHOLD) if short else (LONG, LONG + STEPS)
    ids = random_ids(1, stop)
    output, answers = model(ids[:, :start]), {}
    for at in range(start, stop):
        answers[f"logits up to {at}"] = output.logits.detach()
        past = past_of(output)
        answers[f"past after {at}"] = torch.tensor(float(past is not None) + 1)
        output = model(ids[:, at : at + 1]) if past is None else model(ids[:, at : at + 1], past_key_values=past)
    return answers | {"logits at the end": output.logits.detach()}


def gradients(model: Asked, short: bool) -> Answers:
    """Gradients of every parameter: of one row, long enough for blocks, and of a batch."""
    answers = {}
    model.model.train()
    try:
        for batch, length in ((1, 9), (2, THRESHOLD)) if short else ((1, IN_BLOCKS), (2, LONG + 4)):
            model.model.zero_grad(set_to_none=True)
            ids = random_ids(batch, length)
            loss = model(ids, labels=ids).loss
            loss.backward()
            answers[f"loss of {batch}"] = loss.detach()
            for name, parameter in model.model.named_parameters():
                if parameter.grad is not None:
                    answers[f"gradient of {name} by {batch}"] = parameter.grad.clone()
    finally:
        model.model.zero_grad(set_to_none=True)
        model.model.eval()
    return answers


USES: dict[str, Callable[[Asked, bool], Answers]] = {
    "no cache": no_cache,
    "cached": cached,
    "blocks": blocks,
    "padded": padded,
    "packed": packed,
    "with grad": with_grad,
    "gradients": gradients,
}


def _whole(model: Asked) -> Answers:
    """What ``cached`` answers, of forwards without a cache."""
    answers = {}
    for start, stop in ((LONG, LONG + STEPS), (THRESHOLD - 2, THRESHOLD + STEPS)):
        logits = model(random_ids(2, stop), use_cache=False).logits
        answers[f"logits of {start}"] = logits[:, :start]
        answers |= {f"logits of {at} + 1": logits[:, at : at + 1] for at in range(start, stop)}
    return answers


def _apart(model: Asked) -> Answers:
    """What ``packed`` answers, of a forward for each document."""
    documents = random_ids(1, sum(DOCUMENTS)).split(DOCUMENTS, dim=1)
    return {"logits": torch.cat([model(ids, use_cache=False).logits for ids in documents], dim=1)}


OTHERWISE: dict[str, Callable[[Asked], Answers]] = {"cached": _whole, "packed": _apart}
"""How else the same may be asked of a model that agrees with itself."""
