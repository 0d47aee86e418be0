"""What a sequence's forwards were given, so that lost keys can be computed once more.

Inputs of forwards that differ in nothing but their tokens are joined: the replay of a prompt and a thousand steps is
one forward. Knows names of inputs and where their positions lie, no framework; not who owns keys, nor when they are
lost.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_ALONG = {"input_ids": -1, "inputs_embeds": 1, "position_ids": -1, "attention_mask": -1}
"""Inputs that have positions, and in which dimension: the mask's are those before its forward, too."""
_AUTOCAST = "autocast"
"""Beside a forward's arguments: (device type, dtype, enabled)."""
_MOST = 256
"""Forwards that are kept apart, at most: joining copies all tokens."""

_ENTRIES = 64
"""Of each weight, that are compared beside its version, at least if it has so many."""

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
        self._weights: tuple[Any, ...] = ()
        """The version that keys were made with."""

    def add(self, owner: nn.Module, given: Given, start: int, stop: int) -> None:
        """A forward of the columns [start, stop) is complete; ``given``: what made its keys, by name."""
        self.crop(start)
        if not self._forwards or self._owner is None:
            self._owner, self._weights = weakref.ref(owner), version_of(owner)
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
            self._forwards.append((columns, _cut(given, start, stop, columns)))

    def select(self, rows: Tensor) -> None:
        """Row i becomes a copy of row ``rows[i]``."""
        index = rows.to("cpu")
        index = index.nonzero().flatten() if index.dtype == torch.bool else index
        self._forwards = [
            (stop, {name: _rows(name, value, index) for name, value in given.items()}) for stop, given in self._joined()
        ]

    def repeat(self, repeats: int) -> None:
        """Each row becomes so many."""
        rows = next((x.shape[0] for _, given in self._forwards for x in given.values() if isinstance(x, Tensor)), 0)
        self.select(torch.arange(rows).repeat_interleave(repeats))

    def owner(self) -> Any:
        """Whose forwards they were. Raises RuntimeError if its keys cannot be computed once more."""
        owner = self._owner() if self._owner is not None else None
        if owner is None or version_of(owner) != self._weights:
            raise RuntimeError(
                "fa_pool: keys were lost with a pool rank, and the model's weights or adapters have changed since they "
                "were made: begin this sequence again, with a new cache"
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
        twin._forwards, twin._owner, twin._weights = list(self._forwards), self._owner, self._weights
        return twin

    def __getstate__(self) -> Given:
        # A reference to a model does not travel: who continues from a pickle is taken for the same model.
        return dict(vars(self)) | {"_owner": None}

    def _start(self, index: int) -> int:
        at = index % len(self._forwards)
        return self._forwards[at - 1][0] if at else 0

    def _joined(self) -> Iterator[tuple[int, Given]]:
        """Neighbours as one where they have the same inputs, all of them known to have positions, and hide the same."""
        run: list[Given] = []
        last = 0
        for stop, given in self._forwards:
            alike = run and given.keys() == run[0].keys() and given[_AUTOCAST] == run[0][_AUTOCAST]
            known = alike and given.keys() <= _ALONG.keys() | {_AUTOCAST} and _hides_as(given, run[-1])
            if run and not (self._joins and known):
                yield last, _together(run)
                run = []
            run.append(given)
            last = stop
        if run:
            yield last, _together(run)


def version_of(owner: nn.Module) -> tuple[Any, ...]:
    """What is another value once weights or adapters have changed."""
    adapters = getattr(owner, "active_adapters", None)
    try:
        active = tuple(adapters()) if callable(adapters) else adapters
    except ValueError:  # transformers': no adapter is loaded
        active = None
    return active, tuple((id(weight), *_value_of(weight)) for weight in owner.parameters())


def _value_of(weight: Tensor) -> tuple[int, int]:
    """Its version, and a checksum of some entries: writes to ``weight.data`` are in no version. What was made in
    inference mode has none; of that all entries count."""
    x, version = weight.detach(), 0 if weight.is_inference() else weight._version
    if type(x) is not Tensor or x.device.type == "meta" or not x.numel():
        return version, 0
    step = 1 if weight.is_inference() else max(1, x.numel() // _ENTRIES)
    some = x.reshape(-1)[::step].to("cpu").contiguous()
    return version, zlib.crc32(some.view(torch.uint8).numpy().data)


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


@contextmanager
def unseen(owner: nn.Module, own: Callable[[Any], bool]) -> Iterator[None]:
    """Within it users' hooks are off and random numbers are drawn from a copy of their state."""
    random, taken = torch.get_rng_state(), []
    for module in owner.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if not own(hook)]:
                taken.append((hooks, dict(hooks)))
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before in reversed(taken):
            hooks.clear()
            hooks.update(before)
        torch.set_rng_state(random)


def _held(value: Any) -> Any:
    """What others do not write to."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _cut(given: Given, start: int, stop: int, columns: int) -> Given:
    """Inputs of the columns [start, stop) up to a column."""
    cut = dict(given)
    for name, value in given.items():
        if isinstance(value, Tensor) and name in _ALONG:
            dim, size = _ALONG[name], value.shape[_ALONG[name]]
            # A mask has all columns before its forward, too.
            cut[name] = value.narrow(dim, 0, size - (stop - columns))
            if name == "attention_mask" and value.ndim == 4 and value.shape[2] > 1:
                cut[name] = cut[name].narrow(2, 0, value.shape[2] - (stop - columns))
    return cut


def _hides_as(given: Given, before: Given) -> bool:
    """Whether a forward's mask (B, T) goes on with that of the one before it: a joined forward has the last."""
    mask, earlier = given.get("attention_mask"), before.get("attention_mask")
    if mask is None or not isinstance(mask, Tensor) or not isinstance(earlier, Tensor):
        return mask is None
    return mask.ndim == 2 and torch.equal(mask[:, : earlier.shape[1]], earlier)


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
