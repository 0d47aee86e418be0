"""The backward of attention, for one rectangle: the gradients that its queries and keys owe each other.

Given the output and LSE of the finished rows, which count every key wherever it was, a rectangle's gradients depend
on nothing outside it. So rectangles can be computed anywhere, and their gradients are summed: dq over the rectangles
that share a query, dk and dv over those that share a key. As FlashAttention-2 does it (Dao 2023, arXiv 2307.08691,
algorithm 2): with P = exp(scores - lse) and delta the sum over a row of dout * out,

    dv = P^T dout,  dS = P * (dout v^T - delta),  dq = scale * dS k,  dk = scale * dS^T q.

The module knows neither who sums nor autograd; kernels have the names, and are picked by the rules, of forward's.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.kernels.band import Band, exact_dtype, one_head_dim
from fapool_plugin.kernels.forward import dense_blocks, flash_attn_backward, job_of
from fapool_plugin.kernels.torch_flash import flash_piece_backward


def attend_backward(
    dout_BSHE: Tensor,
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKE: Tensor,
    out_BSHE: Tensor,
    lse_BHS: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    q_offset: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This rectangle's part of the gradients: dq [B, S, H, D], dk [B, T, K, D] and dv [B, T, K, E].

    `out_BSHE` and `lse_BHS` belong to the finished rows: merged over all keys, not only over these, and with sinks
    folded in if there are any. `dout_BSHE` is the gradient of that output. All else is as `kernels.attend` takes it.
    dout and out may be of another float dtype than q, k and v.

    The gradients are fp32 (fp64 for fp64 inputs), whatever the dtype of the inputs, so that sums of many are exact
    enough; their strides are free. Where forward is dense so is backward, and holds no more scores at a time. On CPU,
    half precision is computed in fp32, too. A query that sees no key of these has dq 0 and leaves dk and dv alone,
    and so does a query whose lse is -inf, if its dout and out are finite.

    Raises ValueError as `attend` does, and for dout, out or lse that do not go with q and v.
    """
    job = job_of(q_BSHD, k_BTKD, v_BTKE, causal, q_offset, window_size, softcap, kernel)
    (B, S, H, _), E, exact = q_BSHD.shape, v_BTKE.shape[3], exact_dtype(q_BSHD.dtype)
    if dout_BSHE.shape != (B, S, H, E) or out_BSHE.shape != (B, S, H, E) or lse_BHS.shape != (B, H, S):
        raise ValueError(
            f"dout {tuple(dout_BSHE.shape)}, out {tuple(out_BSHE.shape)}, lse {tuple(lse_BHS.shape)}: "
            f"dout and out must be {(B, S, H, E)}, lse {(B, H, S)}, for the queries of q and the head dim of v"
        )
    # Where the score is -inf as well, exp(-inf - lse) has to be 0; where it is not, the row is to be left out.
    lse_BHS = lse_BHS.to(exact).masked_fill(lse_BHS == -torch.inf, torch.inf)
    if job.whole:
        given = _Given(dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS)
        return _KERNELS[job.kernel](given, softmax_scale, job.band, softcap)

    gradients = tuple(x.new_zeros(x.shape, dtype=exact) for x in (q_BSHD, k_BTKD, v_BTKE))
    dq_BSHD, dk_BTKD, dv_BTKE = gradients
    if not job.empty:
        given = _Given(dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS).cut(job.queries, job.keys)
        parts = _KERNELS[job.kernel](given, softmax_scale, job.band, softcap)
        dq_BSHD[:, job.queries], dk_BTKD[:, job.keys], dv_BTKE[:, job.keys] = parts
    return dq_BSHD, dk_BTKD, dv_BTKE


def sinks_backward(dout_BSHE: Tensor, out_BSHE: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> Tensor:
    """The gradient [H] of sinks that `kernels.fold_sinks` folded in, in fp32 (fp64 for an lse of fp64).

    `out_BSHE` and `lse_BHS` are what it answered, `dout_BSHE` is the gradient of that output. A sink takes the weight
    exp(sink - lse) of each row and brings no value, so only delta of the formula above is left of dS: its gradient
    is -exp(sink - lse) * sum(dout * out), summed over batch and queries. Sinks of -inf have none.

    Raises ValueError for shapes that do not go together.
    """
    B, S, H, _ = out_BSHE.shape
    if dout_BSHE.shape != out_BSHE.shape or lse_BHS.shape != (B, H, S) or sinks_H.shape != (H,):
        raise ValueError(
            f"dout {tuple(dout_BSHE.shape)}, out {tuple(out_BSHE.shape)}, lse {tuple(lse_BHS.shape)}, sinks "
            f"{tuple(sinks_H.shape)}: give [B, S, H, E] twice, [B, H, S] and one sink per head"
        )
    exact = exact_dtype(lse_BHS.dtype)
    weights_BHS = (sinks_H.to(exact)[:, None] - lse_BHS.to(exact)).exp_().masked_fill_(lse_BHS == -torch.inf, 0.0)
    return -(weights_BHS * _delta(dout_BSHE, out_BSHE, exact).transpose(1, 2)).sum((0, 2))


class _Given(NamedTuple):
    """What gradients are computed from; an lse of +inf leaves its row out."""

    dout_BSHE: Tensor
    q_BSHD: Tensor
    k_BTKD: Tensor
    v_BTKE: Tensor
    out_BSHE: Tensor
    lse_BHS: Tensor

    def cut(self, queries: slice, keys: slice) -> "_Given":
        dout, q, k, v, out, lse = self
        return _Given(dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries], lse[:, :, queries])


_Gradients = tuple[Tensor, Tensor, Tensor]


def _flash_attn(given: _Given, softmax_scale: float, band: Band, softcap: float) -> _Gradients:
    """The flash-attn package. Untried on a GPU."""
    dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = given
    D, E, exact = q_BSHD.shape[3], v_BTKE.shape[3], lse_BHS.dtype
    half = q_BSHD.dtype
    dout, q, k, v, out = one_head_dim(dout_BSHE.to(half), q_BSHD, k_BTKD, v_BTKE, out_BSHE.to(half), multiple=8)
    dq, dk, dv = (torch.empty(x.shape, dtype=half, device=x.device) for x in (q, k, v))
    left, right = band.bottom_right_window(q.shape[1], k.shape[1])
    flash_attn_backward()(
        dout,
        q,
        k,
        v,
        out,
        lse_BHS.contiguous(),
        dq,
        dk,
        dv,
        dropout_p=0.0,
        softmax_scale=softmax_scale,
        causal=False,
        window_size_left=left,
        window_size_right=right,
        softcap=softcap,
        alibi_slopes=None,
        deterministic=False,
    )
    return dq[..., :D].to(exact), dk[..., :D].to(exact), dv[..., :E].to(exact)


def _torch_flash(given: _Given, softmax_scale: float, band: Band, softcap: float) -> _Gradients:
    """torch's own flash kernels on CPU and CUDA, given the unmasked rectangles and causal squares of forward."""
    _, q_BSHD, k_BTKD, v_BTKE, _, lse_BHS = given
    S, D, T, E, offset = *q_BSHD.shape[1::2], *v_BTKE.shape[1::2], band.high
    dtype, multiple = (q_BSHD.dtype, 8) if q_BSHD.is_cuda else (lse_BHS.dtype, 1)
    dout, q, k, v, out = one_head_dim(*(x.to(dtype) for x in given[:5]), multiple=multiple)
    given = _Given(dout, q, k, v, out, lse_BHS)

    def piece(queries: slice, keys: slice, causal: bool) -> _Gradients:
        dq, dk, dv = flash_piece_backward(*given.cut(queries, keys), softmax_scale, causal)
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


def _dense(given: _Given, softmax_scale: float, band: Band, softcap: float) -> _Gradients:
    """Plain gradients in blocks of queries, touching only the keys a block sees.

    Scores are fp32 or fp64. The slowest kernel, and the one that can do everything.
    """
    dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS = given
    (B, S, H, D), (T, K, E), exact = q_BSHD.shape, v_BTKE.shape[1:], lse_BHS.dtype
    G = H // K
    dq_BSHD = q_BSHD.new_empty(q_BSHD.shape, dtype=exact)
    dk_BKTD = k_BTKD.new_zeros(B, K, T, D, dtype=exact)
    dv_BKTE = v_BTKE.new_zeros(B, K, T, E, dtype=exact)

    def rows_of(x_BsHD: Tensor) -> Tensor:
        """A group's heads and queries as rows of one product [B, K, G * s, D], so K and V are never repeated."""
        return x_BsHD.unflatten(2, (K, G)).permute(0, 2, 3, 1, 4).to(exact).flatten(2, 3)

    arrays = 3 if softcap > 0 else 2  # of scores, that are held at once
    # Autocast would turn the products back into half precision.
    with torch.autocast(q_BSHD.device.type, enabled=False):
        for queries, keys in dense_blocks(S, T, band, B * H * arrays):
            s = queries.stop - queries.start
            q_BKRD, dout_BKRE = rows_of(q_BSHD[:, queries]), rows_of(dout_BSHE[:, queries])
            delta_BKR1 = rows_of(_delta(dout_BSHE[:, queries], out_BSHE[:, queries], exact).unsqueeze(-1))
            lse_BKR1 = lse_BHS[:, :, queries].reshape(B, K, G * s, 1)
            k_BKtD = k_BTKD[:, keys].transpose(1, 2).to(exact)
            v_BKtE = v_BTKE[:, keys].transpose(1, 2).to(exact)

            weights = (q_BKRD @ k_BKtD.mT).mul_(softmax_scale)
            if softcap > 0:
                slope = weights.div_(softcap).tanh_().square().neg_().add_(1.0)
                weights.mul_(softcap)
            hidden = band.hidden(queries, keys, q_BSHD.device)
            weights.unflatten(2, (G, s)).masked_fill_(hidden, -torch.inf)
            weights.sub_(lse_BKR1).exp_()
            dscores = (dout_BKRE @ v_BKtE.mT).sub_(delta_BKR1).mul_(weights)
            if softcap > 0:
                dscores.mul_(slope)

            dv_BKTE[:, :, keys] += weights.mT @ dout_BKRE
            dk_BKTD[:, :, keys] += (dscores.mT @ q_BKRD).mul_(softmax_scale)
            dq_BKRD = (dscores @ k_BKtD).mul_(softmax_scale)
            dq_BSHD[:, queries].unflatten(2, (K, G)).copy_(dq_BKRD.unflatten(2, (G, s)).permute(0, 3, 1, 2, 4))
    return dq_BSHD, dk_BKTD.transpose(1, 2), dv_BKTE.transpose(1, 2)


def _delta(dout_BSHE: Tensor, out_BSHE: Tensor, exact: torch.dtype) -> Tensor:
    """What a row's weights have in common: sum(dout * out), [B, S, H]."""
    return (dout_BSHE.to(exact) * out_BSHE.to(exact)).sum(-1)


_KERNELS: Mapping[str, Callable[[_Given, float, Band, float], _Gradients]] = MappingProxyType(
    {"flash_attn": _flash_attn, "torch_flash": _torch_flash, "dense": _dense}
)
