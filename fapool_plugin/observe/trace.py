"""Who computed when: a file that chrome://tracing and Perfetto show as rows, one for the base and one a pool rank.

Spans are told to it, it measures nothing; it does not know what they are spans of.

The file is in the Trace Event Format, as a JSON array with one event a line. Of that format's liberties one counts
here: the closing bracket may be missing, so what a process wrote before it died can still be shown and read.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TextIO

BASE = "base"
Kind = Literal["compute", "wait"]
KINDS: tuple[Kind, ...] = ("compute", "wait")

_BLOCK = 1024
"""Events kept in memory before they are written."""
_FLUSH_NS = 10**9
"""A killed process loses about this much at most."""
_LINES = 16
"""Lines of one row; only overlapping spans need more than one."""
# Some readers do not know the escape \uXXXX.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=str).encode


def pool_row(rank: int) -> str:
    """The row of a pool rank, by its number in the pool."""
    return f"pool rank {rank}"


@dataclass(frozen=True)
class Span:
    """From ``start_ns`` to ``stop_ns`` on the base's ``time.perf_counter_ns``, in whole microseconds."""

    row: str
    name: str
    kind: str
    """"compute" or "wait"; "mark" for an instant, which starts where it stops."""
    start_ns: int
    stop_ns: int
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Busy:
    """One row inside a window: how much of it was computing, and when it was not."""

    part: float
    """Between 0 and 1."""
    gaps: tuple[tuple[int, int], ...]
    """(start_ns, stop_ns) of every idle stretch, in order; they and the computing fill the window."""

    @property
    def longest_gap_s(self) -> float:
        """Seconds."""
        return max((stop - start for start, stop in self.gaps), default=0) / 1e9


class Trace:
    """Writes a trace; a context manager. Any thread may call it; spans come in any order.

    A full disk must not end a forward: a trace that cannot be written any more warns once and stays as it is.

    Args:
        path: overwritten if it exists. Raises an OSError that names it if it cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        # Re-entrant: the garbage collector may end a sequence, and tell of it, while this thread writes.
        self._lock = threading.RLock()
        self._events: list[tuple[str, str, Kind | None, int, int, dict[str, Any]]] = []
        self._flush_at_ns = 0
        self._rows: dict[str, _Row] = {}
        self._file: TextIO | None = None
        try:
            # A lone surrogate in a name becomes a JSON escape instead of an error.
            self._file = open(self.path, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            self._file.write('[\n{"ph":"M","name":"process_name","pid":1,"tid":1,"args":{"name":"FA Pool"}}')
            self._write([self._open_row(BASE)])
        except OSError as error:
            self._drop_file()
            told = f"the trace {self.path} cannot be written ({error.strerror}): name a file in a folder that exists"
            raise OSError(error.errno, f"{told} and has room for it") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def span(self, row: str, name: str, start_ns: int, stop_ns: int, *, kind: Kind = "compute", **details: Any) -> None:
        """Adds a span; ignored after :meth:`close`.

        Args:
            row: :data:`BASE` or :func:`pool_row`.
            name: what was done, the same for all spans of its sort; what tells them apart belongs into ``details``.
            start_ns: on the base's ``time.perf_counter_ns``.
            stop_ns: likewise; not before ``start_ns``.
            kind: "compute", or "wait" for time in which the row does nothing else.
            details: shown with the span; JSON values, anything else as its str().
        """
        if stop_ns < start_ns:
            raise ValueError(f"span {name!r} of {row} stops at {stop_ns} ns, before its start at {start_ns} ns")
        if kind not in KINDS:
            raise ValueError(f"span {name!r} of {row} is of kind {kind!r}; it must be one of {', '.join(KINDS)}")
        self._add((row, name, kind, start_ns, stop_ns, details))

    def mark(self, row: str, name: str, at_ns: int, **details: Any) -> None:
        """Adds an instant, such as a fault; arguments as in :meth:`span`."""
        self._add((row, name, None, at_ns, at_ns, details))

    def close(self) -> None:
        """Writes what is left and completes the file. Harmless when repeated."""
        with self._lock:
            self._flush(end="\n]\n")
            self._drop_file()

    def _add(self, event: tuple[str, str, Kind | None, int, int, dict[str, Any]]) -> None:
        with self._lock:
            self._events.append(event)
            if len(self._events) >= _BLOCK or event[4] >= self._flush_at_ns:
                self._flush_at_ns = event[4] + _FLUSH_NS
                self._flush()

    def _flush(self, end: str = "") -> None:
        events, self._events = self._events, []
        if self._file is None:
            return
        lines: list[str] = []
        for row, name, kind, start_ns, stop_ns, details in events:
            if row not in self._rows:
                lines.append(self._open_row(row))
            # Whole microseconds: readers that round start and length apart would see neighbours overlap.
            start, stop = start_ns // 1000, stop_ns // 1000
            if kind is None:
                head, tid = '"cat":"mark","ph":"i","s":"t"', self._rows[row].first_tid
            else:
                head, tid = f'"cat":"{kind}","ph":"X","dur":{stop - start}', self._place(row, start, stop, lines)
            args = f',"args":{_as_json(details)}' if details else ""
            lines.append(f'{{{head},"ts":{start},"pid":1,"tid":{tid},"name":{_encode(name)}{args}}}')
        try:
            self._write(lines, end)
        except OSError as error:
            self._drop_file()
            warnings.warn(f"fa_pool: the trace {self.path} ends here: {error}", RuntimeWarning, stacklevel=2)

    def _place(self, row: str, start: int, stop: int, lines: list[str]) -> int:
        """Viewers drop spans that overlap on one line, so a row gets more of them as needed."""
        free_from = self._rows[row].free_from
        at = next((at for at, free in enumerate(free_from) if free <= start), len(free_from))
        if at == _LINES:
            at -= 1
        elif at == len(free_from):
            lines.append(self._open_line(row))
        free_from[at] = stop
        return self._rows[row].first_tid + at

    def _open_row(self, row: str) -> str:
        self._rows[row] = _Row(len(self._rows) * _LINES + 1)
        return self._open_line(row)

    def _open_line(self, row: str) -> str:
        lines = self._rows[row]
        tid = lines.first_tid + len(lines.free_from)
        lines.free_from.append(-1)
        return f'{{"ph":"M","name":"thread_name","pid":1,"tid":{tid},"args":{{"name":{_encode(row)}}}}}'

    def _drop_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _write(self, lines: list[str], end: str = "") -> None:
        assert self._file is not None
        self._file.write("".join([f",\n{line}" for line in lines]) + end)
        self._file.flush()


@dataclass
class _Row:
    first_tid: int
    free_from: list[int] = field(default_factory=list)
    """Where the last span of each line ends, in microseconds."""


def _as_json(details: dict[str, Any]) -> str:
    try:
        return _encode(details)
    except (TypeError, ValueError):
        # Keys of another type, or a NaN, which JSON does not have.
        return _encode({name: str(value) for name, value in details.items()})


def read(path: str | os.PathLike[str]) -> list[Span]:
    """All spans and marks of a trace, in the file's order; of one whose writer died, those that are whole.

    Raises ValueError, naming ``path``, if it is no such trace.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        events = _array(text)
        rows = {event["tid"]: event["args"]["name"] for event in events if event.get("name") == "thread_name"}
        return [_span(event, rows) for event in events if event["ph"] in ("X", "i")]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a trace of FA Pool ({error!r})") from None


def _array(text: str) -> list[dict[str, Any]]:
    # Whole; without its bracket; with half an event at its end.
    for whole in (text, text.rstrip(",\n") + "]", text[: text.rfind(",\n")] + "]"):
        try:
            events = json.loads(whole)
        except ValueError:
            continue
        if isinstance(events, list):
            return events
    raise ValueError("it is no JSON array")


def _span(event: dict[str, Any], rows: dict[int, str]) -> Span:
    start, length = event["ts"] * 1000, event.get("dur", 0) * 1000
    return Span(rows[event["tid"]], event["name"], event["cat"], start, start + length, event.get("args", {}))


def busy(
    source: str | os.PathLike[str] | Iterable[Span],
    row: str,
    window: tuple[int, int] | None = None,
    names: Collection[str] | None = None,
) -> float:
    """The part of a window, between 0 and 1, in which a row computes.

    Args:
        source: a trace's path, or its spans. Spans that overlap count once; waits and marks do not count.
        row: a row that has no spans is never busy.
        window: (start_ns, stop_ns); without it, from the first to the last compute span of any row.
        names: only spans with these names count, all if None.
    """
    spans = _spans(source)
    return _use([span for span in spans if span.row == row], _checked(window) or _window(spans), names).part


def summary(source: str | os.PathLike[str] | Iterable[Span], window: tuple[int, int] | None = None) -> dict[str, Busy]:
    """Every row of a trace, in the order in which they appear; arguments as in :func:`busy`."""
    spans = _spans(source)
    window = _checked(window) or _window(spans)
    rows = dict.fromkeys(span.row for span in spans)
    return {row: _use([span for span in spans if span.row == row], window) for row in rows}


def _spans(source: str | os.PathLike[str] | Iterable[Span]) -> list[Span]:
    return read(source) if isinstance(source, (str, os.PathLike)) else list(source)


def _checked(window: tuple[int, int] | None) -> tuple[int, int] | None:
    if window is not None and window[1] <= window[0]:
        raise ValueError(f"the window from {window[0]} to {window[1]} ns is empty; it must stop after its start")
    return window


def _window(spans: list[Span]) -> tuple[int, int]:
    computing = [span for span in spans if span.kind == "compute"]
    return (
        min((span.start_ns for span in computing), default=0),
        max((span.stop_ns for span in computing), default=0),
    )


def _use(spans: list[Span], window: tuple[int, int], names: Collection[str] | None = None) -> Busy:
    first, last = window
    gaps, free = [], first
    for span in sorted(spans, key=lambda span: span.start_ns):
        if span.kind != "compute" or span.start_ns == span.stop_ns or (names is not None and span.name not in names):
            continue
        if free < (until := min(span.start_ns, last)):
            gaps.append((free, until))
        free = max(free, span.stop_ns)
    if free < last:
        gaps.append((free, last))
    idle = sum(stop - start for start, stop in gaps)
    return Busy(1 - idle / (last - first) if last > first else 0.0, tuple(gaps))
