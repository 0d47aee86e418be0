"""What is told to a trace is read back, whatever becomes of the writer; busy parts are counted cell by cell."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fapool_plugin.observe.trace import BASE, KINDS, Span, Trace, busy, pool_row, read, summary

ROWS = (BASE, pool_row(0), pool_row(1))
END = 24
"""Times in the properties are cells 0 to END."""


def told(trace: Trace, spans: Iterable[Span]) -> None:
    for span in spans:
        if span.kind == "mark":
            trace.mark(span.row, span.name, span.start_ns, **span.details)
        else:
            kind: Any = span.kind
            trace.span(span.row, span.name, span.start_ns, span.stop_ns, kind=kind, **span.details)


def events(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def several() -> list[Span]:
    spans = [Span(ROWS[n % 3], "attend", KINDS[n % 2], n * 1000, n * 1000 + 5000, {"layer": n}) for n in range(20)]
    return [*spans, Span(BASE, "fault", "mark", 3000, 3000, {"rank": 1}), Span("other", "attend", "compute", 0, 0)]


@st.composite
def some_spans(draw: st.DrawFn) -> Span:
    start, stop = sorted(draw(st.tuples(st.integers(0, END), st.integers(0, END))))
    kind = draw(st.sampled_from((*KINDS, "mark")))
    return Span(
        draw(st.sampled_from(ROWS)), draw(st.sampled_from("ab")), kind, start, start if kind == "mark" else stop
    )


def test_reads_back_what_it_was_told(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        told(trace, several())
    assert read(trace.path) == several()


def test_the_file_is_in_the_trace_event_format(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        trace.span(pool_row(0), "attend", 1_500_000, 4_000_999, layer=7)
        trace.mark(BASE, "fault", 2_000_000)
    process, base, pool, span, mark = events(trace.path)
    assert process == {"ph": "M", "name": "process_name", "pid": 1, "tid": 1, "args": {"name": "FA Pool"}}
    assert (base["ph"], base["name"], base["tid"], base["args"]) == ("M", "thread_name", 1, {"name": "base"})
    assert (pool["ph"], pool["name"], pool["args"]) == ("M", "thread_name", {"name": "pool rank 0"})
    expected = {"ph": "X", "cat": "compute", "name": "attend", "pid": 1, "ts": 1500, "dur": 2500, "args": {"layer": 7}}
    assert span == {**expected, "tid": pool["tid"]}
    assert mark == {"ph": "i", "s": "t", "cat": "mark", "name": "fault", "pid": 1, "tid": 1, "ts": 2000}


@given(spans=st.lists(some_spans(), max_size=15))
def test_spans_of_one_track_never_overlap(tmp_path_factory: pytest.TempPathFactory, spans: list[Span]) -> None:
    scaled = [
        Span(span.row, span.name, span.kind, span.start_ns * 1000, span.stop_ns * 1000, span.details) for span in spans
    ]
    with Trace(tmp_path_factory.mktemp("tracks") / "trace.json") as trace:
        told(trace, scaled)
    assert read(trace.path) == scaled
    tracks: dict[int, list[tuple[int, int]]] = {}
    for event in events(trace.path):
        if event["ph"] == "X":
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for tid, track in tracks.items():
        overlaps = [(one, two) for one, two in pairwise(sorted(track)) if two[0] < one[1]]
        assert not overlaps, f"track {tid}: {overlaps}"


def test_one_span_after_another_stays_on_one_track(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        for start in range(0, 100_000, 700):
            trace.span(BASE, "linear", start, start + 700)
    assert {event["tid"] for event in events(trace.path)} == {1}


def test_more_overlaps_than_lines_are_kept(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        for _ in range(50):
            trace.span(BASE, "linear", 0, 1000)
            trace.span(pool_row(0), "attend", 0, 1000)
    rows = [span.row for span in read(trace.path)]
    assert rows == [BASE, pool_row(0)] * 50, rows


@pytest.mark.parametrize(
    "text", ['"quoted" \\ back', "line\nfeed\ttab", "Größe 長さ", "lone \udc80", "],\n{", ""], ids=ascii
)
def test_any_text_may_be_a_name(tmp_path: Path, text: str) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        trace.span(text, text, 0, 1000, layer=text)
    (span,) = read(trace.path)
    assert (span.row, span.name, span.details) == (text, text, {"layer": text})


def test_names_are_written_without_escapes(tmp_path: Path) -> None:
    """Some readers refuse \\uXXXX."""
    with Trace(tmp_path / "trace.json") as trace:
        trace.span(BASE, "長さ", 0, 1000, layer="Größe")
    text = trace.path.read_text(encoding="utf-8")
    assert "長さ" in text, text
    assert "Größe" in text, text


def test_details_that_json_lacks_become_text(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        trace.span(BASE, "linear", 0, 1000, where=Path("folder"), heads={1: 2}, lanes=(1, 2))
        trace.span(BASE, "linear", 1000, 2000, speed=math.nan, layer=3)
        trace.span(BASE, "linear", 2000, 3000, heads={(1, 2): 3})
    details = [span.details for span in read(trace.path)]
    assert details[0] == {"where": "folder", "heads": {"1": 2}, "lanes": [1, 2]}
    assert details[1:] == [{"speed": "nan", "layer": "3"}, {"heads": "{(1, 2): 3}"}]


def test_a_trace_cut_anywhere_gives_its_whole_spans(tmp_path: Path) -> None:
    with Trace(tmp_path / "whole.json") as trace:
        trace.mark(BASE, "begin", 0)
        start = trace.path.stat().st_size
        told(trace, several())
    text, cut = trace.path.read_bytes(), tmp_path / "cut.json"
    # Every event has a line of its own, and is whole with its last brace.
    ends, offset = [], 0
    for line in text.splitlines(keepends=True):
        if b'"ts"' in line:
            ends.append(offset + len(line.rstrip(b",\n")))
        offset += len(line)
    everything = read(trace.path)
    for length in range(start, len(text) + 1):
        cut.write_bytes(text[:length])
        expected = sum(end <= length for end in ends)
        assert read(cut) == everything[:expected], f"cut at byte {length}: {len(read(cut))} spans, not {expected}"


WRITER = """
import sys, time
from fapool_plugin.observe.trace import Trace
trace = Trace(sys.argv[1])
for count in range(10**9):
    now = time.perf_counter_ns()
    trace.span("base", "linear", now, now, count=count)
"""


@pytest.mark.processes
@pytest.mark.timeout(60)
def test_a_killed_process_leaves_a_readable_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        while not path.exists() or path.stat().st_size < 10**6:
            assert writer.poll() is None, writer.returncode
            time.sleep(0.01)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait(30)
    spans = read(path)
    assert len(spans) > 1000, len(spans)
    assert [span.details["count"] for span in spans] == list(range(len(spans)))


def test_spans_leave_memory_in_blocks(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    for _ in range(5000):
        trace.span(BASE, "linear", 1000, 1000)
    assert 3500 < len(read(trace.path)) < 5000, len(read(trace.path))
    trace.close()
    assert len(read(trace.path)) == 5000


def test_a_slow_writer_is_seen_every_second(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        for second in range(10):
            trace.span(BASE, "linear", second * 10**9, second * 10**9)
            assert len(read(trace.path)) == second + 1


def test_threads_may_write_at_the_same_time(tmp_path: Path) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with Trace(tmp_path / "trace.json") as trace:

            def work(rank: int) -> None:
                for count in range(3000):
                    trace.span(pool_row(rank), "attend", count * 10**7, count * 10**7 + 1000, count=count)

            threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(interval)
    spans = read(trace.path)
    for rank in range(4):
        counts = [span.details["count"] for span in spans if span.row == pool_row(rank)]
        assert counts == list(range(3000)), f"pool rank {rank}: {len(counts)} spans"


@pytest.mark.timeout(30)
def test_writing_may_lead_to_a_mark(tmp_path: Path) -> None:
    """As when the garbage collector ends a sequence in the middle of a flush."""

    class Ending:
        def __str__(self) -> str:
            trace.mark(BASE, "ended", 0)
            return "ended"

    with Trace(tmp_path / "trace.json") as trace:
        for _ in range(3000):
            trace.span(BASE, "linear", 0, 0, sequence=Ending())
    names = [span.name for span in read(trace.path)]
    assert names.count("linear") == 3000
    assert names.count("ended") > 0


@pytest.mark.parametrize("where", ["missing/trace.json", ".", "/dev/full"])
def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path: Path, where: str) -> None:
    path = tmp_path / where
    with pytest.raises(OSError, match="cannot be written") as caught:
        Trace(path)
    assert str(path) in str(caught.value)
    assert caught.value.errno


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.span(BASE, "linear", 0, 1000)
    assert trace._file is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, trace._file.fileno())
    os.close(full)
    with pytest.warns(RuntimeWarning, match=r"trace\.json ends here.*No space left"):
        trace.span(BASE, "linear", 2 * 10**9, 2 * 10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.span(BASE, "linear", 4 * 10**9, 4 * 10**9)
        trace.close()
    assert len(read(trace.path)) == 1


def test_close_is_harmless_when_repeated_and_ends_the_trace(tmp_path: Path) -> None:
    trace = Trace(tmp_path / "trace.json")
    trace.close()
    trace.close()
    trace.span(BASE, "linear", 0, 1000)
    trace.mark(BASE, "fault", 10**12)
    assert read(trace.path) == []
    assert len(events(trace.path)) == 2


def test_refuses_spans_that_make_no_sense(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        with pytest.raises(ValueError, match="'linear' of base stops at 5 ns, before its start at 6"):
            trace.span(BASE, "linear", 6, 5)
        with pytest.raises(ValueError, match="kind 'sleep'; it must be one of compute, wait"):
            trace.span(BASE, "linear", 5, 6, kind="sleep")  # type: ignore[arg-type]
    assert read(trace.path) == []


@pytest.mark.parametrize("text", ["", "hello", "{}", "[1]", '{"traceEvents": []}', '[{"ph": "X"}]', "[{},\n{}]"])
def test_refuses_files_of_another_sort(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a trace of FA Pool") as caught:
        read(path)
    assert str(path) in str(caught.value)


def cells(spans: list[Span], row: str, names: Iterable[str]) -> set[int]:
    """The unit cells in which a row computes, one by one."""
    return {
        cell
        for span in spans
        if span.row == row and span.kind == "compute" and span.name in names
        for cell in range(span.start_ns, span.stop_ns)
    }


WINDOWS = st.tuples(st.integers(-3, END), st.integers(1, END)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(spans=st.lists(some_spans(), max_size=12), window=WINDOWS, names=st.sampled_from(["a", "b", "ab", ""]))
def test_busy_is_the_union_of_compute_spans(spans: list[Span], window: tuple[int, int], names: str) -> None:
    for row in ROWS:
        expected = len(cells(spans, row, names) & set(range(*window))) / (window[1] - window[0])
        found = busy(spans, row, window, names)
        assert abs(found - expected) < 1e-12, f"{row}: {found}, counted {expected}, off by {abs(found - expected)}"


@given(spans=st.lists(some_spans(), max_size=12))
@example([Span(BASE, "a", "compute", 0, 2), Span(ROWS[1], "a", "compute", 1, 1)])
def test_summary_counts_from_the_first_to_the_last_compute_span(spans: list[Span]) -> None:
    computing = [span for span in spans if span.kind == "compute"]
    first = min([span.start_ns for span in computing], default=0)
    last = max([span.stop_ns for span in computing], default=0)
    found = summary(spans)
    assert list(found) == list(dict.fromkeys(span.row for span in spans))
    for row, use in found.items():
        expected = cells(spans, row, "ab")
        part = len(expected) / (last - first) if last > first else 0.0
        assert abs(use.part - part) < 1e-12, f"{row}: {use.part}, counted {part}, off by {abs(use.part - part)}"
        assert use.part == busy(spans, row)
        idle = [cell for start, stop in use.gaps for cell in range(start, stop)]
        assert idle == [cell for cell in range(first, last) if cell not in expected], row
        assert all(one[1] < two[0] for one, two in pairwise(use.gaps)), use.gaps
        longest = max((stop - start for start, stop in use.gaps), default=0)
        assert use.longest_gap_s == longest / 1e9


def test_summary_of_a_file(tmp_path: Path) -> None:
    with Trace(tmp_path / "trace.json") as trace:
        trace.span(BASE, "linear", 1_000_000, 5_000_000)
        trace.span(BASE, "reply", 5_000_000, 9_000_000, kind="wait")
        trace.span(pool_row(0), "attend", 3_000_000, 9_000_000)
    found = summary(str(trace.path))
    assert {row: use.part for row, use in found.items()} == {BASE: 0.5, pool_row(0): 0.75}
    assert found[BASE].gaps == ((5_000_000, 9_000_000),)
    assert found[pool_row(0)].gaps == ((1_000_000, 3_000_000),)
    assert found[pool_row(0)].longest_gap_s == 0.002
    assert busy(trace.path, "pool rank 7") == 0
    assert summary(trace.path, (3_000_000, 5_000_000))[BASE].part == 1


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="from 5 to 5 ns is empty"):
        busy([], BASE, (5, 5))
    with pytest.raises(ValueError, match="from 5 to 4 ns is empty"):
        summary([], (5, 4))
