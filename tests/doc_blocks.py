"""Code blocks of documents, and what an HTML comment before each says about running it.

Knows Markdown and processes; which documents, and what their blocks need, is the tests'.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARKER = re.compile(r"<!-- (run|file|not run): (.+?) -->")
"""``run: name`` of a block that a test runs, ``file: name`` of one that is a file for those after it, ``not run: why``
of one that no test can run."""
LANGUAGES = ("bash", "python")
SILENT = ("json", "mermaid", "text", "yaml", "diff")
"""Languages of blocks that cannot be run: a marker is possible, not needed."""
# Processes that were told to end get this long to do it.
GRACE_S = 5.0
_TAG = "FAPOOL_DOC_BLOCK"


@dataclass(frozen=True)
class Block:
    """A block of code and its marker."""

    line: int
    """Of the document, where the block begins."""
    language: str
    """"" for an indented block, which is one of commands."""
    text: str
    marker: str = ""
    said: str = ""
    """What the marker says: a name or a reason."""


def blocks(document: str) -> Iterator[Block]:
    """All fenced and indented blocks, in order."""
    lines, at, marker = document.splitlines(), 0, ("", "")
    while at < len(lines):
        line, first = lines[at], at + 1
        fence = re.match(r"\s*(```+|~~~+)\s*(\w*)", line)
        if fence:
            end = next((n for n in range(first, len(lines)) if lines[n].strip() == fence[1]), len(lines))
            yield Block(first, fence[2], textwrap.dedent("\n".join([*lines[first:end], ""])), *marker)
            at, marker = end + 1, ("", "")
        elif line.startswith("    ") and (at == 0 or not lines[at - 1].strip() or marker[0]):
            end = next((n for n in range(at, len(lines)) if lines[n].strip() and lines[n][:4].strip()), len(lines))
            yield Block(first, "", textwrap.dedent("\n".join(lines[at:end])).rstrip() + "\n", *marker)
            at, marker = end, ("", "")
        else:
            said = MARKER.fullmatch(line.strip())
            if said or line.strip():
                marker = (said[1], said[2]) if said else ("", "")
            at += 1


def problems(document: str) -> Iterator[str]:
    """What keeps the blocks of a document from being run, or from being left alone knowingly."""
    found = list(blocks(document))
    markers = sum(bool(MARKER.fullmatch(line.strip())) for line in document.splitlines())
    if markers != (used := sum(bool(block.marker) for block in found)):
        yield f"{markers - used} marker(s) do not stand right before a block"
    for comment in re.findall(r"<!--.*?-->", document, re.DOTALL):
        if re.match(r"<!--\s*(not[ -]?)?(run|file)\b", comment) and not MARKER.fullmatch(comment):
            yield f"{comment} is no marker; write such as <!-- run: name -->"
    names = [block.said for block in found if block.marker == "run"]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{names.count(name)} blocks have the name {name!r}"
    for block in found:
        if block.language not in (*LANGUAGES, *SILENT, ""):
            yield f"line {block.line}: {block.language!r} is none of {', '.join((*LANGUAGES, *SILENT))}"
        elif not block.marker and block.language not in SILENT:
            yield f"line {block.line}: neither run, nor a file, nor is there a reason why not: {block.text[:40]!r}"
        elif block.marker == "run" and block.language in SILENT:
            yield f"line {block.line}: {block.language} cannot be run"


def files(document: str, until: Block) -> dict[str, str]:
    """What the document shows as files before a block, by name."""
    return {one.said: one.text for one in blocks(document) if one.marker == "file" and one.line < until.line}


def run(language: str, text: str, folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a block in a folder, as a reader would who has this Python's environment active. Stdout and stderr come
    together. Raises AssertionError if it takes too long, or leaves processes behind; none is left in any case."""
    if language == "python":
        (folder / "block.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "block.py"]
    else:
        command = ["bash", "-euo", "pipefail", "-c", text]
    tag = secrets.token_hex(8)
    cache = folder / "cache"
    told = {
        "PATH": os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]),
        "XDG_CACHE_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        _TAG: tag,
    }
    output = folder / "output"
    with output.open("w") as out:
        running = subprocess.Popen(
            command,
            cwd=folder,
            env=os.environ | told,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        late = False
        try:
            running.wait(timeout_s)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            left = _end_all(running, tag)
    shown = output.read_text(encoding="utf-8", errors="replace")
    assert not late, f"not done after {timeout_s:g} s:\n{text}\nprinted:\n{shown}"
    assert not left, f"left behind by\n{text}\n{left}\nprinted:\n{shown}"
    return subprocess.CompletedProcess(command, running.returncode, shown)


def _end_all(running: subprocess.Popen[bytes], tag: str) -> list[str]:
    """Ends the block's own process if it still runs, and says which of its descendants had to be ended, too."""
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    deadline = time.monotonic() + GRACE_S
    while (left := _tagged(tag)) and time.monotonic() < deadline:
        time.sleep(0.1)
    told = []
    for process in left:
        try:
            told.append(f"process {process.pid}: {' '.join(process.cmdline())}")
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return told


def _tagged(tag: str) -> list[psutil.Process]:
    """Living processes that inherited this tag."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_TAG) == tag:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found
