"""Exact attention of one rectangle: queries against keys and values, answered as (out, lse).

Because the log-sum-exp comes along, rectangles that share queries can be computed anywhere and merged into the
attention of their union. This is the one entrance: what can compute is in `operators`, and which of them does is
decided here, for `backward` too. The module knows no model, no cache and no transport, and keeps nothing for a backward
pass: callers detach.

Before an operator runs, the rectangle is trimmed to the queries that see a key and the keys that are seen. So none ever
meets an empty or fully masked row, where they answer differently or crash.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.kernels.band import Band, exact_dtype
from fapool_plugin.kernels.merge import fold_sinks, merge_
from fapool_plugin.kernels.operators import OPERATORS, Case, Operator, able, capability, named

__all__ = ["attend", "available_kernels", "fold_sinks", "merge_", "pick_kernel"]


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
        out_BSHE, lse_BHS = job.operator.attend(q_BSHD, k_BTKD, v_BTKE, softmax_scale, job.band, softcap)
        return out_BSHE, lse_BHS.contiguous()

    B, S, H, _ = q_BSHD.shape
    out_BSHE = q_BSHD.new_zeros(B, S, H, v_BTKE.shape[3])
    lse_BHS = q_BSHD.new_full((B, H, S), -torch.inf, dtype=exact_dtype(q_BSHD.dtype))
    if not job.empty:
        q, k, v = q_BSHD[:, job.queries], k_BTKD[:, job.keys], v_BTKE[:, job.keys]
        part = job.operator.attend(q, k, v, softmax_scale, job.band, softcap)
        out_BSHE[:, job.queries], lse_BHS[:, :, job.queries] = part
    return out_BSHE, lse_BHS


def available_kernels(device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> tuple[str, ...]:
    """Names of the kernels that run on this device, or on the current one of its type, for this dtype and head dim.

    Best first: "flash_attn_3", "flash_attn_4", "flash_attn_2" (CUDA, if installed), "torch_flash" (torch's own, CPU and
    CUDA), "torch_efficient" (CUDA), "dense" (all).
    """
    return tuple(operator.name for operator in able(case_of(device, dtype, head_dim)))


def pick_kernel(
    device: torch.device | str,
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
    return _pick(case_of(device, dtype, head_dim)._replace(left_window=left_window, softcap=softcap), kernel)


def case_of(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> Case:
    """A plain forward there, on the current device of its type if it has no number."""
    where = torch.device(device)
    return Case(where.type, capability(where), dtype, head_dim, head_dim)


def _pick(case: Case, kernel: str | None) -> str:
    names = [operator.name for operator in able(case)]
    if kernel is None:
        return names[0]
    if kernel in names:
        return kernel
    plain = case._replace(left_window=False, softcap=False, backward=False, decode=False)
    available = [operator.name for operator in able(plain)]
    if kernel in available:
        asked = {"a window's left side": case.left_window, "softcap": case.softcap, "gradients": case.backward}
        what = " and ".join(name for name, wanted in asked.items() if wanted) or "a single query"
        raise ValueError(f'kernel "{kernel}" cannot do {what}; leave it out or use {" or ".join(names)}')
    known = any(operator.name == kernel for operator in OPERATORS)
    dims = max(case.head_dim, case.v_head_dim)
    why = f"does not run on {case.device_type} with {case.dtype} and head dim {dims}" if known else "is unknown"
    raise ValueError(f'kernel "{kernel}" {why}; use {" or ".join(available)}')


class Job(NamedTuple):
    """The trimmed rectangle of one call, its band, and the operator that computes it."""

    operator: Operator
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
    *,
    backward: bool = False,
) -> Job:
    """What to compute of one call, forward or backward, and by which operator. Raises ValueError as `attend` does."""
    dtype, device = q_BSHD.dtype, q_BSHD.device
    if not (dtype == k_BTKD.dtype == v_BTKE.dtype and dtype.is_floating_point):
        raise ValueError(f"dtypes {dtype}, {k_BTKD.dtype}, {v_BTKE.dtype}: convert q, k and v to one float dtype")
    if not device == k_BTKD.device == v_BTKE.device:
        raise ValueError(f"devices {device}, {k_BTKD.device}, {v_BTKE.device}: move q, k and v to one device")
    shapes = q_BSHD.shape, k_BTKD.shape, v_BTKE.shape
    about = dtype, device.type, capability(device), backward
    return _prepare(*shapes, *about, causal, q_offset, window_size, softcap, kernel)


@lru_cache(maxsize=256)
def _prepare(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    dtype: torch.dtype,
    device_type: str,
    capability: tuple[int, int],
    backward: bool,
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
    case = Case(device_type, capability, dtype, D, v[3], windowed, softcap > 0, backward, decode=S == 1)
    operator = named(_pick(case, kernel), case)
    return Job(operator, queries, keys, band, whole=not empty and (rows, columns) == (S, T), empty=empty)
