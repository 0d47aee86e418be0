"""What operators for GPUs answer, computed on the CPU in fp64 from the words of their documentation and sources.

Each has its original's signature, refuses what that one refuses, and has its quirks: masks count from the bottom-right
diagonal, and flash-attn 2 takes a window's side as wide as the keys for no limit. None has met its original: what these
cannot show is whether the original does as it was read.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.dense_attention import reference


class Calls(list):
    """(operator, T of its keys), call after call."""


def aten(calls: Calls) -> SimpleNamespace:
    """In place of ``torch.ops.aten``."""

    def flash(q, k, v, cum_q, cum_k, max_q, max_k, dropout, causal, debug, *, scale, seqused_k=None, **window):
        assert (dropout, debug) == (0.0, False)
        if cum_q is not None:
            calls.append(("flash lanes", max_k))
            assert not causal
            assert not window
            return *_lanes(q, k, v, cum_q, cum_k, max_q, max_k, seqused_k, scale), None, None, None
        # Without `cum_seq_q` seqused_k is not looked at.
        calls.append(("flash", k.shape[1]))
        assert (cum_k, max_q, max_k) == (None, q.shape[1], k.shape[1])
        _one_dim(q, k, v)
        return *_attended(q, k, v, _mask(q, k, causal, *_aten_window(window)), scale), None, None, None

    def flash_backward(
        dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, rng, unused, *, scale, **window
    ):
        calls.append(("flash backward", k.shape[1]))
        assert (cum_q, cum_k, max_q, max_k, dropout) == (None, None, q.shape[1], k.shape[1], 0.0)
        assert rng.dtype == torch.uint64
        assert lse.is_contiguous()
        _one_dim(q, k, v, dout, out)
        return _gradients(dout, q, k, v, out, lse, _mask(q, k, causal, *_aten_window(window)), scale)

    def efficient(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, wants_lse, *, scale):
        calls.append(("efficient", k.shape[1]))
        assert (bias, cu_q, cu_k, max_q, max_k, dropout, wants_lse) == (None,) * 5 + (0.0, True)
        assert q.shape[2] == k.shape[2] == v.shape[2], "as many KV heads as query heads"
        _aligned(q, k, v)
        out, lse = _attended(q, k, v, _typed_mask(q, k, mask_type), scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % 32), value=math.inf), None, None, 0, 0

    def efficient_backward(
        dout, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, mask_type, bias_grad, *, scale
    ):  # fmt: skip
        calls.append(("efficient backward", k.shape[1]))
        assert (bias, cu_q, cu_k, max_q, max_k) == (None, None, None, q.shape[1], k.shape[1])
        assert not bias_grad
        assert seed.dtype == torch.int64
        assert out.is_contiguous(), "its kernel knows two strides of out"
        assert lse.stride(0) % 8 == lse.stride(1) % 8 == 0
        assert torch.isinf(lse[:, :, q.shape[1] :]).all()
        _aligned(q, k, v, dout)
        lse = lse[:, :, : q.shape[1]]
        return *_gradients(dout, q, k, v, out, lse, _typed_mask(q, k, mask_type), scale), None

    return SimpleNamespace(
        _flash_attention_forward=flash, _flash_attention_backward=flash_backward,
        _efficient_attention_forward=efficient, _efficient_attention_backward=efficient_backward,
    )  # fmt: skip


def flash_2(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert return_attn_probs
    _one_dim(q, k, v)
    return *_attended(q, k, v, _mask(q, k, causal, *window_size), softmax_scale, softcap), None


def flash_2_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
    softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert alibi_slopes is None
    assert softmax_lse.is_contiguous()
    assert not deterministic
    _one_dim(dout, q, k, v, out, dq, dk, dv)
    mask = _mask(q, k, causal, window_size_left, window_size_right)
    for room, x in zip(
        (dq, dk, dv), _gradients(dout, q, k, v, out, softmax_lse, mask, softmax_scale, softcap), strict=True
    ):
        room.copy_(x)


def flash_3(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    _one_dim(q, k, v)
    found = _attended(q, k, v, _mask(q, k, causal, *window_size), softmax_scale, softcap)
    return found if return_attn_probs else found[0]


def flash_3_of_old(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, num_splits=1):
    """Before it could leave out the LSE."""
    return flash_3(q, k, v, softmax_scale, causal, window_size=window_size, softcap=softcap, return_attn_probs=True)


def flash_3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
    max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
    window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
):  # fmt: skip
    flash_2_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, 0.0, softmax_scale, is_causal, window_size_left, window_size_right,
        softcap, None, deterministic,
    )  # fmt: skip


def flash_4(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, return_lse=False):
    _aligned(q, k, v)
    found = _attended(q, k, v, _mask(q, k, causal, *_closed(*window_size)), softmax_scale, softcap)
    return found if return_lse else (found[0], None)


def flash_4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, deterministic=False,
):  # fmt: skip
    _aligned(q, k, v, dout, out)
    mask = _mask(q, k, causal, *_closed(window_size_left, window_size_right))
    return _gradients(dout, q, k, v, out, lse, mask, softmax_scale, softcap)


PACKAGES = {
    ("flash_attn", "flash_attn_func"): flash_2,
    ("flash_attn.flash_attn_interface", "_flash_attn_backward"): flash_2_backward,
    ("flash_attn_interface", "flash_attn_func"): flash_3,
    ("flash_attn_interface", "_flash_attn_backward"): flash_3_backward,
    ("flash_attn.cute", "flash_attn_func"): flash_4,
    ("flash_attn.cute.interface", "_flash_attn_bwd"): flash_4_backward,
}


def _lanes(q, k, v, begins, k_begins, max_q, max_k, lengths, scale) -> tuple[Tensor, Tensor]:
    """One query of each sequence; of the keys' begins only where sequences begin counts."""
    (L, H, _), (positions, K, _) = q.shape, k.shape
    for told, count in ((begins, L + 1), (k_begins, L + 1), (lengths, L)):
        assert (told.dtype, tuple(told.shape), told.device) == (torch.int32, (count,), q.device)
        assert told.is_contiguous()
    assert H % K == 0
    assert begins.tolist() == list(range(L + 1))
    assert (max_q, max_k) == (1, int(lengths.max()))
    _one_dim(q, k, v)
    out, lse = torch.empty_like(q), torch.empty(H, L, dtype=torch.float64)
    for lane, (begin, length) in enumerate(zip(k_begins.tolist(), lengths.tolist(), strict=False)):
        assert 0 <= begin < begin + length <= positions
        keys = slice(begin, begin + length)
        one = q[None, lane : lane + 1], k[None, keys], v[None, keys]
        (out[lane],), part = (x[0] for x in reference(*one, torch.ones(1, length, dtype=torch.bool), scale))
        lse[:, lane] = part[:, 0]
    return out, lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _aten_window(window: dict[str, int]) -> tuple[int, int]:
    assert window.keys() in (set(), {"window_size_left", "window_size_right"})
    return window.get("window_size_left", -1), window.get("window_size_right", -1)


def _closed(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _typed_mask(q: Tensor, k: Tensor, mask_type: int) -> Tensor:
    assert mask_type in (0, 2), "1 counts from the upper left"
    assert not mask_type or q.shape[1] <= k.shape[1], "the diagonal's offset has no sign"
    return _mask(q, k, mask_type == 2, -1, -1)


def _mask(q: Tensor, k: Tensor, causal: bool, left: int, right: int) -> Tensor:
    S, T = q.shape[1], k.shape[1]
    left, right = -1 if left >= T else left, -1 if right >= T else right
    if causal:
        right = 0
    i, j = torch.arange(S)[:, None] + T - S, torch.arange(T)
    mask = torch.ones(S, T, dtype=torch.bool)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    assert mask.any(1).all(), "a row without keys: operators differ there"
    return mask


def _one_dim(*tensors: Tensor) -> None:
    assert len({x.shape[-1] for x in tensors}) == 1
    _aligned(*tensors)


def _aligned(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.shape[-1] % 8 == 0
        assert x.stride(-1) == 1
        strides = x.storage_offset(), *x.stride()[:-1]
        assert not any(at % 8 for at in strides), f"offset and strides {strides}"


def _attended(q, k, v, mask_ST, scale, softcap=0.0) -> tuple[Tensor, Tensor]:
    out, lse = reference(q, k, v, mask_ST, scale, softcap)
    return out.to(q.dtype), lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def _gradients(dout, q, k, v, out, lse, mask_ST, scale, softcap=0.0) -> tuple[Tensor, Tensor, Tensor]:
    """With the LSE that is given, as the operators do it, and not with that of these keys."""
    leaves = [x.double() for x in (q, k, v)]
    group = q.shape[2] // k.shape[2]
    q_, k_, v_ = (x.transpose(1, 2) for x in leaves)
    k_, v_ = (x.repeat_interleave(group, 1) for x in (k_, v_))
    scores = q_ @ k_.mT * scale
    slope = torch.ones_like(scores)
    if softcap:
        slope, scores = 1 - torch.tanh(scores / softcap) ** 2, softcap * torch.tanh(scores / softcap)
    weights = torch.where(mask_ST, (scores - lse.double()[..., None]).exp(), 0.0)
    dout_ = dout.double().transpose(1, 2)
    delta = (dout_ * out.double().transpose(1, 2)).sum(-1, keepdim=True)
    dscores = weights * (dout_ @ v_.mT - delta) * slope * scale
    sums = [x.unflatten(1, (-1, group)).sum(2).transpose(1, 2) for x in (dscores.mT @ q_, weights.mT @ dout_)]
    dq, dk, dv = ((dscores @ k_).transpose(1, 2), *sums)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
