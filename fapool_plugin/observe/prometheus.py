"""``stats()`` for Prometheus: a loopback endpoint whose numbers are read when they are asked for.

Knows the keys of ``stats()`` and nothing of who counts. The client library, an extra, is imported on first use.
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


def serve(stats: Callable[[], dict[str, Any]], port: int) -> Server:
    """Serves ``stats()``, on this machine only.

    Args:
        stats: called once now and at every scrape, in another thread; :meth:`ResourceManager.stats` or its like.
        port: 0 for any free one, see :attr:`Server.port`.

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
    # A registry of its own: the library's default one adds numbers about this process that nobody asked for.
    registry = prometheus_client.CollectorRegistry(auto_describe=True)
    registry.register(_Collector(stats))
    try:
        http, thread = prometheus_client.start_http_server(port, HOST, registry)
    except OSError as error:
        told = f"metrics cannot be served on port {port} of {HOST} ({error.strerror})"
        raise OSError(error.errno, f"{told}: choose another port, or 0 for any free one") from None
    return Server(http, thread)


class _Collector:
    """Turns one ``stats()`` into metrics. Counters of Prometheus are named ..._total by its library."""

    def __init__(self, stats: Callable[[], dict[str, Any]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Everything at one moment."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        stats = self._stats()
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
