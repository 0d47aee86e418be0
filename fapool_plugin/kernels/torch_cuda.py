"""torch's own operators for GPUs, which answer with (out, lse) and take both back for gradients. Untried on a GPU.

`aten._flash_attention_forward` (fp16 and bf16, head dim up to 256, as many KV heads as there are, windows) and
`aten._efficient_attention_forward` (fp32 too, any head dims, as many KV heads as query heads). Of what they do the
signatures say little; it was read in torch's sources, aten/src/ATen/native/transformers/cuda: attention.cu,
attention_backward.cu, flash_attn/flash_api.cpp and mem_eff_attention/kernel_{forward,backward}.h:

- Causal masks and windows of both count from the bottom-right diagonal (the second's: `custom_mask_type` 2).
- lse is natural, fp32, [B, H, S]. The second pads S to a multiple of 32, with +inf; its backward wants strides of 8.
- Lengths of its own for each sequence the first takes with `cum_seq_q` and `cum_seq_k` only, and without them does not
  look at `seqused_k`. With it, of `cum_seq_k` only where sequences begin counts, in any order and with gaps
  (`BlockInfo` in flash_attn/block_info.h); lse is then [H, sequences].
- For one query the first makes rows of a group's heads, and cuts the keys for the multiprocessors, by itself.
- Both backwards follow `torch.use_deterministic_algorithms`. The first sums a group's dk and dv rounded to half.
- The second's fp32 products are sums of three TF32 products (`OpMultiplyAddFastF32`), as exact as fp32.

(Dao 2023, FlashAttention-2; Rabe and Staats 2021, as xformers has it.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fapool_plugin.kernels.band import (
    MULTIPLE,
    Band,
    Given,
    Gradients,
    OutAndLse,
    Part,
    gradients_padded,
    gradients_part_by_part,
    one_head_dim,
    padded,
    part_by_part,
)

_FROM_BOTTOM_RIGHT = 2
_LSE_MULTIPLE = 32


def flash(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle, in one call of the flash operator unless queries reach past the last key."""

    def run(q: Tensor, k: Tensor, v: Tensor, part: Part) -> OutAndLse:
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, _causal(part), False, scale=softmax_scale, **_window(part)
        )
        return out, lse

    return padded(run, q_BSHD, k_BTKD, v_BTKE, band)


def flash_lanes(
    q_LGD: Tensor,
    k_N1D: Tensor,
    v_N1D: Tensor,
    q_begins: Tensor,
    k_begins: Tensor,
    lengths_L: Tensor,
    longest: int,
    softmax_scale: float,
) -> OutAndLse:
    """(out [L, G, D], lse [G, L]) of one query of each lane. Its keys are `lengths_L` of all, from `k_begins` on; both
    begins have L + 1 numbers, int32 on the device."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q_LGD, k_N1D, v_N1D, q_begins, k_begins, 1, longest, 0.0, False, False, scale=softmax_scale, seqused_k=lengths_L
    )
    return out, lse


def flash_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""

    def run(given: Given, part: Part) -> Gradients:
        S, T = given.q_BSHD.shape[1], given.k_BTKD.shape[1]
        unused = torch.empty(2, dtype=torch.uint64, device=given.q_BSHD.device)  # the state of dropout
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *given[:5], given.lse_BHS.contiguous(), None, None, S, T, 0.0, _causal(part), unused, unused,
            scale=softmax_scale, **_window(part),
        )  # fmt: skip
        return dq, dk, dv

    return gradients_padded(run, given, band)


def efficient(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle without a window on the left; values may have a head dim of their own."""
    B, K, E = v_BTKE.shape[0], *v_BTKE.shape[2:]

    def run(q: Tensor, k: Tensor, v: Tensor, part: Part) -> OutAndLse:
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, _mask(part), True, scale=softmax_scale
        )
        return out, lse[..., : q.shape[1]]

    q, k = one_head_dim(q_BSHD, k_BTKD, multiple=MULTIPLE)
    (v,) = one_head_dim(v_BTKE, multiple=MULTIPLE)
    group = q.shape[2] // K
    out, lse = part_by_part(run, _groups(q, K), _lanes(k, group), _lanes(v, group), band)
    return _heads(out, B)[..., :E], lse.unflatten(0, (B, K)).flatten(1, 2)


def efficient_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle without a window on the left, in the dtype of q."""
    (B, _, H, D), (K, E), dtype = given.q_BSHD.shape, given.v_BTKE.shape[2:], given.q_BSHD.dtype

    def run(given: Given, part: Part) -> Gradients:
        S, T = given.q_BSHD.shape[1], given.k_BTKD.shape[1]
        lse = F.pad(given.lse_BHS, (0, -S % _LSE_MULTIPLE), value=torch.inf).contiguous()
        unused = torch.empty((), dtype=torch.int64, device=lse.device)  # the state of dropout
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            *given[:4], None, given.out_BSHE.contiguous(), None, None, S, T, lse, 0.0, unused, unused, _mask(part),
            False, scale=softmax_scale,
        )  # fmt: skip
        return dq, dk.sum(2, keepdim=True), dv.sum(2, keepdim=True)

    q, k = one_head_dim(given.q_BSHD, given.k_BTKD, multiple=MULTIPLE)
    dout, v, out = one_head_dim(given.dout_BSHE.to(dtype), given.v_BTKE, given.out_BSHE.to(dtype), multiple=MULTIPLE)
    dout, q, out = (_groups(x, K) for x in (dout, q, out))
    k, v = (_lanes(x, H // K) for x in (k, v))
    lse = given.lse_BHS.unflatten(1, (K, H // K)).flatten(0, 1)
    dq, dk, dv = (_heads(x, B) for x in gradients_part_by_part(run, Given(dout, q, k, v, out, lse), band))
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _causal(part: Part) -> bool:
    return part.causal and part.left < 0


def _window(part: Part) -> dict[str, int]:
    return {} if part.left < 0 else dict(zip(("window_size_left", "window_size_right"), part.window, strict=True))


def _mask(part: Part) -> int:
    return _FROM_BOTTOM_RIGHT if part.causal else 0


def _groups(x_BSHD: Tensor, kv_heads: int) -> Tensor:
    """Each KV head's group of query heads as a batch entry, [B * K, S, G, D]: then its keys need not be repeated."""
    return x_BSHD.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1)


def _lanes(x_BTKD: Tensor, group: int) -> Tensor:
    """Each KV head as a batch entry that the heads of its group share, [B * K, T, G, D]: that takes no memory."""
    return x_BTKD.transpose(1, 2).flatten(0, 1).unsqueeze(2).expand(-1, -1, group, -1)


def _heads(x: Tensor, batch: int) -> Tensor:
    """[B * K, S, G, D] as [B, S, K * G, D]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
