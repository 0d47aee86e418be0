"""Pooled attention as two nodes of autograd's graph: one asks, one waits; backwards the other way round.

So the order in which autograd runs backward, later nodes first, lets parts in flight overlap there as they did in
forward: while the pool computes one part's gradients the base goes on with the other part. It knows calls by what
they can do, and no plan.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fapool_plugin.base.forward import Forward
from fapool_plugin.base.gradients import Gradients, Saved, Shares
from fapool_plugin.kernels.backward import sinks_backward


class Call(Protocol):
    """One attention call of one layer."""

    decided: Forward
    q: Tensor
    k: Tensor
    v: Tensor

    def post(self) -> None:
        """Asks for what others compute, and computes the base's part."""

    def finish(self, sinks_H: Tensor | None) -> tuple[Tensor, Tensor]:
        """Waits; (out, lse), final."""

    def shares(self) -> Shares:
        """Who computed what, and keeps it; after :meth:`finish`."""


def with_gradients(call: Call, sinks_H: Tensor | None) -> Tensor:
    """Attention (B, S, H, E) of a call, with gradients to its q, k, v and to sinks. Second derivatives are refused
    (RuntimeError)."""
    link = _Link()
    ticket: Tensor = _Post.apply(call, link, call.q, call.k, call.v)
    if call.decided.hand_over is not None:
        call.decided.hand_over()
    out: Tensor = _Wait.apply(call, link, ticket, sinks_H)
    return out


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast chooses what attention computes in, not how its kernels do it."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@dataclass
class _Link:
    """What the two nodes of one call leave for each other, and for their backward."""

    shares: Shares | None = None
    gradients: Gradients | None = None


class _Post(torch.autograd.Function):
    """Asks for attention; backwards it waits for the gradients."""

    @staticmethod
    def forward(ctx: Any, call: Call, link: _Link, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.link = link
        with without_autocast(q):
            call.post()
        return q.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.link.gradients = ctx.link.gradients, None
        with without_autocast(gradients.dq_BHSD):
            return None, None, *gradients.wait()


class _Wait(torch.autograd.Function):
    """Waits for attention; backwards it asks for the gradients."""

    @staticmethod
    def forward(ctx: Any, call: Call, link: _Link, ticket: Tensor, sinks_H: Tensor | None) -> Tensor:
        ctx.link = link
        with without_autocast(call.q):
            out, lse = call.finish(sinks_H)
        link.shares = call.shares()
        ctx.save_for_backward(call.q, call.k, call.v, out, lse, sinks_H)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks_H = ctx.saved_tensors
        ctx.link.gradients = gradients = Gradients(ctx.link.shares, Saved(q, k, v, out, lse, sinks_H is not None), dout)
        with without_autocast(q):
            gradients.post()
        dsinks = None if sinks_H is None else sinks_backward(dout, out, lse, sinks_H)
        return None, None, dout.new_empty(0), dsinks
