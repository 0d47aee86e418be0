"""Blocks in flight: several computations of one kind, one at a time, in strict rotation.

Each runs until it hands over; then the next one goes on where it handed over last. The order depends on nothing but
the number of blocks and how often each hands over: never on time, so ranks that communicate inside agree on it.

Greenlets of one thread, not threads: autograd's, autocast's, inference mode's and the device's state are the thread's
and so the same in all of them, and there is one OpenMP team. No context manager whose state is the thread's may be
entered before a hand-over and left after it, unless every block enters it alike. Knows no models and no attention.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import TypeVar

from greenlet import GreenletExit, greenlet

T = TypeVar("T")


def run_rounds(blocks: Sequence[Callable[[Callable[[], None]], T]]) -> list[T]:
    """Runs all ``blocks`` in rotation; each is given the function that hands over.

    Returns their results, in order. Raises what the first failing block raises, after the others have been cancelled
    where they stood: their ``finally`` clauses run, and no error of those takes the first one's place.
    """
    hub = greenlet.getcurrent()
    results: dict[int, T] = {}
    cancelled = False

    def hand_over() -> None:
        if cancelled:
            # A cancelled block that still hands over would be left suspended for ever.
            raise GreenletExit
        hub.switch()

    def runner(index: int, block: Callable[[Callable[[], None]], T]) -> greenlet:
        def run() -> None:
            results[index] = block(hand_over)

        runs = greenlet(run, hub)
        # A block's context variables are its own, as a thread's would be.
        runs.gr_context = contextvars.copy_context()
        return runs

    rotation = [runner(index, block) for index, block in enumerate(blocks)]
    try:
        while rotation:
            for runs in list(rotation):
                runs.switch()
                if runs.dead:
                    rotation.remove(runs)
    finally:
        cancelled = True
        for runs in rotation:
            if runs:  # has begun and not ended
                with suppress(BaseException):
                    runs.throw()
    return [results[index] for index in range(len(blocks))]


def block_edges(start: int, stop: int, blocks: int, multiple: int) -> list[tuple[int, int]]:
    """Cuts the positions [start, stop) into at most ``blocks`` runs of nearly equal length, their edges at multiples
    of ``multiple`` from ``start``."""
    if stop <= start or blocks < 1 or multiple < 1:
        raise ValueError(f"positions [{start}, {stop}) cannot be cut into {blocks} blocks of multiples of {multiple}")
    units = -(-(stop - start) // multiple)
    count = min(blocks, units)
    edges = [min(stop, start + (index * units // count) * multiple) for index in range(count)] + [stop]
    return list(pairwise(edges))
