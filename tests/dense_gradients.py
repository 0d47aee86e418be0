"""A dense fp64 reference for gradients: autograd through one softmax over every key, with the mask as a matrix.

It gives rectangles their output and LSE, too, so that no forward kernel plays a part. Errors are relative to the
largest gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.kernels.backward import attend_backward
from tests.dense_attention import visible_ST

# With exact inputs half precision is computed in fp32; what is lost comes with an output that was rounded.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SCALE = 0.3


class Whole:
    """Attention and all its gradients in fp64: one softmax over everything, a sink being one more score."""

    def __init__(self, q, k, v, mask_ST, *, softcap=0.0, sinks_H=None, dtype_out=None, expanded=False, scale=SCALE):
        self.q, self.k, self.v = q, k, v
        self.dout = torch.randn(*q.shape[:3], v.shape[3]).to(dtype_out or q.dtype)
        if expanded:  # as the gradient of a sum comes
            self.dout = self.dout[:1, :1, :1, :1].expand_as(self.dout)
        leaves = [x.detach().to(torch.float64, copy=True).requires_grad_() for x in (q, k, v)]
        q, k, v = (x.transpose(1, 2) for x in leaves)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q @ k.mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~mask_ST, -1e300)  # a row of nothing else is a finite softmax, dropped below
        last = torch.full((*scores.shape[:3], 1), -1e300, dtype=torch.float64)
        if sinks_H is not None:
            sinks = sinks_H.to(torch.float64, copy=True).requires_grad_()
            leaves.append(sinks)
            last = last + 1e300 + sinks[:, None, None]
        scores = torch.cat([scores, last], dim=-1)
        out_BHSE = torch.where(mask_ST, scores.softmax(-1)[..., :-1], 0.0) @ v
        lse = scores.detach().logsumexp(-1)
        exact = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        self.lse = lse.masked_fill(lse < -1e200, -math.inf).to(exact)
        self.out = out_BHSE.detach().transpose(1, 2).to(dtype_out or self.q.dtype)
        self.gradients = torch.autograd.grad(out_BHSE.transpose(1, 2), leaves, self.dout.double(), allow_unused=True)

    def backward(self, queries=slice(None), keys=slice(None), **arguments) -> tuple[Tensor, ...]:
        """The gradients of one rectangle, as we compute them."""
        q, k, v, lse = self.q[:, queries], self.k[:, keys], self.v[:, keys], self.lse[:, :, queries]
        inputs = self.dout[:, queries], q, k, v, self.out[:, queries], lse
        copies = [x.clone() for x in inputs]
        got = attend_backward(*inputs, **{"softmax_scale": SCALE, **arguments})
        written = [not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(copies, inputs, strict=True)]
        assert not any(written), f"inputs were written to: {written}"
        return got


def assert_gradients(got, expected, dtype, what: Any = "", tolerance=None) -> None:
    """Of the right shapes and dtype, without NaN, not all zero, and close relative to the largest of them."""
    scale = max((x.abs().max().item() for x in expected if x.numel()), default=0.0)
    for name, ours, theirs in zip(("dq", "dk", "dv"), got, expected, strict=True):
        assert ours.shape == theirs.shape, f"{what} {name}: shape {ours.shape}, expected {theirs.shape}"
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        assert ours.dtype == exact, f"{what} {name}: {ours.dtype}, expected {exact}"
        ours = ours.detach().cpu().double()
        assert ours.isfinite().all(), f"{what} {name}: {int((~ours.isfinite()).sum())} not finite"
        largest = (ours - theirs).abs().max().item() if ours.numel() else 0.0
        limit = (tolerance or TOLERANCE[dtype]) * scale
        assert largest <= limit, f"{what} {name}: largest difference {largest:.3g}, limit {limit:.3g}"
    if scale:
        assert any(x.any() for x in got), f"{what}: all zero"


def check(q, k, v, *, softcap=0.0, kernel=None, tolerance=None, **mask) -> None:
    whole = Whole(q, k, v, visible_ST(q.shape[1], k.shape[1], **mask), softcap=softcap)
    got = whole.backward(softcap=softcap, kernel=kernel, **mask)
    what = f"q {tuple(q.shape)} k {tuple(k.shape)} {mask} {kernel}"
    assert_gradients(got, whole.gradients, q.dtype, what, tolerance)
