"""Exact attention of one rectangle: queries against keys and values, answered as (out, lse).

Because the log-sum-exp comes along, rectangles that share queries can be computed anywhere and merged into
the attention of their union. Which kernel runs where is decided here, for `kernel_backward` too. The module knows
no model, no cache and no transport, and keeps nothing for a backward pass: callers detach.

Before a kernel runs, the rectangle is trimmed to the queries that see a key and the keys that are seen. So no
kernel ever meets an empty or fully masked row, where they answer differently or crash.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fapool_plugin.kernels.band import Band, exact_dtype, one_head_dim
from fapool_plugin.kernels.torch_flash import flash_piece

_DENSE_ROWS = 256  # queries in one score block of the dense kernel, at most
_DENSE_SCORES = 1 << 22  # scores in one such block: 16 MiB in fp32


def attend(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKE: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    q_offset: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries [B, S, H, D] to keys [B, T, K, D] and values [B, T, K, E]; H is a multiple of K.

    Query head h uses KV head h // (H // K). `q_offset`, any integer, is the position of query 0 relative to
    key 0; the default T - S aligns bottom-right. With p = i + q_offset, query i sees key j if j <= p (when
    `causal`) and p - left <= j <= p + right for `window_size` (left, right); -1 sets no limit on that side.
    `softcap` > 0 turns each scaled score s into softcap * tanh(s / softcap). `kernel` forces a named kernel.

    Returns out [B, S, H, E] in q's dtype with free strides, and lse [B, H, S], natural log, in fp32 (fp64 for
    fp64 inputs). A query that sees no key has out 0 and lse -inf.

    Raises ValueError for shapes, dtypes or devices that do not fit together, and for a kernel that is
    unknown, unavailable, or unable to do what is asked.
    """
    job = job_of(q_BSHD, k_BTKD, v_BTKE, causal, q_offset, window_size, softcap, kernel)
    if job.whole:
        out_BSHE, lse_BHS = _KERNELS[job.kernel].run(q_BSHD, k_BTKD, v_BTKE, softmax_scale, job.band, softcap)
        return out_BSHE, lse_BHS.contiguous()

    B, S, H, _ = q_BSHD.shape
    out_BSHE = q_BSHD.new_zeros(B, S, H, v_BTKE.shape[3])
    lse_BHS = q_BSHD.new_full((B, H, S), -torch.inf, dtype=exact_dtype(q_BSHD.dtype))
    if not job.empty:
        q, k, v = q_BSHD[:, job.queries], k_BTKD[:, job.keys], v_BTKE[:, job.keys]
        part = _KERNELS[job.kernel].run(q, k, v, softmax_scale, job.band, softcap)
        out_BSHE[:, job.queries], lse_BHS[:, :, job.queries] = part
    return out_BSHE, lse_BHS


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
    # Two empty sides give -inf - -inf, so the weight of an empty part is set rather than computed.
    weight_BHS = torch.sigmoid(part_lse - lse_BHS).masked_fill_(part_lse == -torch.inf, 0.0)
    out_BSHE.lerp_(part_out.to(out_BSHE.dtype), _per_row(weight_BHS).to(out_BSHE.dtype))
    lse_BHS.copy_(torch.logaddexp(lse_BHS, part_lse))


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
    weight_BHS = torch.exp(lse_BHS - folded_BHS).masked_fill_(lse_BHS == -torch.inf, 0.0)
    return (out_BSHE * _per_row(weight_BHS)).to(out_BSHE.dtype), folded_BHS


def available_kernels(device_type: str, dtype: torch.dtype, head_dim: int = 64) -> tuple[str, ...]:
    """Names of the kernels that run here for this device type, dtype and head dim (the larger of D and E).

    Best first: "flash_attn" (CUDA, if installed), "torch_flash" (torch's own, CPU and CUDA), "dense" (all).
    """
    return tuple(name for name, kernel in _KERNELS.items() if kernel.fits(device_type, dtype, head_dim))


def pick_kernel(
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    *,
    left_window: bool = False,
    softcap: bool = False,
    kernel: str | None = None,
) -> str:
    """The best available kernel that can hide keys on the left and cap scores as asked; or `kernel`.

    Raises ValueError if `kernel` is unknown, unavailable for this device, dtype and head dim, or unable.
    """
    available = available_kernels(device_type, dtype, head_dim)
    able = [
        name for name in available if _KERNELS[name].left_window >= left_window and _KERNELS[name].softcap >= softcap
    ]
    if kernel is None:
        return able[0]
    if kernel not in available:
        why = f"does not run on {device_type} with {dtype} and head dim {head_dim}"
        raise ValueError(
            f'kernel "{kernel}" {why if kernel in _KERNELS else "is unknown"}; use {" or ".join(available)}'
        )
    if kernel not in able:
        asked = " and ".join(["a window's left side"] * left_window + ["softcap"] * softcap)
        raise ValueError(f'kernel "{kernel}" cannot do {asked}; leave it out or use {" or ".join(able)}')
    return kernel


class Job(NamedTuple):
    """The trimmed rectangle of one call, its band, and the kernel that computes it."""

    kernel: str
    queries: slice
    keys: slice
    band: Band
    whole: bool  # nothing was trimmed
    empty: bool  # nothing is left


def job_of(
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKE: Tensor,
    causal: bool,
    q_offset: int | None,
    window_size: tuple[int, int],
    softcap: float,
    kernel: str | None,
) -> Job:
    """What to compute of one call, forward or backward, and by which kernel. Raises ValueError as `attend` does."""
    dtype, device = q_BSHD.dtype, q_BSHD.device
    if not (dtype == k_BTKD.dtype == v_BTKE.dtype and dtype.is_floating_point):
        raise ValueError(f"dtypes {dtype}, {k_BTKD.dtype}, {v_BTKE.dtype}: convert q, k and v to one float dtype")
    if not device == k_BTKD.device == v_BTKE.device:
        raise ValueError(f"devices {device}, {k_BTKD.device}, {v_BTKE.device}: move q, k and v to one device")
    shapes = q_BSHD.shape, k_BTKD.shape, v_BTKE.shape
    return _prepare(*shapes, dtype, device.type, causal, q_offset, window_size, softcap, kernel)


@lru_cache(maxsize=256)
def _prepare(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    dtype: torch.dtype,
    device_type: str,
    causal: bool,
    q_offset: int | None,
    window_size: tuple[int, int],
    softcap: float,
    kernel: str | None,
) -> Job:
    """What follows from shapes and arguments alone. Kept, because all layers of a forward ask for the same.

    Raises ValueError as `attend` does.
    """
    shapes = f"q {tuple(q)}, k {tuple(k)}, v {tuple(v)}"
    if not len(q) == len(k) == len(v) == 4:
        raise ValueError(f"{shapes}: give four dimensions each, [batch, length, heads, head dim]")
    (B, S, H, D), (_, T, K, _) = q, k
    if k[0] != B or k[:3] != v[:3] or k[3] != D:
        raise ValueError(f"{shapes}: q is [B, S, H, D], k [B, T, K, D], v [B, T, K, E] with B, T, K and D in common")
    if H == 0 or K == 0 or H % K:
        raise ValueError(f"{shapes}: {H} query heads cannot share {K} KV heads; H must be a multiple of K")
    if min(window_size) < -1:
        raise ValueError(f"window_size {window_size}: use -1 for no limit, else 0 or more")
    if not softcap >= 0:
        raise ValueError(f"softcap {softcap}: use 0 for none, else a positive number")
    offset = T - S if q_offset is None else q_offset
    queries, keys, band = Band.of(S, T, offset, causal, window_size).trim(S, T)
    rows, columns = queries.stop - queries.start, keys.stop - keys.start
    empty = min(B, rows, columns) == 0
    windowed = not empty and band.hides_left(rows)
    name = pick_kernel(device_type, dtype, max(D, v[3]), left_window=windowed, softcap=softcap > 0, kernel=kernel)
    return Job(name, queries, keys, band, whole=not empty and (rows, columns) == (S, T), empty=empty)


def _flash_attn(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> tuple[Tensor, Tensor]:
    """The flash-attn package (Dao 2023, FlashAttention-2). Untried on a GPU."""
    flash_attn_func = _flash_attn_func()
    assert flash_attn_func is not None
    S, T, E = q_BSHD.shape[1], k_BTKD.shape[1], v_BTKE.shape[3]
    q, k, v = one_head_dim(q_BSHD, k_BTKD, v_BTKE, multiple=8)
    # causal stays False: the window's right side says the same, at any offset.
    out, lse_BHS, _ = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        window_size=band.bottom_right_window(S, T),
        softcap=softcap,
        return_attn_probs=True,
    )
    return out[..., :E], lse_BHS


def _torch_flash(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> tuple[Tensor, Tensor]:
    """torch's own flash kernels (Dao 2023) on CPU and CUDA: no window on the left, no softcap.

    They are asked for causal squares and unmasked rectangles only, so it never matters which corner a kernel
    aligns its causal mask to: every query sees the first `offset` keys, and then a square begins.
    """
    S, T, E, offset = q_BSHD.shape[1], k_BTKD.shape[1], v_BTKE.shape[3], band.high
    q, k, v = one_head_dim(q_BSHD, k_BTKD, v_BTKE, multiple=8 if q_BSHD.is_cuda else 1)
    if not band.hides_right(T):
        out, lse_BHS = flash_piece(q, k, v, softmax_scale, causal=False)
        return out[..., :E], lse_BHS

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


def dense_blocks(S: int, T: int, band: Band, heads: int) -> Iterator[tuple[slice, slice]]:
    """Queries of one block of a dense kernel and the keys they see, block after block.

    `heads` query heads of all sequences together are computed at a time. Their scores in one block are no more than
    `_DENSE_SCORES`, unless one query alone has more.
    """
    widest = min(T, band.high - band.low + _DENSE_ROWS)
    step = max(1, min(_DENSE_ROWS, _DENSE_SCORES // (heads * widest)))
    for start in range(0, S, step):
        stop = min(S, start + step)
        yield slice(start, stop), slice(max(0, start + band.low), min(T, stop + band.high))


def _dense(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> tuple[Tensor, Tensor]:
    """Plain attention in blocks of queries (Rabe and Staats 2021), touching only the keys a block sees.

    Scores are fp32 or fp64. The slowest kernel, and the one that can do everything.
    """
    B, S, H, _ = q_BSHD.shape
    T, K, E = v_BTKE.shape[1:]
    G, exact = H // K, exact_dtype(q_BSHD.dtype)
    out_BSHE = q_BSHD.new_empty(B, S, H, E)
    lse_BHS = q_BSHD.new_empty(B, H, S, dtype=exact)
    # Autocast would turn the products back into half precision.
    with torch.autocast(q_BSHD.device.type, enabled=False):
        for queries, keys in dense_blocks(S, T, band, B * H):
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


@dataclass(frozen=True)
class _Kernel:
    """A kernel function, where it runs, and what it can do."""

    run: Callable[[Tensor, Tensor, Tensor, float, Band, float], tuple[Tensor, Tensor]]
    fits: Callable[[str, torch.dtype, int], bool]
    left_window: bool
    softcap: bool


@cache
def _flash_attn_func() -> Callable[..., Any] | None:
    # A package built for another torch fails to import too; to us it is then not installed.
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except ImportError:
        return None


def flash_attn_backward() -> Callable[..., Any]:
    """flash-attn's backward of one call, which it offers under no public name. Untried on a GPU."""
    return importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_backward


def _fits_cuda(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    return (
        device_type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= (8, 0)
    )


def _fits_flash_attn(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    return _fits_cuda(device_type, dtype, head_dim) and _flash_attn_func() is not None


def _fits_torch_flash(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    return device_type == "cpu" or _fits_cuda(device_type, dtype, head_dim)


_KERNELS: Mapping[str, _Kernel] = MappingProxyType(
    {
        "flash_attn": _Kernel(_flash_attn, _fits_flash_attn, left_window=True, softcap=True),
        "torch_flash": _Kernel(_torch_flash, _fits_torch_flash, left_window=False, softcap=False),
        "dense": _Kernel(_dense, lambda *_: True, left_window=True, softcap=True),
    }
)


def _per_row(weight_BHS: Tensor) -> Tensor:
    return weight_BHS.transpose(1, 2).unsqueeze(-1)
