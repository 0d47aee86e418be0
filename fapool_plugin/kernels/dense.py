"""Plain attention and its gradients, in blocks of queries: the slowest kernel, and the one that can do everything.

Scores are fp32 or fp64, and only those of one block at a time exist (Rabe and Staats 2021). On a GPU blocks are larger:
small ones would wait for their launches. Untried on a GPU.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fapool_plugin.kernels.band import Band, Given, Gradients, OutAndLse, exact_dtype

_ROWS = 256  # queries in one block of scores, at most
_SCORES = 1 << 22  # scores in one such block: 16 MiB in fp32
_MORE_ON_CUDA = 16  # times as many of both


def _blocks(S: int, T: int, band: Band, heads: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Queries of one block and the keys they see, block after block.

    `heads` query heads of all sequences together are computed at a time. Their scores in one block are no more than
    `_SCORES`, or `_MORE_ON_CUDA` times that, unless one query alone has more.
    """
    more = _MORE_ON_CUDA if device.type == "cuda" else 1
    rows, scores = _ROWS * more, _SCORES * more
    widest = min(T, band.high - band.low + rows)
    step = max(1, min(rows, scores // (heads * widest)))
    for start in range(0, S, step):
        stop = min(S, start + step)
        yield slice(start, stop), slice(max(0, start + band.low), min(T, stop + band.high))


def attend(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle, touching only the keys a block sees."""
    B, S, H, _ = q_BSHD.shape
    T, K, E = v_BTKE.shape[1:]
    G, exact = H // K, exact_dtype(q_BSHD.dtype)
    out_BSHE = q_BSHD.new_empty(B, S, H, E)
    lse_BHS = q_BSHD.new_empty(B, H, S, dtype=exact)
    # Autocast would turn the products back into half precision.
    with torch.autocast(q_BSHD.device.type, enabled=False):
        for queries, keys in _blocks(S, T, band, B * H, q_BSHD.device):
            rows = queries.stop - queries.start
            q_BKGsD = q_BSHD[:, queries].unflatten(2, (K, G)).permute(0, 2, 3, 1, 4).to(exact)
            k_BKDt = k_BTKD[:, keys].permute(0, 2, 3, 1).to(exact)
            v_BKtE = v_BTKE[:, keys].transpose(1, 2).to(exact)

            # A group's heads and queries are rows of one product, so K and V are never repeated.
            scores = (q_BKGsD.flatten(2, 3) @ k_BKDt).mul_(softmax_scale)
            if softcap > 0:
                scores.div_(softcap).tanh_().mul_(softcap)
            scores.unflatten(2, (G, rows)).masked_fill_(band.hidden(queries, keys, q_BSHD.device), -torch.inf)
            lse = scores.logsumexp(dim=-1)
            out = scores.sub_(lse[..., None]).exp_() @ v_BKtE

            out_BsKGE = out.unflatten(2, (G, rows)).permute(0, 3, 1, 2, 4)
            out_BSHE[:, queries].unflatten(2, (K, G)).copy_(out_BsKGE)
            lse_BHS[:, :, queries] = lse.view(B, H, rows)
    return out_BSHE, lse_BHS


def attend_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in lse's dtype, touching only the keys a block sees."""
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
        for queries, keys in _blocks(S, T, band, B * H * arrays, q_BSHD.device):
            s = queries.stop - queries.start
            q_BKRD, dout_BKRE = rows_of(q_BSHD[:, queries]), rows_of(dout_BSHE[:, queries])
            delta_BKR1 = rows_of(delta(dout_BSHE[:, queries], out_BSHE[:, queries], exact).unsqueeze(-1))
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


def delta(dout_BSHE: Tensor, out_BSHE: Tensor, exact: torch.dtype) -> Tensor:
    """What a row's weights have in common: sum(dout * out), [B, S, H]."""
    return (dout_BSHE.to(exact) * out_BSHE.to(exact)).sum(-1)
