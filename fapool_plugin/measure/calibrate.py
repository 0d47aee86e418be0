"""Measures: samples of growing sizes, their fits, and what a link to a leased pool rank costs on this machine.

Knows no model, nor what a plan makes of the numbers; what attention costs is in attention.
"""

from __future__ import annotations

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

from fapool_plugin.base.lease import PoolRank, expected
from fapool_plugin.devices.clock import Clock
from fapool_plugin.devices.copies import Copies, brought, sendable
from fapool_plugin.devices.gpu import CPU
from fapool_plugin.plan.line import Tile
from fapool_plugin.plan.profile import Fit, LinkCost, Machine, Profile, least_squares
from fapool_plugin.wire.messages import Header, Op, Status, dtype_code, float_bits

Progress = Callable[[str, int, int | None], object]
"""Called with what is being measured, how much of it is done, and of how much (None: not known)."""

REPEATS = 3
_REPEAT_S, _MOST_RUNS = 0.01, 100
"""Runs shorter than so many seconds are done several times for one repeat."""
_LINK_BYTES = tuple(4096 * 4**power for power in range(7))
"""4 KiB to 16 MiB."""
_QUICK_LINK_BYTES = (2**12, 2**20)
_DEVICE_LINK_BYTES = (*_LINK_BYTES, 2**26)
_QUICK_DEVICE_LINK_BYTES = (2**12, 2**26)
"""A block of 2,048 tokens of Llama-3-8B has 16 MiB of queries in a layer."""
_AND = " + "
"""Before a GPU's name."""
_NARROW, _WIDE = 8, 127
"""Head dims of queries and values with which an answer, 512 bytes a query with its LSE, outweighs its request."""


class Sample(NamedTuple):
    """One point of a fit: median seconds at ``n``, and (max - min) / median over the repeats."""

    n: float
    seconds: float
    spread: float


def silent(stage: str, done: int, total: int | None) -> None:
    """Progress that is not shown."""


def machine(device: torch.device = CPU) -> Machine:
    """This machine, as profiles of a model on ``device`` name it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Asked of the loaded package: installed metadata may be another checkout's, or none.
    version = getattr(sys.modules[__name__.split(".")[0]], "__version__", "unknown")
    return Machine(processor=_processor(device), cores=cores or 1, torch=torch.__version__, fapool=version)


def machine_of(profile: Profile | None) -> Machine:
    """This machine, with a GPU if the profile was taken on one here."""
    on_gpu = profile is not None and _AND in profile.machine.processor and torch.cuda.is_available()
    return machine(torch.device("cuda" if on_gpu else "cpu"))


def _processor(device: torch.device) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = named or platform.processor() or platform.machine()
    return f"{name}{_AND}{torch.cuda.get_device_name(device)}" if device.type == "cuda" else name


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


def fitted(samples: Sequence[Sample], powers: Sequence[int], *, steps: bool = False) -> Fit:
    """The fit of these samples, with their spread; of too few samples only the highest powers.

    Args:
        samples: by growing size.
        powers: of the size, as :func:`least_squares` takes them.
        steps: the curve has steps, so the samples themselves are kept and hold between them.
    """
    points = [point[:2] for point in samples]
    fit = least_squares(points, powers[-len(samples) :])
    kept = {"points": tuple(points), "error": 0.0} if steps else {}
    return fit.model_copy(update={"spread": max(point.spread for point in samples), **kept})


def measure_link(
    rank: PoolRank, progress: Progress = silent, *, quick: bool = False, device: torch.device = CPU
) -> LinkCost:
    """Messages to a leased pool rank and back, timed at the base; what the rank computes is taken off.

    The way there is a request without tiles, answered with nothing. The way back is the answer to narrow queries
    with wide values. Both are timed as round trips, and so are the errors. What a message costs the processor is
    counted at the base, for its own end, and taken to be the same at the other.

    Args:
        rank: leased and opened; its link must be idle.
        progress: told after each of both ways.
        quick: at fewer sizes.
        device: where the base's tensors are. From a GPU the way begins and ends there, and sizes are larger. CUDA is
            written and has never run.

    Raises:
        LinkLost: the rank is gone.
        RuntimeError: the rank refuses, because its lease is over.
    """
    sizes = _QUICK_LINK_BYTES if quick else _LINK_BYTES
    if device.type == "cuda":
        sizes = _QUICK_DEVICE_LINK_BYTES if quick else _DEVICE_LINK_BYTES

    def asking_bytes(nbytes: int) -> int:
        return 4 * (_NARROW * (nbytes // (4 * (_WIDE + 1))) + _NARROW + _WIDE)

    # Threads of a kernel that wait for work would count as busy.
    with threads_restored():
        torch.set_num_threads(1)
        progress("link: to the pool rank", 0, 2)
        sent = [(4 * (_NARROW + (_NARROW + _WIDE) * _keys(size)), _request(rank, size, 0, device)) for size in sizes]
        there = fitted([sample(*one) for one in sent], (0, 1))
        sending = fitted([_processor_sample(*one) for one in sent], (0, 1))
        progress("link: back to the base", 1, 2)

        def back(nbytes: int) -> Callable[[], float]:
            queries = nbytes // (4 * (_WIDE + 1))
            request = _request(rank, 4 * _NARROW * queries, queries, device)
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


def _request(rank: PoolRank, nbytes: int, queries: int, device: torch.device) -> Callable[[], float]:
    """A request with ``nbytes`` bytes, or a few more: of keys that its only tile does not use, or of queries against
    one key. Returns a function that sends it, waits for the answer, and returns the seconds without those that the
    rank computed."""
    keys = 1 if queries else _keys(nbytes)
    tile = Tile(0, 1, 0, 1, 0, queries or 1, 0, 1)
    q = torch.zeros(nbytes // 4 if queries else _NARROW, device=device)
    k, v = torch.zeros(keys * _NARROW, device=device), torch.zeros(keys * _WIDE, device=device)
    copies, clock = Copies() if device.type == "cuda" else None, Clock(device)
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
        sent = sendable(copies, (tiles, q, k, v), rank.link.carrier.takes)
        answer = rank.answer(rank.ask(header, sent, expected(header, [tile])))
        brought(copies, answer.tensors, device)
        clock.now().wait()
        seconds = time.perf_counter() - began
        if answer.header.status != Status.OK:
            status = Status(answer.header.status).name
            raise RuntimeError(f"pool rank {rank.number} answered {status}: its lease is over; open it again")
        return seconds - answer.header.extra / 1e9

    return timed
