"""torch's flash operators for CPUs: no window on the left, no softcap.

They are asked for causal squares and unmasked rectangles only: that they align a causal mask to the upper left has no
effect, since every query sees the first `offset` keys, and then a square begins. The operator works on one sequence,
head and block of queries at a time, so a decode step gives it no more to do at once than it has KV heads. Here the keys
of few queries are cut until every thread has as much. Its backward works on one sequence and head at a time, which are
not cut. (The operators: Dao 2023, FlashAttention-2; cutting keys: Dao, Haziza, Massa and Sizov 2023, Flash-Decoding.)
"""

from functools import lru_cache, partial

import torch
from torch import Tensor

from fapool_plugin.kernels.band import Band, Given, Gradients, OutAndLse, one_head_dim
from fapool_plugin.kernels.merge import merge_

_ROW_BLOCK = 32  # rows of q that the CPU operator takes at a time, when they are few
_MORE_ROWS = (192, 768)  # from so many rows on it takes more at a time, and is faster
# No chunk has fewer keys: three blocks of the CPU operator. Shorter ones cost more to merge than they save.
_LEAST_KEYS = 1536
# A busiest thread within this factor of the shortest possible is good enough: more chunks are more to merge.
_NEARLY = 1.125


def attend(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle."""
    S, T, E, offset = q_BSHD.shape[1], k_BTKD.shape[1], v_BTKE.shape[3], band.high
    q, k, v = one_head_dim(q_BSHD, k_BTKD, v_BTKE, multiple=1)
    if not band.hides_right(T):
        out, lse_BHS = flash_piece(q, k, v, softmax_scale, causal=False)
        return out if out.shape[3] == E else out[..., :E], lse_BHS

    side = T - offset
    out, lse_BHS = flash_piece(q[:, :side], k[:, offset:], v[:, offset:], softmax_scale, causal=True)
    if offset > 0:
        before = flash_piece(q[:, :side], k[:, :offset], v[:, :offset], softmax_scale, causal=False)
        total = out.to(lse_BHS.dtype)
        merge_(total, lse_BHS, *before)
        out = total.to(out.dtype)
    if side < S:  # queries past the last key see every key
        after_out, after_lse = flash_piece(q[:, side:], k, v, softmax_scale, causal=False)
        out, lse_BHS = torch.cat([out, after_out], dim=1), torch.cat([lse_BHS, after_lse], dim=2)
    return out[..., :E], lse_BHS


def attend_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in lse's dtype, from the pieces of forward.

    The operator adds up a key's gradients in the dtype of the key, and in bf16 they would be off by percents: it is
    given fp32.
    """
    _, q_BSHD, k_BTKD, v_BTKE, _, lse_BHS = given
    S, D, T, E, offset = *q_BSHD.shape[1::2], *v_BTKE.shape[1::2], band.high
    dout, q, k, v, out = one_head_dim(*(x.to(lse_BHS.dtype) for x in given[:5]), multiple=1)
    given = Given(dout, q, k, v, out, lse_BHS)

    def piece(queries: slice, keys: slice, causal: bool) -> Gradients:
        dq, dk, dv = flash_piece_backward(given.cut(queries, keys), softmax_scale, causal)
        return dq[..., :D], dk[..., :D], dv[..., :E]

    if not band.hides_right(T):
        return piece(slice(S), slice(T), causal=False)
    side = T - offset
    pieces = [(slice(0, side), slice(offset, T), True)]
    if offset > 0:
        pieces.append((slice(0, side), slice(0, offset), False))
    if side < S:  # queries past the last key see every key
        pieces.append((slice(side, S), slice(0, T), False))
    if len(pieces) == 1:
        return piece(*pieces[0])
    dq_BSHD, dk_BTKD, dv_BTKE = (x.new_zeros(x.shape, dtype=lse_BHS.dtype) for x in (q_BSHD, k_BTKD, v_BTKE))
    for queries, keys, causal in pieces:
        dq, dk, dv = piece(queries, keys, causal)
        dq_BSHD[:, queries] += dq
        dk_BTKD[:, keys] += dk
        dv_BTKE[:, keys] += dv
    return dq_BSHD, dk_BTKD, dv_BTKE


def flash_piece(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, softmax_scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """out [B, S, H, D] in q's dtype and lse [B, H, S] in fp32 (fp64), neither contiguous in general.

    Every query sees every key, or, if `causal`, which needs S = T, it is a causal square. Lengths are at least 1, last
    dimensions contiguous. The last bits depend on `torch.get_num_threads()` where queries are few, since it decides how
    their keys are cut.
    """
    B, S, H, D = q_BSHD.shape
    T, K = k_BTKD.shape[1:3]
    rows = H // K * S
    k_BKTD, v_BKTD = k_BTKD.transpose(1, 2), v_BTKD.transpose(1, 2)
    as_rows = not causal and (rows <= _ROW_BLOCK or _steps(rows) > _steps(S))
    if S > 1 and not as_rows:
        out_BHSD, lse_BHS = _operator(softmax_scale)(q_BSHD.transpose(1, 2), k_BKTD, v_BKTD, 0.0, causal)
        return out_BHSD.transpose(1, 2), lse_BHS

    # With the queries of a group's heads as rows, their keys are read once.
    if S == 1:
        q_BKRD = q_BSHD.view(B, K, H // K, D)
    else:
        q_BKRD = q_BSHD.view(B, S, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, rows, D)
    units = B * K * -(-rows // _ROW_BLOCK)
    chunks = chunk_count(units, torch.get_num_threads(), T // _LEAST_KEYS)
    if chunks == 1:
        out_BKRD, lse_BKR = _operator(softmax_scale)(q_BKRD, k_BKTD, v_BKTD, 0.0, False)
    else:
        sequences = zip(q_BKRD.split(1), k_BKTD.split(1), v_BKTD.split(1), strict=True)
        parts = [_in_chunks(*one, softmax_scale, chunks) for one in sequences]
        out_BKRD, lse_BKR = parts[0] if B == 1 else map(torch.cat, zip(*parts, strict=True))
    if S == 1:
        return out_BKRD.reshape(B, 1, H, D), lse_BKR.reshape(B, H, 1)
    out_BSKGD = out_BKRD.view(B, K, H // K, S, D).permute(0, 3, 1, 2, 4)
    return out_BSKGD.reshape(B, S, H, D), lse_BKR.reshape(B, H, S)


def flash_piece_backward(given: Given, softmax_scale: float, causal: bool) -> Gradients:
    """Gradients of one piece, (dq, dk, dv) in lse's dtype, given the finished rows' out and lse; strides are free.

    Asks of lengths, last dimensions and `causal` what `flash_piece` does; all is fp32 (fp64).
    """
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    heads_first = [x.transpose(1, 2) for x in given[:5]]
    dq, dk, dv = (x.transpose(1, 2) for x in operator(*heads_first, given.lse_BHS, 0.0, causal, scale=softmax_scale))
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
    flash = _operator(softmax_scale)
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


def _operator(softmax_scale: float) -> partial[tuple[Tensor, Tensor]]:
    return partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, scale=softmax_scale)
