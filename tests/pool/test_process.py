"""Processes of pool ranks end, or are left."""

from __future__ import annotations

import signal
import subprocess
from contextlib import ExitStack

import psutil
import pytest

from fapool_plugin.pool.process import end
from tests.launches import until
from tests.strikes import held_main_thread

pytestmark = [pytest.mark.processes, pytest.mark.timeout(30)]


def test_a_process_that_cannot_end_is_not_waited_for() -> None:
    """A debugger has it and does not look: it was killed, and nothing that waits for it is told."""
    with ExitStack() as afterwards:
        process = subprocess.Popen(["sleep", "600"])
        afterwards.callback(process.wait)
        afterwards.callback(process.kill)
        holder = held_main_thread(process.pid, afterwards)
        if holder is None:
            pytest.skip("this machine does not let a process hold a thread of another")
        holder.send_signal(signal.SIGSTOP)
        until(lambda: psutil.Process(holder.pid).status() == psutil.STATUS_STOPPED, 10)
        end(process, 0.0)
        assert process.poll() is None, "it has ended, and the test shows nothing"
    assert process.returncode == -signal.SIGKILL
