"""How fast the package's kernels are, beside the same operator called alone: nothing above can be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fapool_plugin.kernels.backward import attend_backward
from fapool_plugin.kernels.forward import attend, merge_, pick_kernel
from fapool_plugin.kernels.lanes import Rectangle, attend_all
from tests.gpu.report import Report

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SCALE = HEAD_DIM**-0.5


def run(report: Report) -> None:
    for tokens in (8192, 32768, 131072):
        n = report.size(tokens, tokens // 64)
        with report.part(f"prefill {n}"):
            q, k, v = _tensors(report, 1, n, n)
            flops = 4 * HEADS * HEAD_DIM * n * n / 2
            ours = report.timed(partial(attend, q, k, v, softmax_scale=SCALE, causal=True))
            _speed(report, f"prefill {n}, attend", flops, ours)
            _alone(report, f"prefill {n}", q, k, v, flops, ours)
    with report.part("rectangle"):
        s, t = report.size(4096, 64), report.size(32768, 512)
        q, k, v = _tensors(report, 1, s, t)
        flops = 4 * HEADS * HEAD_DIM * s * (t - s / 2)
        ours = report.timed(partial(attend, q, k, v, softmax_scale=SCALE, causal=True))
        _speed(report, f"rectangle {s} x {t}, attend", flops, ours)
        _speed(report, f"rectangle {s} x {t}, as a square, the rest and a merge", flops, report.timed(_in_two(q, k, v)))
        _alone(report, f"rectangle {s} x {t}", q, k, v, flops, ours)
    with report.part("merge"):
        n = report.size(8192, 128)
        out, lse = torch.zeros(1, n, HEADS, HEAD_DIM, device=report.device), torch.zeros(1, HEADS, n).to(report.device)
        part = (out.to(_dtype(report)), lse.clone())
        seconds = report.timed(lambda: merge_(out, lse, *part))
        report.figure(f"merge of {n} queries", out.numel() * 10 / seconds / 1e9, "GB/s")
    for batch in (1, 8, 32, 128):
        with report.part(f"decode {batch}"):
            keys = report.size(8192, 256)
            q, k, v = _tensors(report, batch, 1, keys)
            seconds = report.timed(partial(attend, q, k, v, softmax_scale=SCALE))
            nbytes = (k.numel() + v.numel()) * k.element_size()
            report.figure(f"decode, batch {batch} x {keys} keys", nbytes / seconds / 1e9, "GB/s")
            _alone(report, f"decode, batch {batch} x {keys}", q, k, v, 4 * HEADS * HEAD_DIM * batch * keys, seconds)
    _unequal_rows(report)
    for tokens in (8192, 32768):
        n = report.size(tokens, tokens // 64)
        with report.part(f"backward {n}"):
            q, k, v = _tensors(report, 1, n, n)
            out, lse = attend(q, k, v, softmax_scale=SCALE, causal=True)
            dout = torch.randn_like(q)
            work = partial(attend_backward, dout, q, k, v, out, lse, softmax_scale=SCALE, causal=True)
            seconds = report.timed(work)
            flops = 2.5 * 4 * HEADS * HEAD_DIM * n * n / 2
            _speed(report, f"backward {n}, attend_backward", flops, seconds)
            _backward_alone(report, f"backward {n}", (dout, q, k, v, out, lse), flops, seconds)
    with report.part("dense"):
        n = report.size(8192, 128)
        q, k, v = _tensors(report, 1, n, n)
        capped = partial(attend, q, k, v, softmax_scale=SCALE, causal=True, softcap=30.0, kernel="dense")
        _speed(report, f"prefill {n} with softcap, dense", 4 * HEADS * HEAD_DIM * n * n / 2, report.timed(capped))
        q, k, v = (x.float() for x in (q, k, v))
        kernel = pick_kernel(report.device, torch.float32, HEAD_DIM)
        plain = partial(attend, q, k, v, softmax_scale=SCALE, causal=True)
        _speed(report, f"prefill {n} in fp32, {kernel}", 4 * HEADS * HEAD_DIM * n * n / 2, report.timed(plain))


def _in_two(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], None]:
    """A causal rectangle by an operator that knows causal squares only."""
    before = k.shape[1] - q.shape[1]

    def work() -> None:
        out, lse = attend(q, k[:, before:], v[:, before:], softmax_scale=SCALE, causal=True)
        total = out.float()
        merge_(total, lse, *attend(q, k[:, :before], v[:, :before], softmax_scale=SCALE))
        total.to(out.dtype)

    return work


def _backward_alone(report: Report, name: str, inputs: Sequence[Tensor], flops: float, ours: float) -> None:
    if report.device.type != "cuda":
        report.skipped(f"{name}, operator alone", "no CUDA device")
        return
    n, unused = inputs[1].shape[1], torch.empty(2, dtype=torch.uint64, device=report.device)
    alone = report.timed(
        lambda: torch.ops.aten._flash_attention_backward(
            *inputs, None, None, n, n, 0.0, True, unused, unused, scale=SCALE
        )
    )
    _speed(report, f"{name}, operator alone", flops, alone)
    report.figure(f"{name}, attend_backward over the operator alone", ours / alone, "(goal 1.05)")


def _alone(report: Report, name: str, q: Tensor, k: Tensor, v: Tensor, flops: float, ours: float) -> None:
    """torch's operator by itself, which takes GQA and a bottom-right mask."""
    if report.device.type != "cuda":
        report.skipped(f"{name}, operator alone", "no CUDA device")
        return
    alone = report.timed(
        lambda: torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=SCALE
        )
    )
    _speed(report, f"{name}, operator alone", flops, alone)
    report.figure(f"{name}, attend over the operator alone", ours / alone, "(goal 1.05)")


def _speed(report: Report, name: str, flops: float, seconds: float) -> None:
    report.figure(name, seconds * 1e3, "ms")
    report.figure(name, flops / seconds / 1e12, "TFLOP/s")


def _tensors(report: Report, batch: int, s: int, t: int) -> tuple[Tensor, Tensor, Tensor]:
    heads = ((s, HEADS), (t, KV_HEADS), (t, KV_HEADS))
    q, k, v = (torch.randn(batch, n, count, HEAD_DIM, device=report.device, dtype=_dtype(report)) for n, count in heads)
    return q, k, v


def _dtype(report: Report) -> torch.dtype:
    return torch.bfloat16 if report.device.type == "cuda" else torch.float32


def _unequal_rows(report: Report) -> None:
    """A decode step of rows of unequal lengths in one call, beside a call for each."""
    batch, most = 128, report.size(8192, 256)
    with report.part("decode of unequal rows"):
        q = torch.randn(batch, 1, HEADS, HEAD_DIM, device=report.device, dtype=_dtype(report))
        k, v = (
            torch.randn(batch, KV_HEADS, most, HEAD_DIM, device=report.device, dtype=_dtype(report)) for _ in range(2)
        )
        lengths = [most // 8 + (7 * row * most // 8) // batch for row in range(batch)]
        parts = [
            Rectangle(q[r : r + 1], k[r : r + 1, :, :n].transpose(1, 2), v[r : r + 1, :, :n].transpose(1, 2), n - 1)
            for r, n in enumerate(lengths)
        ]
        nbytes = 2 * sum(lengths) * KV_HEADS * HEAD_DIM * k.element_size()
        together = report.timed(partial(attend_all, parts, softmax_scale=SCALE))
        each = report.timed(lambda: [attend_all([part], softmax_scale=SCALE) for part in parts])
        report.figure(f"decode, {batch} unequal rows to {most} keys, together", nbytes / together / 1e9, "GB/s")
        report.figure(f"decode, {batch} unequal rows to {most} keys, one by one", nbytes / each / 1e9, "GB/s")
