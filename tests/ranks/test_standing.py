"""A standing rank by itself, without Ray: what is left of one that was killed, and who removes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fapool_plugin import FAPoolConfig
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.observe.metrics import RankCounters
from fapool_plugin.ranks.linked import linked
from fapool_plugin.ranks.own_folder import OwnFolder
from fapool_plugin.ranks.standing import StandingRank
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Op
from fapool_plugin.wire.sockets import connect
from tests.launches import until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(60)]
SETTINGS = FAPoolConfig(pool="ray", memory_limit_mib=64).to_dict()
RANK = "from fapool_plugin.ranks.standing import StandingRank\nrank = StandingRank({settings!r})\n"
FOLDER = "from fapool_plugin.ranks.own_folder import OwnFolder\nfolder = OwnFolder()\n(folder.path / 'one').touch()\n"
TOLD = "print({told}, flush=True)\nimport time\ntime.sleep(60)"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder for this test's processes alone; its path is short, as sockets need."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(folder)


@contextmanager
def another(code: str, told: str) -> Iterator[tuple[int, str]]:
    """(process id, what it tells) of another process that runs this code, until it is killed."""
    command = [sys.executable, "-c", code + TOLD.format(told=told)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.pid, process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_folder_of_a_killed_owner_goes_when_the_next_is_made(place: Path) -> None:
    strange = place / "fapool-rank-file"
    strange.touch()
    with another(FOLDER, "folder.path") as (pid, told):
        mine = OwnFolder(str(place))
        assert {path.name for path in place.iterdir()} == {strange.name, mine.path.name, Path(told).name}, "both live"
        os.kill(pid, signal.SIGKILL)
    assert Path(told).is_dir(), "nothing runs beside an owner"
    next_one = OwnFolder(str(place))
    assert {path.name for path in place.iterdir()} == {strange.name, mine.path.name, next_one.path.name}
    for folder in (mine, mine, next_one):
        folder.remove()
    assert list(place.iterdir()) == [strange]


def test_what_a_killed_standing_rank_leaves_is_removed_by_the_next(place: Path) -> None:
    with another(RANK.format(settings=SETTINGS), "rank.described()['pid']") as (pid, worker):
        assert psutil.pid_exists(int(worker))
        os.kill(pid, signal.SIGKILL)
    (left,) = place.iterdir()
    until(lambda: not psutil.pid_exists(int(worker)), 20, lambda: "the worker of a killed rank ends")
    rank = StandingRank(SETTINGS)
    assert not left.exists(), sorted(left.iterdir())
    assert len(list(place.iterdir())) == 1, "its own folder"
    rank.leave(0.0)
    assert not list(place.iterdir()), "a rank that leaves leaves nothing"


def test_a_rank_says_who_has_its_lease(place: Path) -> None:
    rank, loop, config = StandingRank(SETTINGS), Loop(), FAPoolConfig.load(SETTINGS)
    try:
        until(lambda: rank.described()["state"] == "free", 20, lambda: "the rank stands")
        said = rank.described()
        assert (said["job"], said["leased_s"]) == ("", 0.0)
        link = linked(connect(said["addresses"][0], 5.0), loop, config, 0, said["pid"])
        borrowed = PoolRank(0, link, 1, RankCounters(0))
        assert borrowed.open()
        until(lambda: rank.described()["state"] == "leased", 5, lambda: "the lease is told of")
        assert rank.described()["job"] == f"pid {os.getpid()}"
        borrowed.tell(Op.RELEASE)
        until(lambda: rank.described()["state"] == "free", 5, lambda: "it is free again")
        assert rank.described()["job"] == ""
        link.close()
    finally:
        loop.close()
        rank.leave(0.0)
