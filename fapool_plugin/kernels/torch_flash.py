"""torch's own flash operators on one piece of a rectangle: every key is seen by every query, or a causal square.

On the CPU the operator works on one sequence, head and block of queries at a time, so a decode step gives it no
more to do at once than it has KV heads. Here the keys of few queries are cut until every thread has as much. Its
backward works on one sequence and head at a time, which are not cut. The module knows no other mask and no other
kernel; `kernels` and `kernel_backward` cut rectangles into such pieces. (The operators: Dao 2023, FlashAttention-2;
cutting keys: Dao, Haziza, Massa and Sizov 2023, Flash-Decoding.)
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

_ROW_BLOCK = 32  # rows of q that the CPU operator takes at a time, when they are few
_MORE_ROWS = (192, 768)  # from so many rows on it takes more at a time, and is faster
# No chunk has fewer keys: three blocks of the CPU operator. Shorter ones cost more to merge than they save.
_LEAST_KEYS = 1536
# A busiest thread within this factor of the shortest possible is good enough: more chunks are more to merge.
_NEARLY = 1.125


def flash_piece(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D] in q's dtype and lse [B, H, S] in fp32 (fp64), neither contiguous in general.

    Lengths are at least 1, last dimensions contiguous; `causal` needs S = T. On the CPU the last bits depend on
    `torch.get_num_threads()` where queries are few, since it decides how their keys are cut.
    """
    B, S, H, D = q_BSHD.shape
    T, K = k_BTKD.shape[1:3]
    rows, on_cpu = H // K * S, not q_BSHD.is_cuda
    k_BKTD, v_BKTD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
    as_rows = on_cpu and not causal and (rows <= _ROW_BLOCK or _steps(rows) > _steps(S))
    if S > 1 and not as_rows:
        out_BHSD, lse_BHS = _operator(on_cpu, softmax_scale)(q_BSHD.transpose(1, 2), k_BKTD, v_BKTD, 0.0, causal)
        return out_BHSD.transpose(1, 2), lse_BHS

    # With the queries of a group's heads as rows, their keys are read once.
    q_BSKGD = q_BSHD.view(B, S, K, H // K, D)
    q_BKRD = q_BSKGD[:, 0] if S == 1 else q_BSKGD.permute(0, 2, 3, 1, 4).reshape(B, K, rows, D)
    units = B * K * -(-rows // _ROW_BLOCK)
    chunks = chunk_count(units, torch.get_num_threads(), T // _LEAST_KEYS) if on_cpu else 1
    if chunks == 1:
        out_BKRD, lse_BKR = _operator(on_cpu, softmax_scale)(q_BKRD, k_BKTD, v_BKTD, 0.0, False)
    else:
        sequences = zip(q_BKRD.split(1), k_BKTD.split(1), v_BKTD.split(1), strict=True)
        parts = [_in_chunks(*one, softmax_scale, chunks) for one in sequences]
        out_BKRD, lse_BKR = parts[0] if B == 1 else map(torch.cat, zip(*parts, strict=True))
    if S == 1:
        return out_BKRD.reshape(B, 1, H, D), lse_BKR.reshape(B, H, 1)
    out_BSKGD = out_BKRD.view(B, K, H // K, S, D).permute(0, 3, 1, 2, 4)
    return out_BSKGD.reshape(B, S, H, D), lse_BKR.reshape(B, H, S)


def flash_piece_backward(
    dout_BSHD: Tensor,
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    out_BSHD: Tensor,
    lse_BHS: Tensor,
    softmax_scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one piece, (dq, dk, dv) in lse's dtype, given the finished rows' out and lse; strides are free.

    Asks of lengths, last dimensions and `causal` what `flash_piece` does; lse is fp32 (fp64). The CPU operator adds up
    a key's gradients in the dtype of the key, and in bf16 they would be off by percents: give it fp32.
    """
    dout, q, k, v, out = (x.transpose(1, 2) for x in (dout_BSHD, q_BSHD, k_BTKD, v_BTKD, out_BSHD))
    if q_BSHD.is_cuda:
        gradients = _flash_backward_on_cuda(dout, q, k, v, out, lse_BHS, causal, softmax_scale)
    else:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        gradients = backward(dout, q, k, v, out, lse_BHS, 0.0, causal, scale=softmax_scale)
    dq, dk, dv = (x.transpose(1, 2).to(lse_BHS.dtype) for x in gradients)
    return dq, dk, dv


def _steps(rows: int) -> int:
    return sum(rows >= more for more in _MORE_ROWS)


@lru_cache(maxsize=1024)
def chunk_count(units: int, threads: int, most: int) -> int:
    """Into how many equal chunks to cut the keys of `units` equal pieces of work, for `threads` that share them.

    Of the counts up to `most`, the least with which the busiest thread has, but for a few percent, the shortest
    possible time; 1 if cutting hardly helps. A thread takes whole chunks.
    """
    # Beyond one chunk of every unit for every thread nothing is gained.
    busiest = [-(-units * chunks // threads) / chunks for chunks in range(1, max(1, min(most, threads)) + 1)]
    return next(at + 1 for at, time in enumerate(busiest) if time <= min(busiest) * _NEARLY)


def _in_chunks(
    q_1KRD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, softmax_scale: float, chunks: int
) -> tuple[Tensor, Tensor]:
    """The CPU operator over equal chunks of one sequence's keys, which it takes for a batch; then merged.

    Chunks are views. What they leave over, fewer keys than there are chunks, is one more, small part.
    """
    flash = _operator(True, softmax_scale)
    K, T, D = k_1KTD.shape[1:]
    size, left = divmod(T, chunks)

    def cut(x_1KTD: Tensor) -> Tensor:
        _, head, position, _ = x_1KTD.stride()
        return x_1KTD.as_strided((chunks, K, size, D), (size * position, head, position, 1))

    outs_CKRD, lses_CKR = flash(q_1KRD.expand(chunks, -1, -1, -1), cut(k_1KTD), cut(v_1KTD), 0.0, False)
    if left:
        last = (x.narrow(2, T - left, left) for x in (k_1KTD, v_1KTD))
        parts = ((outs_CKRD, lses_CKR), flash(q_1KRD, *last, 0.0, False))
        outs_CKRD, lses_CKR = map(torch.cat, zip(*parts, strict=True))
    # No part is empty, so no lse is -inf and all parts are merged at once.
    lse_1KR = lses_CKR.logsumexp(0, keepdim=True)
    weights_CKR = (lses_CKR - lse_1KR).exp_()
    out_1KRD = (outs_CKRD * weights_CKR.unsqueeze(-1)).sum(0, keepdim=True)
    return out_1KRD.to(q_1KRD.dtype), lse_1KR


def _operator(on_cpu: bool, softmax_scale: float) -> partial[tuple[Tensor, Tensor]]:
    on_device = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else _flash_on_cuda
    return partial(on_device, scale=softmax_scale)


def _flash_on_cuda(
    q_BHSD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, dropout_p: float, causal: bool, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The CUDA operator, which wants as many KV heads as query heads. Untried on a GPU."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    B, H, K = q_BHSD.shape[0], q_BHSD.shape[1], k_BKTD.shape[1]
    if H == K:
        out_BHSD, lse_BHS, *_ = flash(q_BHSD, k_BKTD, v_BKTD, dropout_p, causal, scale=scale)
        return out_BHSD, lse_BHS
    # Each KV head becomes a batch entry that its group of query heads shares: expanding it costs no memory.
    q = q_BHSD.unflatten(1, (K, H // K)).flatten(0, 1)
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, H // K, -1, -1) for x in (k_BKTD, v_BKTD))
    out, lse, *_ = flash(q, k, v, dropout_p, causal, scale=scale)
    return out.unflatten(0, (B, K)).flatten(1, 2), lse.unflatten(0, (B, K)).flatten(1, 2)


def _flash_backward_on_cuda(
    dout_BHSD: Tensor,
    q_BHSD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    out_BHSD: Tensor,
    lse_BHS: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CUDA operator's backward, with KV heads as batch entries like in `_flash_on_cuda`. Untried on a GPU."""
    (B, H, S, _), (K, T) = q_BHSD.shape, k_BKTD.shape[1:3]
    dout, q, out, lse = (x.unflatten(1, (K, H // K)).flatten(0, 1) for x in (dout_BHSD, q_BHSD, out_BHSD, lse_BHS))
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, H // K, -1, -1) for x in (k_BKTD, v_BKTD))
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of dropout
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse.contiguous(), None, None, S, T, 0.0, causal, unused, unused, scale=scale
    )
    dk, dv = (x.sum(1, dtype=lse.dtype).unflatten(0, (B, K)) for x in (dk, dv))
    return dq.unflatten(0, (B, K)).flatten(1, 2), dk, dv
