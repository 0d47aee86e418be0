"""A dense fp64 reference for kernels: explicit mask matrix, repeated KV heads, a softmax written out.

It knows nothing of how a kernel cuts its work.
"""

import math

import torch
from torch import Tensor

from fapool_plugin.kernels.forward import attend

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def visible_ST(S, T, causal=False, q_offset=None, window_size=(-1, -1)) -> Tensor:
    """The mask as a matrix, straight from the words of the contract."""
    position = torch.arange(S)[:, None] + (T - S if q_offset is None else q_offset)
    key = torch.arange(T)
    left, right = window_size
    mask = torch.ones(S, T, dtype=torch.bool)
    if causal:
        mask &= key <= position
    if left != -1:
        mask &= key >= position - left
    if right != -1:
        mask &= key <= position + right
    return mask


def reference(q, k, v, mask_ST, softmax_scale, softcap=0.0, sinks_H=None) -> tuple[Tensor, Tensor]:
    """Attention in fp64 with every score in memory."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(mask_ST, scores.exp(), 0.0)  # test inputs are small: no maximum to take off
    total = weights.sum(-1)
    if sinks_H is not None:
        total = total + sinks_H.double().exp()[None, :, None]
    out = torch.einsum("bhst,bhte->bshe", weights, v)
    total_BSH1 = total.transpose(1, 2)[..., None]
    return torch.where(total_BSH1 > 0, out / total_BSH1, 0.0), total.log()


def assert_attention(got, expected, dtype, what="") -> None:
    """out and lse equal the reference, of the right shape and dtype, with no NaN and not all zero."""
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for name, ours, theirs, kind in zip(("out", "lse"), got, expected, (dtype, lse_dtype), strict=True):
        assert ours.shape == theirs.shape, f"{what} {name}: shape {ours.shape}, expected {theirs.shape}"
        assert ours.dtype == kind, f"{what} {name}: {ours.dtype}, expected {kind}"
        ours, theirs = ours.detach().cpu().double(), theirs.cpu().double()
        assert not ours.isnan().any(), f"{what} {name}: {int(ours.isnan().sum())} NaN"
        assert ours.any() or not theirs.any(), f"{what} {name}: all zero"
        empty = theirs == -math.inf
        assert torch.equal(ours == -math.inf, empty), f"{what} {name}: -inf in other places"
        difference = (ours - theirs).masked_fill(empty, 0.0).abs()
        largest = difference.max().item() if difference.numel() else 0.0
        assert largest <= TOLERANCE[dtype], f"{what} {name}: largest difference {largest:.3g}"
        if name == "out":
            unseen = (expected[1] == -math.inf).transpose(1, 2).cpu()
            assert not ours[unseen].any(), f"{what} out: not zero where a query sees no key"


def tensors(B, S, T, H, K, D, E=None, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(B, S, H, D), torch.randn(B, T, K, D), torch.randn(B, T, K, E or D)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def check(q, k, v, *, softcap=0.0, kernel=None, **mask) -> None:
    scale = 0.8 * q.shape[-1] ** -0.5
    expected = reference(q, k, v, visible_ST(q.shape[1], k.shape[1], **mask), scale, softcap)
    copies = [x.clone() for x in (q, k, v)]
    got = attend(q, k, v, softmax_scale=scale, softcap=softcap, kernel=kernel, **mask)
    assert all(map(torch.equal, copies, (q, k, v))), "an input was written to"
    assert_attention(got, expected, q.dtype, f"q {tuple(q.shape)} k {tuple(k.shape)} {mask} {kernel}")
