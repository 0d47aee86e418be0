"""A job's ``stats()``, or what ranks of a pool say, for Prometheus: a loopback endpoint, read when it is asked.

Knows the keys of both and nothing of who counts. The client library, an extra, is imported on first use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from wsgiref.simple_server import WSGIServer

    from prometheus_client import Metric

HOST = "127.0.0.1"
PHASES = ("prefill", "decode", "training", "backward")
STATES = ("idle", "activating", "active", "draining", "closed")
RANK_STATES = ("waiting", "starting", "free", "leased", "leaving", "ended", "failed", "other version")
"""Of a standing rank; waiting: it has no place yet, or does not answer."""


class Server:
    """The endpoint ``http://127.0.0.1:{port}/metrics``. A context manager; ends with the process at the latest."""

    def __init__(self, http: WSGIServer, thread: threading.Thread) -> None:
        self.port: int = http.server_port
        self._http, self._thread = http, thread

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the port and ends the thread. Harmless when repeated."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()


def serve(read: Callable[[], Any], port: int, metrics: Callable[[Any], Iterator[Metric]] | None = None) -> Server:
    """Serves what ``read`` returns, on this machine only.

    Args:
        read: called once now and at every scrape, in another thread; :meth:`ResourceManager.stats` or its like.
        port: 0 for any free one, see :attr:`Server.port`.
        metrics: turns that into metrics; default: :func:`of_job`.

    Raises:
        ModuleNotFoundError: the client library is missing.
        ValueError: ``port`` is none.
        OSError: it cannot be had, as a rule because it is in use.
    """
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port < 2**16:
        raise ValueError(f"port is {port!r}; it must be an integer from 0 (any free port) to {2**16 - 1}")
    try:
        import prometheus_client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "metrics for Prometheus need prometheus_client: pip install fapool-plugin[metrics]", name=error.name
        ) from None
    # A registry of its own: the library's default one adds numbers about this process that were not asked for.
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(_Collector(read, metrics or of_job))
    try:
        http, thread = prometheus_client.start_http_server(port, HOST, registry)
    except OSError as error:
        told = f"metrics cannot be served on port {port} of {HOST} ({error.strerror})"
        raise OSError(error.errno, f"{told}: choose another port, or 0 for any free one") from None
    return Server(http, thread)


class _Collector:
    """What the client library asks at every scrape."""

    def __init__(self, read: Callable[[], Any], metrics: Callable[[Any], Iterator[Metric]]) -> None:
        self._read, self._metrics = read, metrics

    def collect(self) -> Iterator[Metric]:
        """Everything at one moment."""
        return self._metrics(self._read())


def of_job(stats: dict[str, Any]) -> Iterator[Metric]:
    """One ``stats()`` as metrics. Counters of Prometheus are named ..._total by its library."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    calls = CounterMetricFamily(
        "fapool_attention_calls",
        "One attention layer in one forward, or in one block of it, is one call; pooled: a pool rank computed at "
        "least one tile.",
        labels=["phase", "where"],
    )
    forwards = CounterMetricFamily(
        "fapool_forwards", "Forwards, by what was decided for them.", labels=["phase", "where"]
    )
    seconds = CounterMetricFamily(
        "fapool_seconds",
        "Seconds that forwards took by the plan (predicted) and by the clock (measured).",
        labels=["phase", "kind"],
    )
    for phase in PHASES:
        for where in ("pooled", "local"):
            calls.add_metric([phase, where], stats[phase][f"{where}_calls"])
            forwards.add_metric([phase, where], stats[phase][f"{where}_forwards"])
        for kind in ("predicted", "measured"):
            if f"{kind}_s" in stats[phase]:
                seconds.add_metric([phase, kind], stats[phase][f"{kind}_s"])
    yield from (calls, forwards, seconds)

    moved = CounterMetricFamily(
        "fapool_bytes",
        "Bytes between the base and a pool rank, as the base sees them.",
        labels=["rank", "direction"],
    )
    compute = CounterMetricFamily(
        "fapool_rank_compute_seconds",
        "Seconds a pool rank spent computing, as it measured them.",
        labels=["rank"],
    )
    kept = CounterMetricFamily(
        "fapool_rank_kept_calls",
        "Training calls that a pool rank kept, had no room for (unkept), and was asked for again (reused).",
        labels=["rank", "what"],
    )
    for rank in stats["ranks"]:
        number = str(rank["rank"])
        moved.add_metric([number, "sent"], rank["bytes_sent"])
        moved.add_metric([number, "received"], rank["bytes_received"])
        compute.add_metric([number], rank["compute_s"])
        for what in ("kept", "unkept", "reused"):
            kept.add_metric([number, what], rank[f"{what}_calls"])
    yield from (moved, compute, kept)

    yield CounterMetricFamily("fapool_faults", "Pool ranks that were lost.", value=stats["faults"])
    yield CounterMetricFamily("fapool_activations", "Leases taken.", value=stats["activations"])
    yield CounterMetricFamily("fapool_releases", "Leases given back.", value=stats["releases"])
    yield GaugeMetricFamily("fapool_leased_ranks", "Pool ranks held now.", value=len(stats["leased_ranks"]))
    state = GaugeMetricFamily("fapool_state", "1 for the state the pool is in, 0 for the others.", labels=["state"])
    for name in dict.fromkeys((*STATES, stats["state"])):
        state.add_metric([name], name == stats["state"])
    yield state


def of_standing_ranks(ranks: list[dict[str, Any]]) -> Iterator[Metric]:
    """What ranks of a standing pool say of themselves, as ``fapool pool status --json`` lists them."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    states = GaugeMetricFamily("fapool_pool_ranks", "Ranks of a standing pool, by their state.", labels=["state"])
    for state in RANK_STATES:
        states.add_metric([state], sum(rank["state"] == state for rank in ranks))
    requests = CounterMetricFamily(
        "fapool_pool_rank_requests", "Requests that a rank's worker has answered since its start.", labels=["rank"]
    )
    busy = CounterMetricFamily(
        "fapool_pool_rank_busy_seconds", "Seconds that it spent answering them.", labels=["rank"]
    )
    held = GaugeMetricFamily("fapool_pool_rank_held_bytes", "Keys and values that a rank holds now.", labels=["rank"])
    leased = GaugeMetricFamily(
        "fapool_pool_rank_lease_seconds", "How old a rank's lease is; 0: no job has it.", labels=["rank"]
    )
    starts = CounterMetricFamily(
        "fapool_pool_rank_starts",
        "Workers that a rank has started: the first, and one for each that died.",
        labels=["rank"],
    )
    shown: dict[str, CounterMetricFamily | GaugeMetricFamily]
    shown = {"requests": requests, "busy_s": busy, "held_bytes": held, "leased_s": leased, "lives": starts}
    for rank in ranks:
        for key, metric in shown.items():
            if key in rank:  # a rank without a place says nothing
                metric.add_metric([str(rank["rank"])], rank[key])
    yield from (states, *shown.values())
