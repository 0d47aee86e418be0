"""Links between a base and a pool rank that share the GPU: what a message takes, and what a rank's death leaves."""

from __future__ import annotations

import importlib.util
import os
import secrets
import signal
import statistics
import threading
import time
from typing import Literal

import torch

from fapool_plugin.base.lease import PoolRank
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.cudart import Cudart
from fapool_plugin.measure.calibrate import _request, measure_link
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.ranks.local import LocalPool
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.ring import RING_BYTES, Ring
from tests.gpu.remote import RemotePool
from tests.gpu.report import Missing, Report

CARRIERS: tuple[Literal["inline", "shm", "ipc", "nixl"], ...] = ("inline", "shm", "ipc", "nixl")
SMALL_BYTES = 4096


def run(report: Report) -> None:
    with report.part("copies"):
        _copies(report)
    with report.part("a ring, registered"):
        _registered(report)
    for carrier in CARRIERS:
        config = FAPoolConfig(pool_ranks=1, timeout_s=10.0, start_timeout_s=60.0, carrier=carrier)
        pool = RemotePool(config) if carrier == "nixl" else LocalPool(config)
        try:
            with report.part(f"carrier {carrier}"):
                if carrier == "ipc" and report.device.type != "cuda":
                    raise Missing("no CUDA device")
                if carrier == "nixl" and importlib.util.find_spec("nixl") is None:
                    raise Missing("nixl is not installed")
                rank, seconds, opened_s = _leased(report, pool)
                agreed = rank.counters.carrier == carrier
                tried = ", every byte of both rings tried" if carrier in ("ipc", "nixl") else ""
                report.passed(f"carrier {carrier} is agreed on{tried}", agreed, "; ".join(rank.link.terms.notes))
                report.figure("first pool rank ready", seconds, "s")
                report.figure(f"{carrier}, its lease opened{tried}", opened_s * 1e3, "ms")
                small = _request(rank, SMALL_BYTES, 0, report.device)
                trips = [small() for _ in range(report.size(200, 20))]
                report.figure(f"{carrier}, {SMALL_BYTES} bytes there and back", statistics.median(trips) * 1e6, "us")
                cost = measure_link(rank, device=report.device)
                for way, fit in (("to the rank", cost.to_rank), ("to the base", cost.to_base)):
                    report.figure(f"{carrier}, {way}: an empty message", fit.a * 1e6, "us")
                    report.figure(f"{carrier}, {way}", 1e-9 / fit.b if fit.b else float("nan"), "GB/s")
            with report.part(f"a rank killed under load, {carrier}"):
                if not pool.pids():
                    raise Missing("there was no such link")
                _killed(report, pool, rank)
        finally:
            pool.close()


def _registered(report: Report) -> None:
    """Copies between the device and a ring, as bodies will go: page-locked where CUDA takes memory of this kind."""
    if report.device.type != "cuda":
        report.skipped("a ring, registered", "no CUDA device")
        return
    ring, _ = Ring.made(RING_BYTES)
    device, problem = Cudart.of(report.device), "the runtime is not found by its name"
    there = torch.empty(RING_BYTES, dtype=torch.uint8, device=report.device)
    here = torch.frombuffer(ring.part(0, RING_BYTES).data, dtype=torch.uint8)
    for kind in ("as it is", "registered"):
        report.figure(
            f"from the device to a ring, {kind}", RING_BYTES / report.timed(lambda: here.copy_(there)) / 1e9, "GB/s"
        )
        if device is not None and kind == "as it is":
            problem = ring.register(device)
    report.passed("CUDA takes a ring as page-locked", not problem and here.is_pinned(), problem)
    ring.unregister()
    report.passed("and lets go of it", not here.is_pinned())


def _copies(report: Report) -> None:
    """Between device and host, as every carrier but ipc has to copy: its bandwidth is the most that they can give."""
    if report.device.type != "cuda":
        report.skipped("copies", "no CUDA device")
        return
    there = torch.empty(2**28, dtype=torch.uint8, device=report.device)
    for kind, here in (("pageable", torch.empty(2**28, dtype=torch.uint8)), ("pinned", None)):
        host = here if here is not None else torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        for way, work in (
            ("from the device", lambda host=host: host.copy_(there)),
            ("to the device", lambda host=host: there.copy_(host)),
        ):
            report.figure(f"copy {way}, {kind}", 2**28 / report.timed(work) / 1e9, "GB/s")


def _killed(report: Report, pool: LocalPool | RemotePool, rank: PoolRank) -> None:
    killer = threading.Timer(0.5, os.kill, (pool.pids()[0], signal.SIGKILL))
    killed = time.perf_counter() + 0.5
    killer.start()
    try:
        while True:
            measure_link(rank, quick=True, device=report.device)
    except LinkLost:
        report.figure("a rank's death is known after, at most", time.perf_counter() - killed, "s")
    x = torch.ones(1 << 20, device=report.device)
    report.passed("the context still works", float((x * 2).sum()) == 2.0 * x.numel())
    again, seconds, _ = _leased(report, pool)
    same = again.counters.carrier == rank.counters.carrier
    report.passed("a new link works", same and _request(again, 1 << 20, 0, report.device)() > 0, f"in {seconds:.2f} s")


def _leased(report: Report, pool: LocalPool | RemotePool) -> tuple[PoolRank, float, float]:
    """A rank, the seconds that it took, and those of its lease among them."""
    began = time.perf_counter()
    rank = PoolRank(0, pool.acquire(lambda text: None, report.device)[0], secrets.randbits(62), RankCounters(0))
    there = time.perf_counter()
    rank.open(device=report.device, carrier=pool.config.carrier)
    return rank, time.perf_counter() - began, time.perf_counter() - there
