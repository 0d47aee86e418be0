"""What a sequence's forwards were given, so that lost keys can be computed once more.

Inputs of forwards that differ in nothing but their tokens are joined: the replay of a prompt and a thousand steps is
one forward. What its inputs do not tell of a forward makes keys that no replay brings back, which is said rather than
guessed. Knows names of inputs and where their positions lie, no framework; not who owns keys, nor when they are lost.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fapool_plugin.base.unrecorded import adapters, decoder_in, values_of, version_of

_ALONG = {"input_ids": -1, "inputs_embeds": 1, "position_ids": -1, "attention_mask": -1}
"""Inputs that have positions, and in which dimension: the mask's are those before its forward, too."""
_AUTOCAST = "autocast"
"""Beside a forward's arguments: (device type, dtype, enabled)."""
_OF_ROWS = {*_ALONG, "token_type_ids"}
"""Arguments that have the batch's rows."""
_CUT_LATER = {"mask_of_its_own"}
"""Inputs that are cut when they are given once more."""
_BY_HAND = "keys of this cache were written by hand, or by a forward past the model's own call"
_CHANGED = "the model's weights or adapters have changed since they were made, or its modules or their mode"
_MOST = 256
"""Forwards that are kept apart, at most: joining copies all tokens."""

Given = dict[str, Any]


class Record:
    """The inputs of a sequence's forwards.

    Args:
        joins: whether forwards may be joined: the model does not tell a prompt in pieces from the whole.
    """

    def __init__(self, *, joins: bool) -> None:
        self._joins = joins
        self._forwards: list[tuple[int, Given]] = []
        """Each with the column after its last."""
        self._owner: Any = None
        self._made_with: Any = None
        """The model as it was when keys were made: what is cheap to look at, and once they may be lost the rest."""
        self._values = b""
        self._spoiled = ""
        """Why keys cannot be computed once more, whatever the model is now."""

    def add(self, owner: nn.Module, given: Given, start: int, stop: int, *, away: bool, odd: str = "") -> None:
        """A forward of the columns [start, stop) is complete.

        Args:
            owner: the model that made it.
            given: what made its keys, by name.
            start: its first column.
            stop: the column after its last.
            away: whether its keys may be lost from now on.
            odd: what it did that its inputs do not tell.
        """
        self.crop(start)
        taken_over = self._owner is None and bool(self._forwards)
        if not start:
            self._spoiled, self._values, self._made_with = "", b"", version_of(owner)
        elif not self._forwards or self._forwards[-1][0] < start:
            self._spoil(_BY_HAND)
        elif taken_over:  # by the bits alone: a copy, or another process, has other tensors
            self._spoil(_CHANGED if self._values not in (b"", values_of(owner)) else "")
            self._made_with = version_of(owner)
        elif (one := self._owner()) is not owner and decoder_in(one) is not decoder_in(owner):
            self._spoil("another model has gone on with this cache")
        elif adapters(owner) != self._made_with[0]:
            self._spoil(_CHANGED)
        self._spoil(odd)
        if not start or taken_over:
            self._owner = weakref.ref(owner)
        if away and not self._values:
            self._values = values_of(owner)
        inputs = {name: _held(value) for name, value in given.items() if value is not None}
        self._forwards.append((stop, inputs | {_AUTOCAST: _autocast(next(owner.parameters()).device.type)}))
        if len(self._forwards) >= _MOST:
            self._forwards = list(self._joined())

    def crop(self, columns: int) -> None:
        """Forgets everything from a column on."""
        while self._forwards and self._start(-1) >= columns:
            self._forwards.pop()
        if self._forwards and self._forwards[-1][0] > columns:
            (stop, given), start = self._forwards.pop(), self._start(-1) if len(self._forwards) > 1 else 0
            self._spoil("" if _can_be_cut(given) else "a forward with arguments that cannot be cut was cut")
            self._forwards.append((columns, _cut(given, start, stop, columns)))

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``."""
        index = rows.to("cpu")
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        for _, given in self._forwards:
            tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
            self._spoil("" if tensors <= _OF_ROWS else "rows changed of a forward whose arguments have none")
        self._forwards = [
            (stop, {name: _rows(name, value, index) for name, value in given.items()}) for stop, given in self._joined()
        ]

    def repeat(self, repeats: int) -> None:
        """Each row becomes so many."""
        rows = next((x.shape[0] for _, given in self._forwards for x in given.values() if isinstance(x, Tensor)), 0)
        self.select(torch.arange(rows).repeat_interleave(repeats))

    def owner(self, *, edited: bool) -> Any:
        """Whose forwards they were. Raises RuntimeError if its keys cannot be computed once more, or were ``edited``
        since."""
        owner, reason = self._owner() if self._owner is not None else None, _BY_HAND if edited else self._spoiled
        if not reason and (owner is None or version_of(owner) != self._made_with or values_of(owner) != self._values):
            reason = _CHANGED
        if reason:
            raise RuntimeError(
                f"fa_pool: keys were lost with a pool rank, and {reason}, so no replay brings them back: begin this "
                'sequence again, with a new cache, or set kv_redundancy to "peer"'
            )
        return owner

    def forwards(self, columns: int) -> Iterator[Given]:
        """The arguments of forwards that make the keys of the first ``columns`` columns, in order."""
        self.crop(columns)
        for _, given in self._joined():
            yield given

    def copy(self) -> Record:
        """A record of its own, of the same forwards."""
        twin = Record(joins=self._joins)
        twin.__dict__.update(vars(self), _forwards=list(self._forwards))
        return twin

    def __getstate__(self) -> Given:
        # A reference to a model does not travel: a model of the same bits that continues is taken for the same.
        return dict(vars(self)) | {"_owner": None, "_made_with": None}

    def _spoil(self, reason: str) -> None:
        self._spoiled = self._spoiled or reason

    def _start(self, index: int) -> int:
        at = index % len(self._forwards)
        return self._forwards[at - 1][0] if at else 0

    def _joined(self) -> Iterator[tuple[int, Given]]:
        """Neighbours as one where they have the same arguments, all of them known to have positions."""
        run: list[Given] = []
        last = 0
        for stop, given in self._forwards:
            alike = run and given.keys() == run[0].keys() and given[_AUTOCAST] == run[0][_AUTOCAST]
            if run and not (self._joins and alike and _can_be_joined(given) and _same_past(run[-1], given)):
                yield last, _together(run)
                run = []
            run.append(given)
            last = stop
        if run:
            yield last, _together(run)


def moved(given: Given, device: torch.device) -> Given:
    """A forward's inputs, to be given once more."""
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}
    del there[_AUTOCAST]
    return there


def autocast_of(given: Given) -> torch.autocast:
    """As it was when the forward was made."""
    device, dtype, enabled = given[_AUTOCAST]
    return torch.autocast(device, dtype=dtype, enabled=enabled)


def _autocast(device: str) -> tuple[str, torch.dtype, bool]:
    return device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def _held(value: Any) -> Any:
    """What others do not write to."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _cut(given: Given, start: int, stop: int, columns: int) -> Given:
    """Inputs of the columns [start, stop) up to a column."""
    cut = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name not in _CUT_LATER:
            dim, size = _ALONG[name], value.shape[_ALONG[name]]
            # A mask has all columns before its forward, too.
            keep = size - (stop - columns)
            cut[name] = value.narrow(dim, 0, keep)
    return cut


def _can_be_cut(given: Given) -> bool:
    """Whether all arguments that may have positions are known to have them."""
    mask, names = given.get("attention_mask"), given.keys() - _ALONG.keys() - _CUT_LATER - {_AUTOCAST}
    plain = all(isinstance(given[name], bool | int | float | str) for name in names)
    return plain and (mask is None or (isinstance(mask, Tensor) and mask.ndim == 2))


def _can_be_joined(given: Given) -> bool:
    return given.keys() <= _ALONG.keys() | {_AUTOCAST} and _can_be_cut(given)


def _same_past(earlier: Given, later: Given) -> bool:
    """Whether a forward's mask shows and hides what its predecessor's did."""
    mine, other = (given.get("attention_mask") for given in (earlier, later))
    return mine is None or other is None or torch.equal(other[:, : mine.shape[1]] != 0, mine != 0)


def _together(run: list[Given]) -> Given:
    if len(run) == 1:
        return run[0]
    whole = {}
    for name in run[0]:
        values = [given[name] for given in run]
        whole[name] = values[-1] if name in ("attention_mask", _AUTOCAST) else torch.cat(values, dim=_ALONG[name])
    return whole


def _rows(name: str, value: Any, rows: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.ndim < 2:
        return value
    dim = value.ndim - 2 if name == "position_ids" else 0
    return value.index_select(dim, rows) if value.shape[dim] > 1 or int(rows.max()) == 0 else value
