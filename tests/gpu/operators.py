"""Every operator that answers with (out, lse) against dense attention in fp64: those of the package's table, with their
gradients, and, called alone, those that may become one.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.kernels.forward import attend
from fapool_plugin.kernels.lanes import Rectangle, attend_all
from fapool_plugin.kernels.operators import OPERATORS, capability
from fapool_plugin.kernels.operators import Case as Asked
from tests.dense_attention import TOLERANCE, reference, tensors, visible_ST
from tests.dense_gradients import SCALE, Whole
from tests.gpu.report import Missing, Report

aten = torch.ops.aten


@dataclass(frozen=True)
class Case:
    """One rectangle and its mask; windows count from the diagonal, which is bottom-right unless there is an offset."""

    name: str
    S: int
    T: int
    H: int = 8
    K: int = 2
    D: int = 64
    E: int = 64
    causal: bool = False
    left: int = -1
    offset: int | None = None
    softcap: float = 0.0


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
    Case("values narrower", 96, 224, D=192, E=128, causal=True),
    Case("head dim 512", 96, 224, D=512, E=512, causal=True),
    Case("head dim 20", 96, 224, D=20, E=20, causal=True),
    Case("queries past the last key", 224, 96, causal=True, offset=-40),
    Case("all but the first queries past the last key", 224, 96, causal=True, offset=92),
    Case("softcap", 96, 224, causal=True, softcap=20.0),
)
HALVES = (torch.bfloat16, torch.float16)
GRADIENTS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Of the largest gradient. Half precision is that of outputs that are rounded, and of what kernels round."""


def run(report: Report) -> None:
    for name in dict.fromkeys(operator.name for operator in OPERATORS):
        _in_the_table(report, name)
    for name, module, alone in (("aten cudnn", None, _cudnn), ("xformers", "xformers.ops", _xformers)):
        with report.part(name):
            _look(report, module)
            for dtype, case in itertools.product(HALVES, CASES):
                what = f"{name}, {str(dtype).removeprefix('torch.')}, {case.name}"
                with report.part(what):
                    _try(report, what, alone, dtype, case)
    with report.part("aten flash, keys by seqused_k"):
        _look(report, None)
        _lengths_apart(report)


def _in_the_table(report: Report, name: str) -> None:
    """What it says that it can do, by way of the facade, and what it does not."""
    device = report.device

    def can(asked: Asked) -> bool:
        return any(operator.can(asked) for operator in OPERATORS if operator.name == name)

    for dtype in (*HALVES, torch.float32):
        told, cannot = f"{name}, {str(dtype).removeprefix('torch.')}", []
        for case in CASES:
            left, softcap = case.left >= 0, case.softcap > 0
            asked = Asked(device.type, capability(device), dtype, case.D, case.E, left, softcap, decode=case.S == 1)
            if can(asked):
                with report.part(f"{told}, {case.name}"):
                    _forward(report, f"{told}, {case.name}", name, dtype, case)
            if can(asked._replace(backward=True)):
                with report.part(f"{told}, {case.name}: gradients"):
                    _backward(report, f"{told}, {case.name}", name, dtype, case)
            else:
                cannot.append(case.name)
        if cannot:
            all_ = len(cannot) == len(CASES)
            report.skipped(told, f"not installed, or not for {device.type}" if all_ else f"not for {', '.join(cannot)}")


def _forward(report: Report, what: str, kernel: str, dtype: torch.dtype, case: Case) -> None:
    q, k, v, visible = _inputs(case, dtype)
    out, lse = attend(*(x.to(report.device) for x in (q, k, v)), softmax_scale=SCALE, kernel=kernel, **_mask(case))
    expected = reference(q, k, v, visible, SCALE, case.softcap)
    seen = expected[1].isfinite()
    report.close(f"{what}: out", out, expected[0], TOLERANCE[dtype])
    report.close(f"{what}: lse", lse.cpu()[seen], expected[1][seen], 1e-3)
    report.passed(f"{what}: rows without keys", bool((lse.cpu()[~seen] == -torch.inf).all()))


def _backward(report: Report, what: str, kernel: str, dtype: torch.dtype, case: Case) -> None:
    q, k, v, visible = _inputs(case, dtype)
    whole = Whole(q, k, v, visible, softcap=case.softcap)
    inputs = (x.to(report.device) for x in (whole.dout, q, k, v, whole.out, whole.lse))
    gradients = attend_backward(*inputs, softmax_scale=SCALE, kernel=kernel, **_mask(case))
    for name, x, expected in zip(("dq", "dk", "dv"), gradients, whole.gradients, strict=False):
        report.close(f"{what}: {name}", x, expected, GRADIENTS[dtype])


def _inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = tensors(2, case.S, case.T, case.H, case.K, case.D, case.E, dtype=dtype)
    return q, k, v, visible_ST(case.S, case.T, case.causal, case.offset, (case.left, -1))


def _mask(case: Case) -> dict[str, Any]:
    window = (case.left, -1)
    return {"causal": case.causal, "q_offset": case.offset, "window_size": window, "softcap": case.softcap}


def _try(report: Report, what: str, operator: Callable[..., Any], dtype: torch.dtype, case: Case) -> None:
    if case.offset is not None or case.softcap:
        raise Missing("no offset and no softcap")
    q, k, v, visible = _inputs(case, dtype)
    out, lse = operator(*(x.to(report.device) for x in (q, k, v)), case)
    expected = reference(q, k, v, visible, SCALE)
    lse = lse[..., : case.S].float()  # some are padded
    report.close(f"{what}: out", out, expected[0], TOLERANCE[dtype])
    report.close(f"{what}: lse", lse, expected[1], 1e-3)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    if case.left >= 0 or (case.causal and case.S != case.T):
        raise Missing("no window, and a causal mask that is aligned top-left")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    group = case.H // case.K
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, case.causal, False, scale=SCALE)
    return out.transpose(1, 2), lse.squeeze(-1)


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
    """One call for rows of unequal lengths, with queries in groups and one by one: a decode step of a padded batch."""
    for H, K in ((8, 2), (4, 4)):
        torch.manual_seed(0)
        q, k, v = tensors(3, 1, 300, H, K, 64, dtype=torch.bfloat16)
        # Heads first, as caches keep keys: lanes are sequences of one storage. What is not given is poisoned.
        lengths, on_device = (300, 17, 128), [x.transpose(1, 2).contiguous().to(report.device) for x in (k, v)]
        for x in on_device:
            for row, length in enumerate(lengths):
                x[row, :, length:] = torch.nan
        parts = [
            Rectangle(
                q[row : row + 1].to(report.device),
                on_device[0][row : row + 1, :, :n].transpose(1, 2),
                on_device[1][row : row + 1, :, :n].transpose(1, 2),
                n - 1,
            )
            for row, n in enumerate(lengths)
        ]

        def each(part: Rectangle) -> tuple[Tensor, Tensor]:
            raise AssertionError("not one call")

        found = attend_all(parts, softmax_scale=SCALE, alone=each)
        for row, (length, (out, lse)) in enumerate(zip(lengths, found, strict=True)):
            mine, told = slice(row, row + 1), f"seqused_k {length}, {H} and {K} heads"
            expected = reference(q[mine], k[mine, :length], v[mine, :length], visible_ST(1, length), SCALE)
            report.close(f"{told}: out", out, expected[0], TOLERANCE[torch.bfloat16])
            report.close(f"{told}: lse", lse, expected[1], 1e-3)


def _look(report: Report, module: str | None) -> None:
    """Raises Missing where an operator cannot be tried at all."""
    if report.device.type != "cuda":
        raise Missing("no CUDA device")
    if module is not None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise Missing(f"{module} is not there: {error}") from error
