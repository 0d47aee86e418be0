"""Results of the same queries over different keys become one, by their LSE; sinks are counted in at the end."""

import torch
from torch import Tensor

from fapool_plugin.kernels.band import exact_dtype


def merge_(out_BSHE: Tensor, lse_BHS: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Merge attention over other keys into the accumulators, in place; they then cover both key sets.

    `out_BSHE` [B, S, H, E] and `lse_BHS` [B, H, S] are fp32 or fp64; the part has their shapes and any float
    dtype. A part whose lse is -inf weighs nothing (its out must be finite, as from `attend`); where both
    sides are empty so is the result. The online softmax (Milakov and Gimelshein 2018) for two finished parts:
    out -= w * (out - part_out) with w = sigmoid(part_lse - lse), and lse = logaddexp(lse, part_lse).

    Raises ValueError for shapes that differ or for accumulators of half precision.
    """
    if out_BSHE.shape != part_out.shape or lse_BHS.shape != part_lse.shape:
        raise ValueError(
            f"cannot merge a part of shapes {tuple(part_out.shape)}, {tuple(part_lse.shape)} into "
            f"{tuple(out_BSHE.shape)}, {tuple(lse_BHS.shape)}: cut both to the same queries and heads first"
        )
    if out_BSHE.dtype != exact_dtype(out_BSHE.dtype) or lse_BHS.dtype != exact_dtype(lse_BHS.dtype):
        raise ValueError(f"{out_BSHE.dtype}, {lse_BHS.dtype} accumulators round at each merge: use float32 or float64")
    part_lse = part_lse.to(lse_BHS.dtype)
    weight_BHS = (part_lse - _finite(lse_BHS)).sigmoid_()
    out_BSHE.lerp_(part_out.to(out_BSHE.dtype), _per_row(weight_BHS).to(out_BSHE.dtype))
    torch.logaddexp(lse_BHS, part_lse, out=lse_BHS)


def fold_sinks(out_BSHE: Tensor, lse_BHS: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Finished attention with one learned sink logit per query head [H] counted in its softmax: (out, lse).

    A sink takes weight and brings no value (Xiao et al. 2023; learned logits as in gpt-oss):
    lse' = logaddexp(lse, sink), out' = out * exp(lse - lse'). Fold sinks in once, after the last merge.
    A query that sees no key keeps out 0; its lse' is the sink alone. Dtypes stay as they were.

    Raises ValueError where there is not one sink per head.
    """
    if sinks_H.shape != lse_BHS.shape[1:2]:
        raise ValueError(f"sinks {tuple(sinks_H.shape)}, lse {tuple(lse_BHS.shape)}: give one sink per head")
    folded_BHS = torch.logaddexp(lse_BHS, sinks_H.to(lse_BHS.dtype)[None, :, None])
    weight_BHS = (lse_BHS - _finite(folded_BHS)).exp_()
    return (out_BSHE * _per_row(weight_BHS)).to(out_BSHE.dtype), folded_BHS


def _finite(lse_BHS: Tensor) -> Tensor:
    """What an LSE is taken from: where both are -inf their difference is to be that, and no NaN, which would come from
    a broken part only."""
    return lse_BHS.clamp(min=torch.finfo(lse_BHS.dtype).min)


def _per_row(weight_BHS: Tensor) -> Tensor:
    return weight_BHS.transpose(1, 2).unsqueeze(-1)
