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
  do: so the tensors' is made that. (flash_attn/cute/interface.py) Its sinks are not used: they are counted in after the
  last merge.
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
    RunGiven,
    RunPart,
    gradients_padded,
    padded,
)

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
    told = {"softmax_scale": softmax_scale, "softcap": softcap, "return_attn_probs": True}
    return padded(_forward(function(FLASH_2), told), q_BSHD, k_BTKD, v_BTKE, band)


def flash_2_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""
    backward = function("flash_attn.flash_attn_interface", "_flash_attn_backward")
    told = {"softmax_scale": softmax_scale, "softcap": softcap, "dropout_p": 0.0, "alibi_slopes": None}
    return gradients_padded(_backward(backward, "causal", told), given, band)


def flash_3(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle, on Hopper (Shah et al. 2024, FlashAttention-3)."""
    attend = _there(_flash_3())
    told: dict[str, Any] = {"softmax_scale": softmax_scale, "num_splits": 0}
    # What some builds do not know is left out where it says nothing.
    if softcap:
        told["softcap"] = softcap
    if "return_attn_probs" in inspect.signature(attend).parameters:
        told["return_attn_probs"] = True
    return padded(_forward(attend, told), q_BSHD, k_BTKD, v_BTKE, band)


def flash_3_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""
    told = {"softmax_scale": softmax_scale, "softcap": softcap}
    return gradients_padded(_backward(function(FLASH_3, "_flash_attn_backward"), "is_causal", told), given, band)


def flash_4(
    q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor, softmax_scale: float, band: Band, softcap: float
) -> OutAndLse:
    """(out, lse) of a trimmed rectangle; values may have a head dim of their own."""
    run = _forward(function(FLASH_4), {"softmax_scale": softmax_scale, "return_lse": True}, no_limit=None)
    return padded(run, q_BSHD, k_BTKD, v_BTKE, band, own_v_dim=True)


def flash_4_backward(given: Given, softmax_scale: float, band: Band, softcap: float) -> Gradients:
    """(dq, dk, dv) of a trimmed rectangle in the dtype of q."""
    backward = _there(function("flash_attn.cute.interface", "_flash_attn_bwd"))

    def run(given: Given, part: Part) -> Gradients:
        dout, q, k, v, out, lse = given
        with torch.cuda.device_of(q):
            dq, dk, dv = backward(
                q, k, v, out, dout, lse.contiguous(), softmax_scale=softmax_scale, causal=part.causal,
                deterministic=_deterministic(), **_sides(part, no_limit=None),
            )  # fmt: skip
        return dq, dk, dv

    return gradients_padded(run, given, band, own_v_dim=True)


def _forward(attend: Callable[..., Any] | None, told: dict[str, Any], no_limit: int | None = -1) -> RunPart:
    """A function of a package, as it is asked for a part. A window that hides nothing is not mentioned: builds may
    lack windows."""
    attend = _there(attend)

    def run(q: Tensor, k: Tensor, v: Tensor, part: Part) -> OutAndLse:
        window = {"window_size": tuple(_sides(part, no_limit).values())} if part.left >= 0 else {}
        with torch.cuda.device_of(q):
            out, lse, *_ = attend(q, k, v, causal=part.causal, **window, **told)
        return out, lse

    return run


def _backward(backward: Callable[..., Any] | None, causal: str, told: dict[str, Any]) -> RunGiven:
    """Versions 2 and 3, which write gradients where they are told to."""
    backward = _there(backward)

    def run(given: Given, part: Part) -> Gradients:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[1:4])
        with torch.cuda.device_of(dq):
            backward(
                *given[:5], given.lse_BHS.contiguous(), dq=dq, dk=dk, dv=dv, deterministic=_deterministic(),
                **{causal: part.causal}, **_sides(part), **told,
            )  # fmt: skip
        return dq, dk, dv

    return run


def _sides(part: Part, no_limit: int | None = -1) -> dict[str, int | None]:
    left, right = (no_limit if side < 0 else side for side in part.window)
    return {"window_size_left": left, "window_size_right": right}


def _flash_3() -> Callable[..., Any] | None:
    return function(FLASH_3) or function(_ONLY_FORWARD)


def _there(found: Callable[..., Any] | None) -> Callable[..., Any]:
    assert found is not None, "the table of operators lets nothing here that is not installed"
    return found


def _deterministic() -> bool:
    """As torch's own operators follow its flag: not where it only warns."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
