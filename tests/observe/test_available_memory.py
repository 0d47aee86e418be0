"""Memory that is left, from files of control groups as the kernel writes them, and from limits really set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from fapool_plugin.observe.available_memory import left_for_job, left_for_process

MIB = 2**20


def group(folder: Path, version: int, limit: str, used: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, str(used)), strict=True):
        (folder / name).write_text(f"{value}\n")
    entry = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"anon {used - cache}\n{entry} {cache}\n")


@pytest.fixture
def process(tmp_path: Path) -> Path:
    folder = tmp_path / "self"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        available = 64 * 2**30

    monkeypatch.setattr(psutil, "virtual_memory", Machine)


def test_the_tightest_group_counts_and_cache_does_not(tmp_path: Path, process: Path) -> None:
    (process / "cgroup").write_text("0::/job/step\n")
    group(tmp_path / "job", 2, str(500 * MIB), 450 * MIB, cache=100 * MIB)
    group(tmp_path / "job" / "step", 2, "max", 400 * MIB)
    assert left_for_job(tmp_path, process) == 150 * MIB
    group(tmp_path / "job" / "step", 2, str(420 * MIB), 400 * MIB)
    assert left_for_job(tmp_path, process) == 20 * MIB
    group(tmp_path / "job" / "step", 2, str(420 * MIB), 430 * MIB)
    assert left_for_job(tmp_path, process) == 0


@pytest.mark.parametrize("path", ["/", "/docker/of-the-host"])
def test_the_group_that_a_container_sees(tmp_path: Path, process: Path, path: str) -> None:
    (process / "cgroup").write_text(f"5:devices:/x\n4:cpu,memory:{path}\n0::/\n")
    group(tmp_path / "memory", 1, str(300 * MIB), 100 * MIB, cache=10 * MIB)
    assert left_for_job(tmp_path, process) == 210 * MIB


def test_without_groups_the_machine_counts(tmp_path: Path, process: Path) -> None:
    assert left_for_job(tmp_path, process) == 64 * 2**30
    assert left_for_process(process) == sys.maxsize


@pytest.mark.parametrize("limit", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_limits_of_the_process(limit: str) -> None:
    script = (
        "import resource\n"
        "from fapool_plugin.observe.available_memory import left_for_job, left_for_process\n"
        "before = left_for_job()\n"
        f"resource.setrlimit(resource.{limit}, (2**30, 2**30))\n"
        "left = left_for_process()\n"
        "assert left_for_job() > before / 2, 'a limit of one process counted for all'\n"
        "held = bytearray(left - 2**25)\n"
        "try:\n"
        "    more = bytearray(2**26)\n"
        "except MemoryError:\n"
        "    print(left)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert 0 < int(ran.stdout or 0) < 2**30, f"{ran.stdout!r}: more could be taken than was said to be left"
