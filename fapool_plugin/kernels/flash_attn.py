"""The flash-attn packages, where they are installed. Each is asked for a rectangle's bottom-right parts (`Band`).

Nothing here has run on a GPU. What they are called with was read at commit 0251105 (2026-08-15) of
github.com/Dao-AILab/flash-attention; all take [B, S, H, D] with fewer KV heads, and count windows from the bottom-right
diagonal:

- 2, `flash_attn.flash_attn_func(q, k, v, dropout_p, softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
  alibi_slopes, deterministic, return_attn_probs)` gives (out, lse [B, H, S], None);
  `flash_attn.flash_attn_interface._flash_attn_backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p,
  softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic)` writes to dq, dk
  and dv. (flash_attn/flash_attn_interface.py, version 2.8.4)
- 3, `flash_attn_interface.flash_attn_func(q, k, v, softmax_scale, causal, ..., window_size=(-1, -1), ..., softcap=0.0,
  num_splits=1, ..., return_attn_probs=False)` gives (out, lse); earlier ones have no `return_attn_probs` and always
  give both; `num_splits=0` lets it choose. `_flash_attn_backward(dout, q, k, v, out, softmax_lse, ..., dq=, dk=, dv=,
  softmax_scale=, is_causal=, window_size_left=, window_size_right=, softcap=, deterministic=)`. What a build leaves out
  is in `flash_attn_config.CONFIG["build_flags"]`. (hopper/flash_attn_interface.py, hopper/setup.py) The wheel fa3-fwd
  0.0.3 calls its module `fa3_fwd_interface`, and has neither gradients nor windows.
- 4, `flash_attn.cute.flash_attn_func(q, k, v, ..., softmax_scale, causal, window_size=(None, None), learnable_sink,
  softcap, num_splits=1, ..., return_lse=False)` gives (out, lse), with a head dim of its own for v;
  `flash_attn.cute.interface._flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale, causal, softcap, window_size_left,
  window_size_right, ..., deterministic=)` gives (dq, dk, dv). It asks the current device, not the tensors', what it can
  do. (flash_attn/cute/interface.py) Its sinks are not used: they are counted in after the last merge.
"""

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.kernels.band import (
    Band,
    Given,
    Gradients,
    OutAndLse,
    Part,
    gradients_part_by_part,
    one_head_dim,
    part_by_part,
)

_MULTIPLE = 8  # of head dims
FLASH_2, FLASH_3, FLASH_4 = "flash_attn", "flash_attn_interface", "flash_attn.cute"
_ONLY_FORWARD = "fa3_fwd_interface"


@cache
def function(module: str, name: str = "flash_attn_func") -> Callable[..., Any] | None:
    """A package's function; None where it is not installed."""
    # A package built for another torch fails to import too; to us it is then not installed. Where only version 4 is,
    # the folder of version 2 is there and empty.
    try:
        found: Callable[..., Any] | None = getattr(importlib.import_module(module), name, None)
    except (ImportError, OSError):
        return None
    return found


@cache
def flash_3_can(feature: str) -> bool:
    """Whether the version 3 that is installed was built with "BACKWARD", "LOCAL" (windows) or "SOFTCAP"."""
    if function(FLASH_3) is None:
        return False
    try:
        flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except (ImportError, AttributeError, KeyError):
        return False
    return not flags.get(f"FLASHATTENTION_DISABLE_{feature}", True)


def has_flash_3() -> bool:
    """Any version 3, with gradients or without."""
    return _flash_3() is not None


def flash_2(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle (Dao 2023, FlashAttention-2)."""
    attend = _there(function(FLASH_2))

    def run(q: Tensor, k: Tensor, v: Tensor, part: Part) -> OutAndLse:
        out, lse, _ = attend(
            q, k, v, softmax_scale=softmax_scale, causal=part.causal, window_size=part.window, softcap=softcap,
            return_attn_probs=True,
        )  # fmt: skip
        return out, lse

    q, k, v = one_head_dim(q_BSHD, k_BTKD, v_BTKE, multiple=_MULTIPLE)
    out, lse = part_by_part(run, q, k, v, band)
    return out[..., : v_BTKE.shape[3]], lse


def flash_2_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""
    backward = _there(function("flash_attn.flash_attn_interface", "_flash_attn_backward"))

    def run(given: Given, part: Part) -> Gradients:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[1:4])
        left, right = part.window
        backward(
            *given[:5], given.lse_BHS.contiguous(), dq, dk, dv, dropout_p=0.0, softmax_scale=softmax_scale,
            causal=part.causal, window_size_left=left, window_size_right=right, softcap=softcap, alibi_slopes=None,
            deterministic=_deterministic(),
        )  # fmt: skip
        return dq, dk, dv

    return _padded(run, given, band)


def flash_3(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle, on Hopper (Shah et al. 2024, FlashAttention-3)."""
    attend = _there(_flash_3())
    told: dict[str, Any] = {"softcap": softcap} if softcap else {}
    if "return_attn_probs" in inspect.signature(attend).parameters:
        told["return_attn_probs"] = True

    def run(q: Tensor, k: Tensor, v: Tensor, part: Part) -> OutAndLse:
        window = {"window_size": part.window} if part.left >= 0 else {}
        out, lse, *_ = attend(q, k, v, softmax_scale=softmax_scale, causal=part.causal, num_splits=0, **window, **told)
        return out, lse

    q, k, v = one_head_dim(q_BSHD, k_BTKD, v_BTKE, multiple=_MULTIPLE)
    out, lse = part_by_part(run, q, k, v, band)
    return out[..., : v_BTKE.shape[3]], lse


def flash_3_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""
    backward = _there(function(FLASH_3, "_flash_attn_backward"))

    def run(given: Given, part: Part) -> Gradients:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[1:4])
        left, right = part.window
        backward(
            *given[:5], given.lse_BHS.contiguous(), dq=dq, dk=dk, dv=dv, softmax_scale=softmax_scale,
            is_causal=part.causal, window_size_left=left, window_size_right=right, softcap=softcap,
            deterministic=_deterministic(),
        )  # fmt: skip
        return dq, dk, dv

    return _padded(run, given, band)


def flash_4(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle; values may have a head dim of their own."""
    attend = _there(function(FLASH_4))

    def run(q: Tensor, k: Tensor, v: Tensor, part: Part) -> OutAndLse:
        out, lse, *_ = attend(
            q, k, v, softmax_scale=softmax_scale, causal=part.causal, window_size=_open(part), return_lse=True
        )
        return out, lse

    q, k = one_head_dim(q_BSHD, k_BTKD, multiple=_MULTIPLE)
    (v,) = one_head_dim(v_BTKE, multiple=_MULTIPLE)
    out, lse = part_by_part(run, q, k, v, band)
    return out[..., : v_BTKE.shape[3]], lse


def flash_4_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""
    backward = _there(function("flash_attn.cute.interface", "_flash_attn_bwd"))
    half, D, E = given.q_BSHD.dtype, given.q_BSHD.shape[3], given.v_BTKE.shape[3]

    def run(given: Given, part: Part) -> Gradients:
        dout, q, k, v, out, lse = given
        left, right = _open(part)
        dq, dk, dv = backward(
            q, k, v, out, dout, lse.contiguous(), softmax_scale=softmax_scale, causal=part.causal,
            window_size_left=left, window_size_right=right, deterministic=_deterministic(),
        )  # fmt: skip
        return dq, dk, dv

    q, k = one_head_dim(given.q_BSHD, given.k_BTKD, multiple=_MULTIPLE)
    dout, v, out = one_head_dim(given.dout_BSHE.to(half), given.v_BTKE, given.out_BSHE.to(half), multiple=_MULTIPLE)
    dq, dk, dv = gradients_part_by_part(run, Given(dout, q, k, v, out, given.lse_BHS), band)
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _padded(run: Callable[[Given, Part], Gradients], given: Given, band: Band) -> Gradients:
    """By an operator that knows one head dim and one dtype."""
    half, D, E = given.q_BSHD.dtype, given.q_BSHD.shape[3], given.v_BTKE.shape[3]
    dout, q, k, v, out = one_head_dim(*(x.to(half) for x in given[:5]), multiple=_MULTIPLE)
    dq, dk, dv = gradients_part_by_part(run, Given(dout, q, k, v, out, given.lse_BHS), band)
    return dq[..., :D], dk[..., :D], dv[..., :E]


def _flash_3() -> Callable[..., Any] | None:
    return function(FLASH_3) or function(_ONLY_FORWARD)


def _there(found: Callable[..., Any] | None) -> Callable[..., Any]:
    assert found is not None, "the table of operators lets nothing here that is not installed"
    return found


def _open(part: Part) -> tuple[int | None, int | None]:
    """A window as version 4 wants it: None for no limit."""
    if part.left < 0:
        return None, None
    return part.left, 0 if part.causal else None


def _deterministic() -> bool:
    """As torch's own operators follow its flag: not where it only warns."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
