"""Measures what attention and a link cost on this machine, and fits it.

Knows kernels and one leased pool rank. It does not know a model, only the shape it is given, nor what a plan makes of
the numbers.
"""

from __future__ import annotations

import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fapool_plugin.base.lease import PoolRank, expected
from fapool_plugin.kernels.forward import attend, available_kernels, pick_kernel
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import AttentionCost, Fit, LinkCost, Machine, Shape, least_squares
from fapool_plugin.wire.messages import Header, Op, Status, dtype_code, float_bits

Progress = Callable[[str, int, int | None], object]
"""Called with what is being measured, how much of it is done, and of how much (None: not known)."""

REPEATS = 3
_REPEAT_S, _MOST_RUNS = 0.01, 100
"""Runs shorter than so many seconds are done several times for one repeat."""
_LENGTHS = (512, 1024, 2048, 4096, 8192)
_QUICK_LENGTHS = (512, 1024, 2048)
_KEYS = (512, 1024, 2048, 4096, 8192)
_DENSE_LONGEST = 2048
_KEYS_BYTES = 128 * 2**20
"""So much memory is read before the same keys come again: in a model, all weights lie between two such calls."""
_LINK_BYTES = tuple(4096 * 4**power for power in range(7))
"""4 KiB to 16 MiB."""
_QUICK_LINK_BYTES = (2**12, 2**20)
_NARROW, _WIDE = 8, 127
"""Head dims of queries and values with which an answer, 512 bytes a query with its LSE, outweighs its request."""


class Sample(NamedTuple):
    """One point of a fit: median seconds at ``n``, and (max - min) / median over the repeats."""

    n: float
    seconds: float
    spread: float


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that nobody sees."""


def machine() -> Machine:
    """This machine, as profiles name it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Asked of the loaded package: installed metadata may be another checkout's, or none.
    version = getattr(sys.modules[__name__.split(".")[0]], "__version__", "unknown")
    return Machine(processor=_processor(), cores=cores or 1, torch=torch.__version__, fapool=version)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = named or platform.processor() or platform.machine()
    return f"{name} + {torch.cuda.get_device_name()}" if torch.cuda.is_available() else name


@contextmanager
def threads_restored() -> Iterator[None]:
    """torch has as many threads after this as before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_effort(threads: Sequence[int], budget_s: float) -> None:
    """Raises ValueError for numbers of threads, or seconds to measure in, that are none."""
    if not threads or min(threads) < 1:
        raise ValueError(f"threads is {list(threads)}: give at least one number of threads, each 1 or more")
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s}: give the seconds that measuring may take, above 0")


def sample(n: float, timed: Callable[[], float], repeats: int = REPEATS, until: float = math.inf) -> Sample:
    """Measures one point.

    Args:
        n: where on the fit's axis.
        timed: does the work once, and returns the seconds it took.
        repeats: how often to measure, at least; the median counts.
        until: by the performance counter, when to be content with what there is.
    """
    # First runs also pay for threads that wake up and memory that is mapped.
    seconds = [timed()]
    for repeat in range(repeats):
        if time.perf_counter() > until:
            break
        seconds = [*(seconds if repeat else ()), _typical(timed)]
    median = statistics.median(seconds)
    return Sample(n, median, (max(seconds) - min(seconds)) / median)


def _typical(timed: Callable[[], float]) -> float:
    """Median seconds of as many runs as make a while together: single short ones say little."""
    seconds = [timed()]
    while sum(seconds) < _REPEAT_S and len(seconds) < _MOST_RUNS:
        seconds.append(timed())
    return statistics.median(seconds)


def ascend(
    sizes: Sequence[int],
    timed_at: Callable[[int], Callable[[], float]],
    budget_s: float,
    at_least: int,
    growth: int = 1,
    until: float = math.inf,
) -> list[Sample]:
    """Samples at growing sizes, until the next is not expected to fit into the budget.

    Args:
        sizes: rising.
        timed_at: what to time at one of them.
        budget_s: seconds for all of them.
        at_least: so many samples are taken, whatever they cost.
        growth: the power of the size with which time grows.
        until: by the performance counter, when to be content with what there is, but for the first sample.
    """
    samples: list[Sample] = []
    spent_s = last_s = 0.0
    for size in sizes:
        expected_s = last_s * (size / samples[-1].n) ** growth if samples else 0.0
        if len(samples) >= at_least and spent_s + expected_s > budget_s:
            break
        began = time.perf_counter()
        if samples and began > until:
            break
        samples.append(sample(size, timed_at(size), until=until))
        last_s = time.perf_counter() - began
        spent_s += last_s
    return samples


def fitted(samples: Sequence[Sample], powers: Sequence[int]) -> Fit:
    """The fit of these samples, with their spread; of too few samples only the highest powers."""
    fit = least_squares([point[:2] for point in samples], powers[-len(samples) :])
    return fit.model_copy(update={"spread": max(point.spread for point in samples)})


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
        device: where the kernels run. CUDA is written and has never run.
        until: by the performance counter, when to be content with what there is.

    Raises:
        ValueError: no threads, or no time.
    """
    check_effort(threads, budget_s)
    device, costs = torch.device(device), []
    cases = list(itertools.product(_kernels(shape, device, softcap, quick), threads))
    with threads_restored(), torch.no_grad():
        for done, ((kernel, dtype), count) in enumerate(cases):
            name = str(dtype).removeprefix("torch.")
            progress(f"attention: {kernel}, {name}, {count} thread(s)", done, len(cases))
            torch.set_num_threads(count)
            bench = _Attention(shape, kernel, dtype, device, softcap)
            longest = _DENSE_LONGEST if kernel == "dense" else max(_LENGTHS)
            lengths = [n for n in (_QUICK_LENGTHS if quick else _LENGTHS) if n <= longest]
            keys = _KEYS[::2] if quick else _KEYS
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
        return [(pick_kernel(device.type, own, head_dim, softcap=softcap > 0), own)]
    found = []
    for dtype in dict.fromkeys((own, torch.float32, torch.bfloat16)):
        best = pick_kernel(device.type, dtype, head_dim, softcap=softcap > 0)
        names = available_kernels(device.type, dtype, head_dim)
        # The best able one, and those after it: only the last, dense, is left where softcap rules others out.
        found += [(name, dtype) for name in names[names.index(best) :]]
    return found


class _Attention:
    """One kernel on random tensors, laid out as models hand them over."""

    def __init__(self, shape: Shape, kernel: str, dtype: torch.dtype, device: torch.device, softcap: float) -> None:
        self.shape, self.kernel, self.softcap = shape, kernel, softcap
        self.dtype, self.device = dtype, device
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
        began = time.perf_counter()
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
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began


def measure_link(rank: PoolRank, progress: Progress = silent, *, quick: bool = False) -> LinkCost:
    """Messages to a leased pool rank and back, timed at the base; what the rank computes is taken off.

    The way there is a request without tiles, answered with nothing. The way back is the answer to narrow queries
    with wide values. Both are timed as round trips, and so are the errors. What a message costs the processor is
    counted at the base, for its own end, and taken to be the same at the other.

    Args:
        rank: leased and opened; its link must be idle.
        progress: told after each of both ways.
        quick: at fewer sizes.

    Raises:
        LinkLost: the rank is gone.
        RuntimeError: the rank refuses, because its lease is over.
    """
    sizes = _QUICK_LINK_BYTES if quick else _LINK_BYTES

    def asking_bytes(nbytes: int) -> int:
        return 4 * (_NARROW * (nbytes // (4 * (_WIDE + 1))) + _NARROW + _WIDE)

    # Threads of a kernel that wait for work would count as busy.
    with threads_restored():
        torch.set_num_threads(1)
        progress("link: to the pool rank", 0, 2)
        sent = [(4 * (_NARROW + (_NARROW + _WIDE) * _keys(size)), _request(rank, size)) for size in sizes]
        there = fitted([sample(*one) for one in sent], (0, 1))
        sending = fitted([_processor_sample(*one) for one in sent], (0, 1))
        progress("link: back to the base", 1, 2)

        def back(nbytes: int) -> Callable[[], float]:
            queries = nbytes // (4 * (_WIDE + 1))
            request = _request(rank, 4 * _NARROW * queries, queries)
            asking_s = there.b * asking_bytes(nbytes)

            def timed() -> float:
                seconds = request()
                return max(seconds - asking_s, seconds / 2)  # asking may have been quicker than its fit

            return timed

        back_again = fitted([sample(size, back(size)) for size in sizes], (0, 1))
        taking = fitted([_processor_sample(size, back(size), sending.b * asking_bytes(size)) for size in sizes], (0, 1))
        progress("link", 2, 2)
    # An empty message takes half an empty round trip.
    halves = (fit.model_copy(update={"a": fit.a / 2}) for fit in (there, back_again, sending, taking))
    return LinkCost(**dict(zip(("to_rank", "to_base", "send", "take"), halves, strict=True)))


def _processor_sample(n: float, work: Callable[[], float], known_s: float = 0.0) -> Sample:
    """Processor seconds of all threads of this process while ``work`` is done, less those that are ``known_s``."""

    def timed() -> float:
        began = time.process_time()
        work()
        spent = time.process_time() - began
        return max(spent - known_s, spent / 2)

    return sample(n, timed)


def _keys(nbytes: int) -> int:
    """How many keys and values have about so many bytes."""
    return 1 + nbytes // 4 // (_NARROW + _WIDE)


def _request(rank: PoolRank, nbytes: int, queries: int = 0) -> Callable[[], float]:
    """A request with ``nbytes`` bytes, or a few more: of keys that its only tile does not use, or of queries against
    one key. Returns a function that sends it, waits for the answer, and returns the seconds without those that the
    rank computed."""
    keys = 1 if queries else _keys(nbytes)
    tile = Tile(0, 1, 0, 1, 0, queries or 1, 0, 1)
    q = torch.zeros(nbytes // 4 if queries else _NARROW)
    k, v = torch.zeros(keys * _NARROW), torch.zeros(keys * _WIDE)
    tiles = torch.tensor([[*tile, 0, keys, 0]])
    header = Header(
        op=Op.ATTEND,
        dtype=dtype_code(torch.float32),
        tiles=1,
        q_elements=q.numel(),
        k_elements=k.numel(),
        v_elements=v.numel(),
        head_dim=_NARROW,
        v_head_dim=_WIDE,
        group=1,
        scale_bits=float_bits(1.0),
    )

    def timed() -> float:
        began = time.perf_counter()
        answer = rank.answer(rank.ask(header, (tiles, q, k, v), expected(header, [tile])))
        seconds = time.perf_counter() - began
        if answer.header.status != Status.OK:
            status = Status(answer.header.status).name
            raise RuntimeError(f"pool rank {rank.number} answered {status}: its lease is over; open it again")
        return seconds - answer.header.extra / 1e9

    return timed
