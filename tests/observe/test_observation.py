"""What a user asks to be written or served while a model runs: refused at load if it cannot be, complete if it can."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fapool_plugin.integrations.huggingface import profile as huggingface_profile
from fapool_plugin.observe.trace import BASE, pool_row, read
from tests.base.test_advisor import DEAR, LAYERS, LENGTH, kinds, planned, profile_of
from tests.models import greedily, load_pooled, one_thread, plain, random_ids
from tests.thread_pool import ThreadPool


@pytest.fixture(autouse=True)
def _one_thread_of_eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with one_thread():
        yield


def servers() -> list[threading.Thread]:
    """Threads that serve HTTP."""
    return [thread for thread in threading.enumerate() if "serve_forever" in thread.name]


def test_a_trace_that_cannot_be_written_is_told_at_load(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"trace .*missing/trace\.json cannot be written"):
        load_pooled(folder, trace=str(tmp_path / "missing" / "trace.json"))


def test_a_port_in_use_is_told_at_load(folder: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} .*choose another port"):
            load_pooled(folder, metrics_port=port)


def test_a_load_that_fails_leaves_nothing_open(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **keys: object) -> None:
        raise RuntimeError("no pool rank to measure with")

    monkeypatch.setattr(huggingface_profile, "calibrate_model", fail)
    before, path = servers(), tmp_path / "trace.json"
    with pytest.raises(RuntimeError, match="to measure with"):
        load_pooled(folder, threshold="auto", metrics_port=0, trace=str(path))
    assert servers() == before
    assert path.read_text().endswith("]\n"), "the trace was not completed"


def test_the_trace_shows_both_sides_inside_the_forwards(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with planned(folder, profile_of(plain(folder)), trace=str(path), base_share=0.3) as model:
        model.generate(random_ids(1, LENGTH), **greedily(2))  # what comes first is not what is looked at
        began_us = time.perf_counter_ns() // 1000
        model.generate(random_ids(1, LENGTH), **greedily(4))
        ended_us = time.perf_counter_ns() // 1000
    spans = [span for span in read(path) if span.start_ns // 1000 >= began_us]
    assert max(span.stop_ns // 1000 for span in spans) <= ended_us
    assert {span.row for span in spans} == {BASE, pool_row(0)}
    ranks = [span for span in spans if span.row == pool_row(0)]
    assert [span.details["layer"] for span in ranks] == [0, 1] * 4
    assert [span.details["queries"] for span in ranks] == [LENGTH] * LAYERS + [1] * 3 * LAYERS
    assert all(span.details["predicted_ms"] > 0 for span in ranks)
    base = [span for span in spans if span.row == BASE]
    assert {span.name for span in base} == {"linear", "send", "attention", "wait", "merge"}
    assert {span.name for span in base if span.kind == "wait"} == {"wait"}
    for before, after in pairwise(base):
        assert before.stop_ns <= after.start_ns, "the base does one thing after the other"


def test_a_trace_is_completed_without_close(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    model = load_pooled(folder, trace=str(path))
    model.fa_pool.leases.source = ThreadPool
    with torch.no_grad():
        model(random_ids(1, LENGTH))
    assert not path.read_text().endswith("]\n")
    del model
    gc.collect()
    assert path.read_text().endswith("]\n")
    assert {span.row for span in read(path)} == {BASE, pool_row(0), pool_row(1)}


def test_metrics_end_with_their_model(folder: Path) -> None:
    """A served model that is not closed does not live as long as its server."""
    pytest.importorskip("prometheus_client")
    model = load_pooled(folder, metrics_port=0)
    model.fa_pool.leases.source = ThreadPool
    (served,) = [event["reason"] for event in model.fa_pool.stats()["events"] if event["kind"] == "metrics"]
    url = f"http://127.0.0.1:{served.split()[-1]}/metrics"
    with torch.no_grad():
        model(random_ids(1, LENGTH))
    assert "fapool" in urllib.request.urlopen(url, timeout=10).read().decode()
    del model
    gc.collect()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=10)


def test_without_a_profile_the_trace_predicts_nothing(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with planned(folder, activation="length", trace=str(path)) as model, torch.no_grad():
        model(random_ids(1, LENGTH))
        stats = model.fa_pool.stats()
    assert all("predicted_ms" not in span.details for span in read(path))
    assert (stats["prefill"]["predicted_s"], stats["prefill"]["measured_s"]) == (0, 0)
    assert stats["ranks"][0]["predicted_s"] == 0


@pytest.mark.parametrize("link", ["free", "dear"])
def test_predicted_and_measured_seconds_are_counted(folder: Path, link: str) -> None:
    """The first forward's, by hand: what the profile says for whatever was chosen, and less than a clock around it."""
    reference, ids = plain(folder), random_ids(1, LENGTH)
    with planned(folder, profile_of(reference, **({"link": DEAR} if link == "dear" else {}))) as model:
        with torch.no_grad():
            began = time.perf_counter()
            cache = model(ids).past_key_values
            took_s = time.perf_counter() - began
            prefill = model.fa_pool.stats()["prefill"]
            model(ids[:, :1], past_key_values=cache)
        alone_s = 1e-9 * (1 + LENGTH) + LAYERS * (LENGTH + LENGTH**2)
        if link == "dear":
            assert prefill["predicted_s"] == pytest.approx(alone_s)
            assert prefill["base_s"] == {}
        else:
            assert 0 < prefill["predicted_s"] < alone_s
            # What comes before and after the decoder is in one and not in the other.
            assert sum(prefill["base_s"].values()) < took_s
        assert 0 < prefill["measured_s"] < took_s
        decode = model.fa_pool.stats()["decode"]
        assert decode["predicted_s"] > 0
        assert decode["measured_s"] > 0


def test_metrics_are_served_until_the_end(folder: Path) -> None:
    before = servers()
    with planned(folder, activation="length", metrics_port=0) as model, torch.no_grad():
        model(random_ids(1, LENGTH))
        [told] = [event["reason"] for event in model.fa_pool.stats()["events"] if event["kind"] == "metrics"]
        with urllib.request.urlopen(f"http://127.0.0.1:{told.split()[-1]}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        assert f'fapool_attention_calls_total{{phase="prefill",where="pooled"}} {LAYERS}.0' in text
        assert "metrics" in kinds(model)
    assert servers() == before
