"""Memory of this process that a process on another machine writes to, by NIXL: RDMA, or what else UCX finds on the way.

    name ── told the other end ──▶ opened there
    theirs ── WRITE ──▶ the other end's ``mine``; waited for, as long as the link's patience

Each end of a link has an agent for that link alone: what ends with a link ends with its agent, and the name of one that
is gone is never used again (nixl#2109). WRITE, as READ is slow (vllm#52607); NIXL has no deadlines (nixl#2047). Host
memory, as NIXL's thread has no context of CUDA and may end its process with memory of a device (nixl#2102). That thread
takes part in the other end's writes, and sleeps until something comes. Knows no messages.

Nothing is encrypted, and who is at the other end of an agent's connection can write to any of this process's memory.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import secrets
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import torch

from fapool_plugin.wire.messages import LinkLost, body_memory
from fapool_plugin.wire.ring import RING_BYTES, Memory

Agents = Callable[[str], Any]
"""Makes an agent of this name: what ``nixl_agent`` is."""
_NUMBERS = struct.Struct("<qqq")
_KIND = "DRAM"
_SLEEPS_US = 20_000
"""NIXL's thread wakes up so often where nothing comes, as told by events. Its own default, 0, keeps a core busy."""
_OPENING_S = 1.5
"""A write is given up after so long where nothing has been agreed on yet: a base waits little longer for an answer."""
_LOOKS, _LOOK_S = 50, 50e-6
"""A write is looked for so often without a pause, then with one of so many seconds."""


def agents() -> Agents:
    """Those of the installed package. Raises ImportError, which says what is missing."""
    try:
        from nixl import _bindings
        from nixl._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise ImportError(f"NIXL is not here ({error}): pip install '.[nixl]'") from error
    logging.getLogger("nixl").setLevel(logging.WARNING)  # else each agent is greeted on standard output

    def made(name: str) -> Any:
        agent = nixl_agent(name, nixl_agent_config(backends=[], enable_prog_thread=False))
        config = _bindings.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _SLEEPS_US  # which nixl_agent_config cannot say
        agent.agent = _bindings.nixlAgent(name, config)
        agent.create_backend("UCX")
        return agent

    return made


def windows() -> Callable[[float], Window]:
    """Makes a link's, told the link's patience in seconds. Raises ImportError."""
    return partial(Window, agents(), RING_BYTES)


class Window:
    """One end's memory, and its way to the other's.

    Args:
        agents: makes its agent.
        size: of either ring, in bytes.
        timeout_s: after which a write is given up, once it is agreed that this carries bodies.

    Raises:
        RuntimeError: no agent or no memory is to be had.
    """

    def __init__(self, agents: Agents, size: int, timeout_s: float) -> None:
        self.size, self._timeout_s, self._owner = size, timeout_s, os.getpid()
        self._limit_s = min(timeout_s, _OPENING_S)
        self.nonce, self.their_nonce = secrets.randbits(62), 0
        """Of what this end's ring is tried with, and the other end's."""
        self._pages = _kept(size)
        self.mine = Memory(np.frombuffer(self._pages, dtype=np.uint8))
        self.theirs = Memory(np.frombuffer(body_memory(size), dtype=np.uint8))
        """What is written here goes there."""
        self._peer: Any = None
        self._address = 0
        """Of the other end's ring, in its process."""
        try:
            self._agent = agents(f"fapool-{secrets.token_hex(16)}")
        except Exception as error:
            raise RuntimeError(f"NIXL made no agent: {_told(error)}") from error
        areas = [(memory.address, size, 0, "") for memory in (self.mine, self.theirs)]
        self._registered = self._asked("register_memory", areas, _KIND)

    def name(self) -> torch.Tensor:
        """How the other end opens it: bytes. Raises RuntimeError."""
        told = _NUMBERS.pack(self.size, self.mine.address, self.nonce) + self._asked("get_agent_metadata")
        return torch.tensor(list(told), dtype=torch.uint8, device="cpu")

    def open(self, name: torch.Tensor) -> None:
        """Finds the other end's. Raises RuntimeError if it cannot be reached, LinkLost if that is no such name."""
        told = bytes(name.tolist())
        if len(told) <= _NUMBERS.size:
            raise LinkLost(f"offers memory by {len(told)} bytes")
        size, self._address, self.their_nonce = _NUMBERS.unpack_from(told)
        if size != self.size or not 0 < self._address < 2**63 - size or self.their_nonce < 0:
            raise LinkLost(f"offers {size} bytes at {self._address}, and {self.size} were asked for")
        self._peer = self._asked("add_remote_agent", told[_NUMBERS.size :])

    def agreed(self) -> None:
        """From now on this carries bodies, and writes have the link's patience."""
        self._limit_s = self._timeout_s

    def begin(self, start: int, nbytes: int) -> Any:
        """Begins to write these bytes of ``theirs`` to the other end. Raises RuntimeError."""
        source = self._asked("get_xfer_descs", [(self.theirs.address + start, nbytes, 0)], _KIND)
        target = self._asked("get_xfer_descs", [(self._address + start, nbytes, 0)], _KIND)
        writing = self._asked("initialize_xfer", "WRITE", source, target, self._peer)
        self._asked("transfer", writing)
        return writing

    def wait(self, writing: Any) -> None:
        """Until they are there. Raises RuntimeError if that fails, or takes too long."""
        looks, deadline = 0, time.monotonic() + self._limit_s
        while (state := self._asked("check_xfer_state", writing)) == "PROC":
            looks += 1
            if time.monotonic() > deadline:
                raise RuntimeError(f"a write by NIXL was not done within {self._limit_s:g} s")
            if looks > _LOOKS:
                time.sleep(_LOOK_S)
        if state != "DONE":
            raise RuntimeError(f"a write by NIXL ended as {state}")
        with suppress(Exception):
            writing.release()

    def close(self) -> None:
        """The agent ends, and what it may still be writing. In a forked child there is nothing to do."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        if os.getpid() != self._owner:
            _keep(agent)  # it would wait for a thread that is its parent's
            return
        with suppress(Exception):
            if self._peer is not None:
                agent.remove_remote_agent(self._peer)
        with suppress(Exception):
            agent.deregister_memory(self._registered)
        self._pages.madvise(mmap.MADV_DONTNEED)

    def __del__(self) -> None:
        if getattr(self, "_agent", None) is not None:
            self.close()

    def _asked(self, call: str, *arguments: Any) -> Any:
        """What its agent says. Raises RuntimeError: the library's errors have a kind for each."""
        try:
            return getattr(self._agent, call)(*arguments)
        except Exception as error:
            raise RuntimeError(f"NIXL's {call} failed: {_told(error)}") from error


def _kept(size: int) -> mmap.mmap:
    """Host memory at addresses that this process uses for nothing else while it lives: an end that was lost by mistake
    may still be writing there. What is not used of it takes no memory."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _keep(memory)
    return memory


def _keep(thing: object) -> None:
    """It is never freed."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _told(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
