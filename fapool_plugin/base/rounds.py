"""Blocks in flight: several computations of one kind, one at a time, in strict rotation.

Each runs until it hands over; then the next one goes on where it handed over last. The order depends on nothing but
the number of blocks and how often each hands over: never on time, so ranks that communicate inside agree on it.

Greenlets of one thread, not threads: there is one OpenMP team, and one current device. What else is the thread's, the
modes below, each block has for itself: it gives them back when it hands over and takes them again when it goes on.

    block 0   no_grad entered ---| hand over |...........................| goes on: no_grad ---| ...
    block 1                                  | begins: as the caller ---| hand over |...........

Knows no models and no attention.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import NamedTuple, TypeVar

import torch
from greenlet import GreenletExit, greenlet

T = TypeVar("T")
_Autocast = tuple[str, bool, torch.dtype]


class Modes(NamedTuple):
    """What torch keeps for a thread, or for the process, and a block may change."""

    grad: bool
    inference: bool
    autocast: tuple[_Autocast, ...]
    """(device type, enabled, dtype)."""
    autocast_cache: bool
    deterministic: tuple[bool, bool]
    """Deterministic algorithms, and whether they only warn."""

    @staticmethod
    def now() -> Modes:
        """As they are."""
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        return Modes(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((name, torch.is_autocast_enabled(name), torch.get_autocast_dtype(name)) for name in devices),
            torch.is_autocast_cache_enabled(),
            (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        )

    def set(self) -> None:
        """Makes them so, but for inference mode, which can only be entered."""
        torch.set_grad_enabled(self.grad)
        for name, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(name, enabled)
            torch.set_autocast_dtype(name, dtype)
        torch.set_autocast_cache_enabled(self.autocast_cache)
        if self.deterministic != Modes.now().deterministic:
            torch.use_deterministic_algorithms(self.deterministic[0], warn_only=self.deterministic[1])

    def switch(self, runs: greenlet) -> None:
        """Lets ``runs`` go on in these modes; returns in the modes of the caller."""
        mine = Modes.now()
        if mine == self:
            runs.switch()
            return
        with ExitStack() as stack:
            # Leaving inference mode restores the grad mode of before, so it is left before the rest is set again.
            stack.callback(mine.set)
            if mine.inference != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            self.set()
            runs.switch()


def run_rounds(
    blocks: Sequence[Callable[[Callable[[], None]], T]],
    flight: int | None = None,
    ended: Callable[[int, T], T] | None = None,
) -> list[T]:
    """Runs all ``blocks`` in rotation; each is given the function that hands over.

    Args:
        blocks: what is to run.
        flight: how many have begun and not ended at any time; the next begins when one ends. None: all.
        ended: is given a block's number and result, and returns what is kept of it.

    Returns their results, in order. Raises what the first failing block raises, after the others have been cancelled
    where they stood: their ``finally`` clauses run, and no error of those takes the first one's place.
    """
    hub, outside = greenlet.getcurrent(), Modes.now()
    left: Modes | None = None
    """In which modes the last block ended: those of a forward that had not been cut."""
    results: dict[int, T] = {}
    cancelled = False

    def hand_over() -> None:
        if cancelled:
            # A cancelled block that still hands over would be left suspended for ever.
            raise GreenletExit
        outside.switch(hub)

    def runner(index: int, block: Callable[[Callable[[], None]], T]) -> greenlet:
        def run() -> None:
            result = block(hand_over)
            results[index] = result if ended is None else ended(index, result)
            nonlocal left
            left = Modes.now()
            outside.set()

        runs = greenlet(run, hub)
        # A block's context variables are its own, as a thread's would be.
        runs.gr_context = contextvars.copy_context()
        return runs

    waiting = [runner(index, block) for index, block in enumerate(blocks)]
    rotation = waiting[:flight]
    del waiting[: len(rotation)]
    try:
        while rotation:
            for runs in list(rotation):
                runs.switch()
                if runs.dead:
                    rotation.remove(runs)
                    rotation += waiting[:1]
                    del waiting[:1]
    finally:
        cancelled = True
        for runs in rotation:
            if runs:  # has begun and not ended
                with suppress(BaseException):
                    runs.throw()
        (outside if rotation or left is None else left).set()
    return [results[index] for index in range(len(blocks))]
