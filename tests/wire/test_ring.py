"""Memory that two processes map: sealed or refused, without a name, and no two slots in one place."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fapool_plugin.wire.descriptor import Descriptor
from fapool_plugin.wire.messages import LinkLost
from fapool_plugin.wire.ring import Ring, Slots

SIZE = 2**16


def test_what_one_process_writes_the_other_reads() -> None:
    mine, made = Ring.made(SIZE)
    theirs = Ring(made)
    theirs.part(100, 8)[:] = np.arange(8, dtype=np.uint8)
    assert mine.part(100, 8).tolist() == list(range(8))


@pytest.mark.parametrize("size", [0, SIZE // 2, 2 * SIZE])
def test_the_other_end_can_make_it_neither_smaller_nor_larger(size: int) -> None:
    """An access beyond the end of mapped memory would kill this process."""
    mine, made = Ring.made(SIZE)
    with pytest.raises(PermissionError):
        os.ftruncate(made.fileno(), size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(made.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    assert mine.part(SIZE - 1, 1).tolist() == [0]


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW])
def test_memory_that_can_still_change_its_size_is_refused(seals: int) -> None:
    made = Descriptor(os.memfd_create("test", os.MFD_ALLOW_SEALING))
    os.ftruncate(made.fileno(), SIZE)
    fcntl.fcntl(made.fileno(), fcntl.F_ADD_SEALS, seals)
    with pytest.raises(LinkLost, match="seals"):
        Ring(made)


def test_what_is_no_such_memory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with (tmp_path / "file").open("r+b") as file, socket.socket() as sock:
        for descriptor in (file.fileno(), sock.fileno()):
            with pytest.raises(LinkLost, match="cannot be mapped"):
                Ring(Descriptor(os.dup(descriptor)))
    for size in (0, 2**40):
        made = Descriptor(os.memfd_create("test", os.MFD_ALLOW_SEALING))
        os.ftruncate(made.fileno(), size)
        fcntl.fcntl(made.fileno(), fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        with pytest.raises(LinkLost, match="offers"):
            Ring(made)


@pytest.mark.parametrize(
    ("start", "length"), [(-1, 8), (0, 0), (0, -8), (SIZE - 7, 8), (SIZE, 1), (2**62, 2**62), (0, SIZE + 1)]
)
def test_there_is_no_part_outside_of_it(start: int, length: int) -> None:
    ring, _ = Ring.made(SIZE)
    with pytest.raises(LinkLost, match="speaks of"):
        ring.part(start, length)


def test_it_has_no_name_and_ends_with_the_last_who_maps_it() -> None:
    before = sorted(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))
    rings = [Ring.made(SIZE) for _ in range(4)]
    maps = Path("/proc/self/maps")
    assert maps.read_text().count("fapool ring") == 4
    assert sorted(os.listdir("/dev/shm")) == before[0]
    del rings
    assert maps.read_text().count("fapool ring") == 0
    assert (sorted(os.listdir("/dev/shm")), len(os.listdir("/proc/self/fd"))) == before


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60), st.integers(0, 5))
def test_slots_never_overlap_and_room_is_found_where_there_is_some(steps: list[tuple[bool, int]], first: int) -> None:
    """Against a map of every byte."""
    start, size = 64 * first, 2048
    slots, used, taken = Slots(start, size), np.zeros(size, dtype=bool), dict[int, int]()
    for takes, number in steps:
        if takes or not taken:
            at = slots.take(number)
            free = [place for place in range(0, size - number + 1, 64) if not used[place : place + number].any()]
            assert (at is not None) == bool(free), f"{number} bytes: took {at}, free are {free}"
            if at is not None:
                assert at - start == free[0], "the lowest place, which is still mapped"
                used[at - start : at - start + number] = True
                taken[at] = number
        else:
            at = sorted(taken)[number % len(taken)]
            slots.give(at)
            used[at - start : at - start + taken.pop(at)] = False
