"""One process, two streams: a pool rank in a thread of the base's own process, and how much of the two is at a time.

    thread of the base   its stream:   projections, FFN, its own share ──▶     what no pool would lose to is its time
    thread of the rank   its stream:       attention ──▶
    trace                ├─ one ─┼─ both ─┼─ one ─┤

There is nothing to win on one GPU: what is lost is what pooling itself costs. Where several lanes are busy is read from
a profiler's trace: streams of a device, threads in a rehearsal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.ring import RING_BYTES
from tests.gpu.pooled import _ids, _last, _pooled, model
from tests.gpu.report import Missing, Report
from tests.thread_pool import ThreadPool

MOST_LOST = 0.03


class Span(NamedTuple):
    """When a lane was busy, in microseconds."""

    lane: int
    start: float
    stop: float


def run(report: Report) -> None:
    half = model(report)
    half = half.to(torch.bfloat16) if report.device.type == "cuda" else half
    ids = _ids(report, half, 1, report.size(16384, 512))
    pool = type("StreamPool", (StreamPool,), {"device": report.device})
    with torch.no_grad(), report.part("a pool rank in a thread"):
        plain = report.timed(partial(_last, half, ids), 3)
        report.figure(f"prefill {ids.shape[1]}, plain", plain, "s")
        with _pooled(half, blocks=8) as ours:
            ours.fa_pool._make_pool = pool
            seconds = report.timed(partial(_last, ours, ids), 3)
            report.figure(f"prefill {ids.shape[1]}, rank in a thread", seconds, "s")
            report.figure("lost to pooling", seconds / plain - 1, f"of the time; {MOST_LOST} is the goal")
            stats = ours.fa_pool.stats()
            carriers = {rank["carrier"] for rank in stats["ranks"]}
            fine = stats["prefill"]["pooled_calls"] > 0 and not stats["faults"]
            report.passed("it was pooled", fine, f"{stats['faults']} faults, {carriers}, {stats['local_reasons']}")
            _traced(report, partial(_last, ours, ids))


class StreamPool(ThreadPool):
    """Ranks in threads, each with a stream of its own as the current one."""

    ring_bytes = RING_BYTES

    def serve(self, worker: Worker, ends: list[Link]) -> None:
        torch.set_grad_enabled(False)
        if self.device.type != "cuda":
            super().serve(worker, ends)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
            super().serve(worker, ends)


def _traced(report: Report, work: Any) -> None:
    on_gpu = report.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as traced:
        work()
    spans = _spans(traced, on_gpu)
    if len({span.lane for span in spans}) < 2:
        raise Missing(f"the trace has {len(spans)} spans of one lane: nothing to hold against each other")
    busy, both = busy_and_both(spans)
    report.figure("busy, by the trace", busy / 1e6, "s")
    report.figure("two lanes or more at a time", both / busy, "of that")
    if on_gpu:
        path = Path(tempfile.mkdtemp(prefix="fapool-trace-")) / "overlap.json"
        traced.export_chrome_trace(str(path))
        report.passed("trace", path.stat().st_size > 0, str(path))


def _spans(traced: Any, on_gpu: bool) -> list[Span]:
    """Kernels and copies by stream; in a rehearsal the host's outermost operators by thread."""
    found = []
    for event in traced.events():
        is_device = event.device_type == torch.autograd.DeviceType.CUDA
        if is_device == on_gpu and (on_gpu or event.cpu_parent is None):
            lane = event.device_resource_id if on_gpu else event.thread
            found.append(Span(lane, event.time_range.start, event.time_range.end))
    return found


def busy_and_both(spans: Iterable[Span]) -> tuple[float, float]:
    """How long any lane was busy, and how long two or more were."""
    ends = sorted(edge for span in spans for edge in ((span.start, 1, span.lane), (span.stop, -1, span.lane)))
    open_spans: dict[int, int] = {}
    busy = both = last = 0.0
    for at, change, lane in ends:
        lanes = sum(count > 0 for count in open_spans.values())
        busy += (at - last) * (lanes > 0)
        both += (at - last) * (lanes > 1)
        last = at
        open_spans[lane] = open_spans.get(lane, 0) + change
    return busy, both
