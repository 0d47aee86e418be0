"""Every operator that answers with (out, lse), called alone, against dense attention in fp64.

What passes here may become a kernel of the package; what is said of masks and shapes is tried, not read.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.dense_attention import TOLERANCE, reference, tensors, visible_ST
from tests.gpu.report import Missing, Report

aten = torch.ops.aten
SCALE = 0.15


@dataclass(frozen=True)
class Case:
    """One rectangle and its mask; windows count from the bottom-right diagonal."""

    name: str
    S: int
    T: int
    H: int = 8
    K: int = 2
    D: int = 64
    E: int = 64
    causal: bool = False
    left: int = -1


CASES = (
    Case("square", 160, 160),
    Case("causal square", 160, 160, causal=True),
    Case("bottom-right", 96, 224, causal=True),
    Case("more queries than keys", 224, 96),
    Case("window", 96, 224, causal=True, left=50),
    Case("decode", 1, 300),
    Case("one head each", 96, 224, H=4, K=4, causal=True),
    Case("head dim 128", 96, 224, D=128, E=128, causal=True),
    Case("values wider", 96, 224, H=4, K=4, D=64, E=96, causal=True),
)


HALVES = (torch.bfloat16, torch.float16)


def run(report: Report) -> None:
    for name, module, operator, dtypes in (
        ("aten flash", None, _flash, HALVES),
        ("aten efficient", None, _efficient, (*HALVES, torch.float32)),
        ("aten cudnn", None, _cudnn, HALVES),
        ("flash-attn 2", "flash_attn", _flash_attn_2, HALVES),
        ("flash-attn 3", "flash_attn_interface", _flash_attn_3, HALVES),
        ("xformers", "xformers.ops", _xformers, HALVES),
    ):
        with report.part(name):
            _look(report, module)
            for dtype, case in itertools.product(dtypes, CASES):
                what = f"{name}, {str(dtype).removeprefix('torch.')}, {case.name}"
                with report.part(what):
                    _try(report, what, operator, dtype, case)
    with report.part("aten flash, keys by seqused_k"):
        _look(report, None)
        _lengths_apart(report)


def _try(report: Report, what: str, operator: Callable[..., Any], dtype: torch.dtype, case: Case) -> None:
    torch.manual_seed(0)
    q, k, v = tensors(2, case.S, case.T, case.H, case.K, case.D, case.E, dtype=dtype)
    visible = visible_ST(case.S, case.T, case.causal, window_size=(case.left, -1))
    out, lse = operator(*(x.to(report.device) for x in (q, k, v)), case)
    expected = reference(q, k, v, visible, SCALE)
    lse = lse[..., : case.S].float()  # some are padded
    report.close(f"{what}: out", out, expected[0], TOLERANCE[dtype])
    report.close(f"{what}: lse", lse, expected[1], 1e-3)


def _flash(q: Tensor, k: Tensor, v: Tensor, case: Case, **more: Any) -> tuple[Tensor, Tensor]:
    if case.E != case.D:
        raise Missing("head dims of keys and values are one")
    window = {"window_size_left": case.left, "window_size_right": 0} if case.left >= 0 else {}
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, case.S, case.T, 0.0, case.causal and not window, False, scale=SCALE, **window, **more
    )
    return out, lse


def _efficient(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    group = case.H // case.K
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    out, lse, *_ = aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, 2 if case.causal else 0, True, scale=SCALE,
        window_size=case.left + 1 if case.left >= 0 else None,
    )  # fmt: skip
    return out, lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    if case.left >= 0 or (case.causal and case.S != case.T):
        raise Missing("no window, and a causal mask that is aligned top-left")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = case.H // case.K
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, case.causal, False, scale=SCALE)
    return out.transpose(1, 2), lse.squeeze(-1)


def _flash_attn_2(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    package = importlib.import_module("flash_attn")
    if case.E != case.D:
        raise Missing("head dims of keys and values are one")
    window = (case.left, 0 if case.causal else -1)
    out, lse, _ = package.flash_attn_func(
        q, k, v, softmax_scale=SCALE, causal=case.causal, window_size=window, return_attn_probs=True
    )
    return out, lse


def _flash_attn_3(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    package = importlib.import_module("flash_attn_interface")
    if case.left >= 0:
        raise Missing("the wheel has no windows")
    found = package.flash_attn_func(q, k, v, softmax_scale=SCALE, causal=case.causal, return_attn_probs=True)
    return found[0], found[1]


def _xformers(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    fmha = importlib.import_module("xformers.ops.fmha")
    biases = importlib.import_module("xformers.ops.fmha.attn_bias")
    if case.left >= 0:
        raise Missing("windows are not tried")
    bias = biases.LowerTriangularFromBottomRightMask() if case.causal else None
    groups = case.H // case.K
    q = q.unflatten(2, (case.K, groups))
    k, v = (x.unsqueeze(3).expand(-1, -1, -1, groups, -1) for x in (k, v))
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias=bias, scale=SCALE)
    return out.flatten(2, 3), lse.flatten(1, 2)


def _lengths_apart(report: Report) -> None:
    """One call for rows of unequal lengths: a decode step of a padded batch."""
    case = Case("decode", 1, 300)
    torch.manual_seed(0)
    q, k, v = tensors(3, 1, 300, case.H, case.K, case.D, dtype=torch.bfloat16)
    lengths = [300, 17, 128]
    used = torch.tensor(lengths, dtype=torch.int32, device=report.device)
    on_device = [x.to(report.device) for x in (q, k, v)]
    out, lse = _flash(on_device[0], on_device[1], on_device[2], case, seqused_k=used)
    for row, length in enumerate(lengths):
        mine = slice(row, row + 1)
        expected = reference(q[mine], k[mine, :length], v[mine, :length], visible_ST(1, length), SCALE)
        report.close(f"seqused_k {length}: out", out[row : row + 1], expected[0], TOLERANCE[torch.bfloat16])
        report.close(f"seqused_k {length}: lse", lse[row : row + 1], expected[1], 1e-3)


def _look(report: Report, module: str | None) -> None:
    """Raises Missing where an operator cannot be tried at all."""
    if report.device.type != "cuda":
        raise Missing("no CUDA device")
    if module is not None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Missing(f"{module} is not there: {error}") from error
