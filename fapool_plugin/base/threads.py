"""CPU threads that the base leaves to local pool ranks while it uses them, and has back afterwards.

A forward says when it ends. Of a backward autograd's engine tells the end, but not if it fails: what such a one has
left lent is taken back when the next forward begins. Knows threads, and not what computes with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SharedThreads:
    """Lends once, however often it is asked.

    Args:
        left: how many of so many threads the base keeps, with so many pool ranks.
    """

    def __init__(self, left: Callable[[int, int], int]) -> None:
        self._left = left
        self._before: int | None = None
        self._in_backward = False

    def give(self, ranks: int) -> None:
        """Until :meth:`take_back`."""
        if self._before is None:
            self._before = torch.get_num_threads()
            torch.set_num_threads(self._left(self._before, ranks))

    def give_in_backward(self, ranks: int) -> None:
        """Until the backward that runs has ended."""
        if self._before is None:
            self.give(ranks)
            self._in_backward = True
            # As FSDP does; a function that torch documents does not exist.
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self.take_back)

    def take_back(self) -> None:
        """The base has all its threads. Harmless when repeated."""
        if self._before is not None:
            torch.set_num_threads(self._before)
        self._before, self._in_backward = None, False

    def after_a_failed_backward(self) -> None:
        """Takes back what a backward has lent that ended without saying so."""
        if self._in_backward and torch._C._current_graph_task_id() == -1:
            self.take_back()
