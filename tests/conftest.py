"""What holds for the whole test run: its threads, and that nothing is left behind when it ends.

It knows no test, but has what many need: a thread, a tiny model. Fixtures for pool ranks live with the tests that
start them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings

from fapool_plugin.integrations.huggingface import calibrate as huggingface_calibrate

SHARED_MEMORY = Path("/dev/shm")
# Processes that were told to end get this long to do it.
GRACE_S = 5.0


def pytest_sessionstart(session: pytest.Session) -> None:
    torch.set_num_threads(2)
    # How long an example takes says how busy the machine is.
    settings.register_profile("fapool", deadline=None)
    settings.load_profile("fapool")


@pytest.fixture(scope="session", autouse=True)
def _profiles_are_not_the_users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Profiles that tests measure are not kept where the user's are."""
    folder = tmp_path_factory.mktemp("profiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_calibrate, "user_cache_dir", lambda name: str(folder))
        yield


@pytest.fixture
def one_thread_each() -> Iterator[None]:
    """Torch with one thread, for tests of tiny models."""
    from tests.models import one_thread  # loads transformers, which not all tests need

    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama; files about another model have a fixture of this name of their own."""
    from tests.models import save_model

    return save_model("llama", tmp_path_factory.mktemp("llama"))


def child_processes() -> list[str]:
    """Living descendants of this process, without the helper that multiprocessing keeps for itself."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = " ".join(child.cmdline())
        except psutil.ZombieProcess:
            command = "(ended, never waited for)"
        except psutil.NoSuchProcess:
            continue
        if "multiprocessing.resource_tracker" not in command:
            found.append(f"process {child.pid}: {command}")
    return found


def shared_memory_files() -> list[str]:
    return sorted(str(path) for path in SHARED_MEMORY.glob("*"))


def left_behind(shared_memory_before: list[str]) -> list[str]:
    return child_processes() + [file for file in shared_memory_files() if file not in shared_memory_before]


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails the run when processes or shared memory of its own outlive the last test."""
    before = shared_memory_files()
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := left_behind(before)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, "left behind by the tests:\n" + "\n".join(left)


@pytest.fixture
def none_left() -> Iterator[None]:
    """Fails a test that leaves processes behind."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
    psutil.wait_procs(left, 5)
    left = [c.pid for c in left if c.is_running()]
    assert not left, f"processes left behind: {left}"
