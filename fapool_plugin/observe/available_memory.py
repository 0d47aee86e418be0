"""Memory that is left: to all processes of a job together, by machine and control groups, and to one by its own limits.

In a container or a batch job the machine's free memory is not what a process gets. Knows Linux's files; elsewhere only
the machine's answer counts.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil

GROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self")


def left_for_job(groups: Path = GROUPS, process: Path = PROCESS) -> int:
    """Bytes, at least 0, that this process and those it starts may take together.

    Args:
        groups: where control groups are mounted, of version 1 or 2.
        process: the folder of this process in /proc.
    """
    return max(0, min((psutil.virtual_memory().available, *_left_in_groups(groups, process))))


def left_for_process(process: Path = PROCESS) -> int:
    """Bytes, at least 0, that ``ulimit -d`` and ``ulimit -v`` leave to this process; without them more than any machine
    has."""
    return max(0, min((sys.maxsize, *_left_of_limits(process))))


def _left_in_groups(groups: Path, process: Path) -> Iterator[int]:
    """What each control group around this process has left; page cache that it may drop is not counted as used."""
    for line in _text(process / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, limit, usage, cache = groups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage = groups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        inside = PurePosixPath(path.lstrip("/"))
        # In a container the path may be that of the host; then the group mounted at the root is the container's.
        for folder in {root / part for part in (inside, *inside.parents)}:
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdigit() and used.isdigit():
                counts = dict(entry.split() for entry in _text(folder / "memory.stat").splitlines())
                yield int(most) - int(used) + int(counts.get(cache, 0))


def _left_of_limits(process: Path) -> Iterator[int]:
    taken = dict(line.split(":", 1) for line in _text(process / "status").splitlines() if line.startswith("Vm"))
    for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY and used in taken:
            yield most - int(taken[used].split()[0]) * 1024


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return ""
