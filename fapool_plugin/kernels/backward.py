"""The backward of attention, for one rectangle: the gradients that its queries and keys owe each other.

Given the output and LSE of the finished rows, which count every key wherever it was, a rectangle's gradients depend
on nothing outside it. So rectangles can be computed anywhere, and their gradients are summed: dq over the rectangles
that share a query, dk and dv over those that share a key. As FlashAttention-2 does it (Dao 2023, arXiv 2307.08691,
algorithm 2): with P = exp(scores - lse) and delta the sum over a row of dout * out,

    dv = P^T dout,  dS = P * (dout v^T - delta),  dq = scale * dS k,  dk = scale * dS^T q.

The module knows neither who sums nor autograd; kernels have the names, and are picked by the rules, of forward's.
"""

import torch
from torch import Tensor

from fapool_plugin.kernels.band import Given, exact_dtype
from fapool_plugin.kernels.dense import delta
from fapool_plugin.kernels.forward import job_of


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
    enough; but where an operator for GPUs has rounded them to half precision they stay that: add them to fp32. Their
    strides are free. A dense backward holds no more scores at a time than forward. On CPU, half precision is computed
    in fp32, too. A query that sees no key of these has dq 0 and leaves dk and dv alone,
    and so does a query whose lse is -inf, if its dout and out are finite.

    Raises ValueError as `attend` does, and for dout, out or lse that do not go with q and v.
    """
    job = job_of(q_BSHD, k_BTKD, v_BTKE, causal, q_offset, window_size, softcap, kernel, backward=True)
    (B, S, H, _), E, exact = q_BSHD.shape, v_BTKE.shape[3], exact_dtype(q_BSHD.dtype)
    if dout_BSHE.shape != (B, S, H, E) or out_BSHE.shape != (B, S, H, E) or lse_BHS.shape != (B, H, S):
        raise ValueError(
            f"dout {tuple(dout_BSHE.shape)}, out {tuple(out_BSHE.shape)}, lse {tuple(lse_BHS.shape)}: "
            f"dout and out must be {(B, S, H, E)}, lse {(B, H, S)}, for the queries of q and the head dim of v"
        )
    # Where the score is -inf as well, exp(-inf - lse) has to be 0; where it is not, the row is to be left out.
    lse_BHS = lse_BHS.to(exact).masked_fill(lse_BHS == -torch.inf, torch.inf)
    given = Given(dout_BSHE, q_BSHD, k_BTKD, v_BTKE, out_BSHE, lse_BHS)
    if job.whole:
        return job.operator.attend_backward(given, softmax_scale, job.band, softcap)
    parts = (
        ()
        if job.empty
        else job.operator.attend_backward(given.cut(job.queries, job.keys), softmax_scale, job.band, softcap)
    )
    dtype = parts[0].dtype if parts else exact
    dq_BSHD, dk_BTKD, dv_BTKE = (x.new_zeros(x.shape, dtype=dtype) for x in (q_BSHD, k_BTKD, v_BTKE))
    if parts:
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
    return -(weights_BHS * delta(dout_BSHE, out_BSHE, exact).transpose(1, 2)).sum((0, 2))
