"""A stand-in for NIXL: agents of one process that find each other by what they say of themselves, and whose writes are
done when they have been looked at a few times, and not before."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any


class FakeNixl:
    """What all agents share. ``fails``: what calls raise, by their names; ``states``: what a write says instead."""

    def __init__(self) -> None:
        self.agents: weakref.WeakValueDictionary[str, FakeAgent] = weakref.WeakValueDictionary()
        self.made = 0
        self.log: list[str] = []

    def end(self) -> End:
        return End(self)


class End:
    """Makes the agents of one end."""

    def __init__(self, nixl: FakeNixl) -> None:
        self.nixl = nixl
        self.fails: dict[str, str] = {}
        self.state = "DONE"
        """Of a write, once it is done."""
        self.late = 3
        """Looks until then."""
        self.loses = 0
        """Bytes at the end of each write, which ends as it should."""

    def __call__(self, name: str) -> FakeAgent:
        if "agent" in self.fails:
            raise NixlError(self.fails["agent"])
        assert name not in self.nixl.agents, "the name of another life"
        self.nixl.made += 1
        self.nixl.agents[name] = agent = FakeAgent(self, name)
        return agent


class NixlError(Exception):
    """As the library's: no RuntimeError."""


class Writing:
    """A handle."""

    def __init__(self, source: int, target: int, size: int) -> None:
        self.todo, self.looks, self.released = (target, source, size), 0, False

    def release(self) -> None:
        self.released = True


class FakeAgent:
    """One."""

    def __init__(self, end: End, name: str) -> None:
        self.end, self.label = end, name
        self.areas: list[tuple[int, int]] = []
        self.peers: set[str] = set()

    def _called(self, call: str) -> None:
        if call in self.end.fails:
            raise NixlError(self.end.fails[call])

    def register_memory(self, areas: list[tuple[int, int, int, str]], kind: str) -> object:
        self._called("register_memory")
        assert kind == "DRAM"
        self.areas = [(address, size) for address, size, _, _ in areas]
        return object()

    def deregister_memory(self, registered: object) -> None:
        self.areas = []

    def get_agent_metadata(self) -> bytes:
        self._called("get_agent_metadata")
        return b"fake" + self.label.encode().rjust(500)

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self._called("add_remote_agent")
        name = metadata[4:].decode(errors="replace").strip()
        if not metadata.startswith(b"fake") or name not in self.end.nixl.agents:
            raise NixlError("NIXL_ERR_MISMATCH")
        self.peers.add(name)
        return name.encode()

    def remove_remote_agent(self, name: bytes) -> None:
        self.peers.discard(name.decode())

    def get_xfer_descs(self, parts: list[tuple[int, int, int]], kind: str) -> tuple[int, int]:
        assert (len(parts), kind) == (1, "DRAM")
        return parts[0][:2]

    def initialize_xfer(self, what: str, source: tuple[int, int], target: tuple[int, int], peer: bytes) -> Writing:
        self._called("initialize_xfer")
        assert what == "WRITE", "READ is slow"
        assert peer.decode() in self.peers
        there = self.end.nixl.agents.get(peer.decode())
        if there is None:
            raise NixlError("NIXL_ERR_REMOTE_DISCONNECT")
        assert source[1] == target[1]
        for (start, size), agent in ((source, self), (target, there)):
            inside = any(at <= start and start + size <= at + most for at, most in agent.areas)
            if not inside:
                raise NixlError("NIXL_ERR_NOT_FOUND")
        return Writing(source[0], target[0], source[1])

    def transfer(self, writing: Writing) -> str:
        self._called("transfer")
        self.end.nixl.log.append("begun")
        return "PROC"

    def check_xfer_state(self, writing: Writing) -> Any:
        self._called("check_xfer_state")
        assert not writing.released
        writing.looks += 1
        if writing.looks < self.end.late:
            return "PROC"
        if self.end.state == "DONE":
            target, source, size = writing.todo
            ctypes.memmove(target, source, size - self.end.loses)
            self.end.nixl.log.append("done")
        return self.end.state
