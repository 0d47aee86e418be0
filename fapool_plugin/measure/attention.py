"""Measures what one layer's attention costs on this machine: causal squares, and one query against many keys.

Knows kernels, and the shape that it is given; no model, nor what a plan makes of the numbers.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fapool_plugin.devices.clock import Clock
from fapool_plugin.kernels.forward import attend, available_kernels, pick_kernel
from fapool_plugin.measure.calibrate import Progress, ascend, check_effort, fitted, silent, threads_restored
from fapool_plugin.plan.profile import AttentionCost, Shape

_LENGTHS = (512, 1024, 2048, 4096, 8192)
_QUICK_LENGTHS = (512, 1024, 2048)
_KEYS = (512, 1024, 2048, 4096, 8192)
_DEVICE_LENGTHS = (2048, 8192, 32768, 65536, 131072)
_QUICK_DEVICE_LENGTHS = _DEVICE_LENGTHS[:3]
"""Where a GPU is filled, and prompts are long."""
_DENSE_LONGEST = 2048
_KEYS_BYTES = 128 * 2**20
"""So much memory is read before the same keys come again: in a model, all weights lie between two such calls."""


def measure_attention(
    shape: Shape,
    threads: Sequence[int],
    budget_s: float,
    progress: Progress = silent,
    *,
    quick: bool = False,
    softcap: float = 0.0,
    device: torch.device | str = "cpu",
    until: float = math.inf,
) -> tuple[AttentionCost, ...]:
    """One layer's attention, all lanes of one sequence: causal squares, and one query against many keys.

    Args:
        shape: the model's heads.
        threads: numbers of CPU threads to measure with.
        budget_s: about how long all of it may take, in seconds.
        progress: told after every kernel, dtype and number of threads.
        quick: only the best kernel and the model's own dtype, at fewer sizes.
        softcap: the model's, 0 for none; kernels that cannot do it are left out.
        device: where the kernels run. On a GPU threads change nothing, and only the first number is measured.
            CUDA is written and has never run.
        until: by the performance counter, when to be content with what there is.

    Raises:
        ValueError: no threads, or no time.
    """
    check_effort(threads, budget_s)
    device, costs = torch.device(device), []
    threads = threads[:1] if device.type == "cuda" else threads
    cases = list(itertools.product(_kernels(shape, device, softcap, quick), threads))
    with threads_restored(), torch.no_grad():
        for done, ((kernel, dtype), count) in enumerate(cases):
            name = str(dtype).removeprefix("torch.")
            progress(f"attention: {kernel}, {name}, {count} thread(s)", done, len(cases))
            torch.set_num_threads(count)
            bench = _Attention(shape, kernel, dtype, device, softcap)
            lengths, keys = _lengths(device, kernel, quick)
            each_s = budget_s / len(cases)
            prefill = ascend(lengths, bench.prefill, 0.7 * each_s, at_least=3, growth=2, until=until)
            decode = ascend(keys, bench.decode, 0.3 * each_s, at_least=2, until=until)
            costs.append(
                AttentionCost(
                    kernel=kernel,
                    dtype=name,
                    threads=count,
                    # So few points cannot tell what a call costs by itself.
                    prefill=fitted(prefill, (1, 2) if len(prefill) <= len(_QUICK_LENGTHS) else (0, 1, 2)),
                    decode=fitted(decode, (0, 1)),
                )
            )
        progress("attention", len(cases), len(cases))
    return tuple(costs)


def _kernels(shape: Shape, device: torch.device, softcap: float, quick: bool) -> list[tuple[str, torch.dtype]]:
    """Kernels and dtypes to measure, the best first."""
    own: torch.dtype = getattr(torch, shape.dtype)
    head_dim = max(shape.head_dim, shape.v_head_dim)
    if quick:
        return [(pick_kernel(device, own, head_dim, softcap=softcap > 0), own)]
    found = []
    for dtype in dict.fromkeys((own, torch.float32, torch.bfloat16)):
        best = pick_kernel(device, dtype, head_dim, softcap=softcap > 0)
        names = available_kernels(device, dtype, head_dim)
        # The best able one, and those after it: only the last, dense, is left where softcap rules others out.
        found += [(name, dtype) for name in names[names.index(best) :]]
    return found


def _lengths(device: torch.device, kernel: str, quick: bool) -> tuple[Sequence[int], Sequence[int]]:
    """Lengths of prompts, and numbers of keys in decode, to measure at."""
    keys: Sequence[int] = _KEYS[::2] if quick else _KEYS
    lengths: Sequence[int] = _QUICK_LENGTHS if quick else _LENGTHS
    if device.type == "cuda":
        keys = _QUICK_DEVICE_LENGTHS if quick else _DEVICE_LENGTHS
        lengths = lengths if kernel == "dense" else keys
    return [n for n in lengths if kernel != "dense" or n <= _DENSE_LONGEST], keys


class _Attention:
    """One kernel on random tensors, laid out as models hand them over."""

    def __init__(self, shape: Shape, kernel: str, dtype: torch.dtype, device: torch.device, softcap: float) -> None:
        self.shape, self.kernel, self.softcap = shape, kernel, softcap
        self.dtype, self.device, self._clock = dtype, device, Clock(device)
        self._stored = torch.empty(0)

    def prefill(self, n: int) -> Callable[[], float]:
        """A causal square of ``n`` positions."""
        shape = self.shape
        q_BSHD = self._random(1, n, shape.heads, shape.head_dim)
        k_BTKD = self._random(1, shape.kv_heads, n, shape.head_dim).transpose(1, 2)
        v_BTKE = self._random(1, shape.kv_heads, n, shape.v_head_dim).transpose(1, 2)
        return lambda: self._seconds(q_BSHD, k_BTKD, v_BTKE)

    def decode(self, keys: int) -> Callable[[], float]:
        """One query against ``keys`` keys, others at each call, so that none are found in a processor's cache."""
        shape = self.shape
        q_BSHD = self._random(1, 1, shape.heads, shape.head_dim)
        split, width = shape.head_dim * keys * shape.kv_heads, (shape.head_dim + shape.v_head_dim) * shape.kv_heads
        room = max(_KEYS_BYTES // self.dtype.itemsize, width * keys)
        if self._stored.numel() < room:
            self._stored = self._random(4096).repeat(-(-room // 4096))
        others = room // (width * keys)
        stored = self._stored[: others * width * keys].view(others, -1)
        pairs = itertools.cycle(
            (
                flat[:split].view(1, shape.kv_heads, keys, -1).transpose(1, 2),
                flat[split:].view(1, shape.kv_heads, keys, -1).transpose(1, 2),
            )
            for flat in stored
        )
        return lambda: self._seconds(q_BSHD, *next(pairs))

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device).to(self.dtype)

    def _seconds(self, q_BSHD: Tensor, k_BTKD: Tensor, v_BTKE: Tensor) -> float:
        began, launched = time.perf_counter(), self._clock.now()
        attend(
            q_BSHD,
            k_BTKD,
            v_BTKE,
            softmax_scale=self.shape.head_dim**-0.5,
            causal=True,
            softcap=self.softcap,
            kernel=self.kernel,
        )
        if self.device.type == "cuda":
            return self._clock.now().waited_since(launched)
        return time.perf_counter() - began
