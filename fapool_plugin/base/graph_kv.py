"""One layer's keys and values for blocks of a training row: stored once, and each block's view is a node of the graph.

Blocks after a block attend to its keys too, so their gradients come in parts. They are summed in one buffer, in the
precision of all sums of gradients, while backward goes from the last block to the first; each block takes what is its
own when all after it have added theirs. Knows tensors and autograd only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fapool_plugin.kernels.band import exact_dtype


class GraphKV:
    """Keys (B, K, T, D) and values (B, K, T, E) of blocks that are appended in order.

    Args:
        positions: T of all blocks together.
    """

    def __init__(self, positions: int) -> None:
        self.positions, self.length = positions, 0
        self._stored: tuple[Tensor, Tensor] | None = None
        self._sums = _Sums()
        self._ticket: Tensor | None = None

    def append(self, k_BKSD: Tensor, v_BKSE: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a block's; returns all keys and values so far, with gradients to every block's. Raises ValueError
        beyond the positions there are."""
        start, stop = self.length, self.length + k_BKSD.shape[2]
        if stop > self.positions:
            raise ValueError(f"blocks of {stop} positions do not fit the {self.positions} that were announced")
        if self._stored is None:
            k, v = (x.new_empty((*x.shape[:2], self.positions, x.shape[3])) for x in (k_BKSD, v_BKSE))
            self._stored = k, v
        # Earlier views are saved for backward. What they show does not change, and .data keeps autograd from seeing a
        # write to them, and views in what are nodes of their own.
        views = [stored[:, :, :stop].data for stored in self._stored]
        k, v, self._ticket = _Append.apply(self._sums, start, views, self._ticket, k_BKSD, v_BKSE)
        self.length = stop
        return k, v


class _Sums:
    """Gradients of one layer's keys and values, while backward is under way. The graph holds this, and no tensors."""

    def __init__(self) -> None:
        self._totals: list[Tensor | None] = [None, None]

    def take(self, start: int, *, last: bool, grads: tuple[Tensor | None, Tensor | None]) -> list[Tensor | None]:
        """Adds a block's gradients of all keys and values up to its own; returns those of its own, from ``start`` on.
        ``last``: no block after it has added any."""
        own: list[Tensor | None] = []
        for index, grad in enumerate(grads):
            total = None if last else self._totals[index]
            if total is None and grad is not None:
                total = grad.to(exact_dtype(grad.dtype), copy=True)
            elif total is not None and grad is not None:
                total += grad
            own.append(total[:, :, start:] if total is not None else None)
            # Blocks before this one need no more than what is theirs.
            self._totals[index] = total[:, :, :start] if total is not None and start else None
        return own


class _Append(torch.autograd.Function):
    """The ticket of a block goes to the next one, so that backward comes to the next one first."""

    @staticmethod
    def forward(
        ctx: Any, sums: _Sums, start: int, views: list[Tensor], ticket: Tensor | None, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.sums, ctx.start, ctx.first, ctx.dtypes = sums, start, ticket is None, (k.dtype, v.dtype)
        for view, new in zip(views, (k, v), strict=True):
            view[:, :, start:] = new
        return views[0], views[1], k.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dk: Tensor | None, dv: Tensor | None, dticket: Tensor | None
    ) -> tuple[None, None, None, Tensor | None, Tensor | None, Tensor | None]:
        own = ctx.sums.take(ctx.start, last=dticket is None, grads=(dk, dv))
        some = next((grad for grad in own if grad is not None), None)
        ticket = None if ctx.first or some is None else some.new_empty(0)
        own_k, own_v = (None if x is None else x.to(dtype) for x, dtype in zip(own, ctx.dtypes, strict=True))
        return None, None, None, ticket, own_k, own_v
