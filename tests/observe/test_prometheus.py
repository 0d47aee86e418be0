"""What a scrape over loopback shows is what stats() says at that moment, and nothing stays behind."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from typing import Any, get_args

import psutil
import pytest

from fapool_plugin.base.resource_manager import ResourceManager, State
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.observe.metrics import Counters
from fapool_plugin.observe.prometheus import HOST, STATES, Server, serve
from tests.thread_pool import ThreadPool

NAMES = {
    "fapool_attention_calls_total",
    "fapool_forwards_total",
    "fapool_seconds_total",
    "fapool_bytes_total",
    "fapool_rank_compute_seconds_total",
    "fapool_rank_kept_calls_total",
    "fapool_faults_total",
    "fapool_activations_total",
    "fapool_releases_total",
    "fapool_leased_ranks",
    "fapool_state",
}
SAMPLE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)")
pytestmark = pytest.mark.timeout(60)


def page(server: Server) -> str:
    # Not through a proxy, whatever the machine is set up with.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{HOST}:{server.port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def scrape(server: Server) -> dict[tuple[str, ...], float]:
    """(name, label=value, ...) -> number; read by hand, not by the library that wrote it."""
    found = {}
    for line in page(server).splitlines():
        if not line.startswith("#"):
            parts = SAMPLE.fullmatch(line)
            assert parts, line
            labels = [label.replace('"', "") for label in (parts["labels"] or "").split(",") if label]
            found[(parts["name"], *sorted(labels))] = float(parts["value"])
    return found


def counted() -> dict[str, Any]:
    """stats() with a different number everywhere."""
    counters = Counters()
    counters.prefill.pooled_calls, counters.prefill.local_calls = 11, 12
    counters.prefill.pooled_forwards, counters.prefill.local_forwards = 13, 14
    counters.decode.pooled_calls, counters.decode.local_calls = 21, 22
    counters.decode.pooled_forwards, counters.decode.local_forwards = 23, 24
    counters.training.pooled_calls, counters.training.local_calls = 111, 112
    counters.training.pooled_forwards, counters.training.local_forwards = 113, 114
    counters.backward.pooled_calls, counters.backward.local_calls = 121, 122
    counters.backward.pooled_forwards, counters.backward.local_forwards = 123, 124
    counters.activations, counters.releases, counters.faults = 31, 32, 33
    for rank in (0, 3):
        mine = counters.rank(rank)
        mine.bytes_sent, mine.bytes_received, mine.compute_s = 2**40 + rank, 50 + rank, 60.25 + rank
        mine.kept_calls, mine.unkept_calls, mine.reused_calls = 81 + rank, 91 + rank, 101 + rank
    stats = counters.as_dict() | {"state": "active", "threshold": 4096, "leased_ranks": [0, 3]}
    stats["prefill"] |= {"predicted_s": 71.5, "measured_s": 72.5}
    stats["decode"] |= {"predicted_s": 0.25, "measured_s": 0.75}
    stats["training"] |= {"predicted_s": 1.25, "measured_s": 1.75}
    stats["backward"] |= {"predicted_s": 2.25, "measured_s": 2.75}
    return stats


def test_a_scrape_shows_every_number_of_stats() -> None:
    stats = counted()
    with serve(lambda: stats, 0) as server:
        found = scrape(server)
    expected: dict[tuple[str, ...], float] = {
        ("fapool_activations_total",): 31,
        ("fapool_releases_total",): 32,
        ("fapool_faults_total",): 33,
        ("fapool_leased_ranks",): 2,
    }
    for phase, tens in (("prefill", 10), ("decode", 20), ("training", 110), ("backward", 120)):
        expected["fapool_attention_calls_total", f"phase={phase}", "where=pooled"] = tens + 1
        expected["fapool_attention_calls_total", f"phase={phase}", "where=local"] = tens + 2
        expected["fapool_forwards_total", f"phase={phase}", "where=pooled"] = tens + 3
        expected["fapool_forwards_total", f"phase={phase}", "where=local"] = tens + 4
    expected["fapool_seconds_total", "kind=predicted", "phase=prefill"] = 71.5
    expected["fapool_seconds_total", "kind=measured", "phase=prefill"] = 72.5
    expected["fapool_seconds_total", "kind=predicted", "phase=decode"] = 0.25
    expected["fapool_seconds_total", "kind=measured", "phase=decode"] = 0.75
    expected["fapool_seconds_total", "kind=predicted", "phase=training"] = 1.25
    expected["fapool_seconds_total", "kind=measured", "phase=training"] = 1.75
    expected["fapool_seconds_total", "kind=predicted", "phase=backward"] = 2.25
    expected["fapool_seconds_total", "kind=measured", "phase=backward"] = 2.75
    for rank in (0, 3):
        expected["fapool_bytes_total", "direction=sent", f"rank={rank}"] = 2**40 + rank
        expected["fapool_bytes_total", "direction=received", f"rank={rank}"] = 50 + rank
        expected["fapool_rank_compute_seconds_total", f"rank={rank}"] = 60.25 + rank
        for what, number in (("kept", 81), ("unkept", 91), ("reused", 101)):
            expected["fapool_rank_kept_calls_total", f"rank={rank}", f"what={what}"] = number + rank
    for state in STATES:
        expected["fapool_state", f"state={state}"] = state == "active"
    assert found == expected, set(found.items()) ^ set(expected.items())


def test_every_metric_says_what_it_is() -> None:
    with serve(counted, 0) as server:
        text = page(server)
    said = dict(re.findall(r"^# HELP (\w+) (.+)$", text, re.MULTILINE))
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    assert said.keys() == kinds.keys() == NAMES
    assert all(len(words) > 10 for words in said.values()), said
    assert {name for name, kind in kinds.items() if kind == "gauge"} == {"fapool_leased_ranks", "fapool_state"}
    assert {name for name, kind in kinds.items() if kind == "counter"} == {n for n in NAMES if n.endswith("_total")}


def test_stats_of_a_manager_are_read_at_every_scrape() -> None:
    with ResourceManager(FAPoolConfig(), ThreadPool) as manager, serve(manager.stats, 0) as server:
        before = scrape(server)
        manager.counters.faults += 3
        manager.counters.rank(5).bytes_sent += 7
        after = scrape(server)
        manager.close()
        closed = scrape(server)
    assert before["fapool_state", "state=idle"] == 1
    assert before["fapool_faults_total",] == 0
    assert not [key for key in before if "rank=5" in key]
    assert after["fapool_faults_total",] == 3
    assert after["fapool_bytes_total", "direction=sent", "rank=5"] == 7
    assert (closed["fapool_state", "state=idle"], closed["fapool_state", "state=closed"]) == (0, 1)


def test_knows_every_state() -> None:
    assert get_args(State) == STATES
    stats = counted() | {"state": "thinking"}
    with serve(lambda: stats, 0) as server:
        states = {key[1]: value for key, value in scrape(server).items() if key[0] == "fapool_state"}
    assert states == {f"state={state}": 0 for state in STATES} | {"state=thinking": 1}


def test_seconds_are_left_out_where_nobody_counts_them() -> None:
    stats = counted()
    for phase in ("prefill", "decode", "training", "backward"):
        stats[phase] = {key: value for key, value in stats[phase].items() if not key.endswith("_s")}
    with serve(lambda: stats, 0) as server:
        assert not [key for key in scrape(server) if key[0] == "fapool_seconds_total"]


def test_one_metric_may_be_asked_for() -> None:
    with serve(counted, 0) as server:
        url = f"http://{HOST}:{server.port}/metrics?name[]=fapool_faults_total"
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    assert lines == ["fapool_faults_total 33.0"]


def test_listens_on_loopback_only() -> None:
    with serve(counted, 0) as server:
        listening = [
            each.laddr.ip
            for each in psutil.Process().net_connections("inet")
            if each.status == psutil.CONN_LISTEN and each.laddr.port == server.port
        ]
    assert listening == ["127.0.0.1"]


def test_close_frees_the_port_and_ends_the_thread() -> None:
    before = set(threading.enumerate())
    server = serve(counted, 0)
    scrape(server)
    assert set(threading.enumerate()) > before
    server.close()
    server.close()
    left = [thread for thread in set(threading.enumerate()) - before if thread is server._thread or not thread.daemon]
    assert not left, left
    with pytest.raises(urllib.error.URLError, match="refused"):
        page(server)
    with serve(counted, server.port) as again:
        assert again.port == server.port
        scrape(again)


def test_a_busy_port_is_named() -> None:
    before = set(threading.enumerate())
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=rf"port {port} of 127\.0\.0\.1 \(Address already in use\): choose another"):
            serve(counted, port)
    assert set(threading.enumerate()) == before
    with serve(counted, port) as server:
        assert server.port == port


@pytest.mark.parametrize("port", [-1, 65536, 1.5, "9000", True, None])
def test_refuses_what_is_no_port(port: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"port is {port!r}; it must be")):
        serve(counted, port)


def test_stats_that_fail_are_noticed_at_once() -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyError, match="prefill"):
        serve(dict, 0)
    assert set(threading.enumerate()) == before


def test_a_scrape_that_fails_does_not_end_the_server() -> None:
    answers = iter([counted(), {}, counted()])
    with serve(lambda: next(answers), 0) as server:
        with pytest.raises(urllib.error.HTTPError, match="500") as caught:
            scrape(server)
        caught.value.close()
        assert scrape(server)["fapool_faults_total",] == 33


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install fapool-plugin\[metrics\]") as caught:
        serve(counted, 0)
    assert caught.value.name == "prometheus_client"


def test_importing_it_does_not_import_the_library() -> None:
    code = "import sys, fapool_plugin.observe.prometheus; sys.exit('prometheus_client' in sys.modules and 'imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
