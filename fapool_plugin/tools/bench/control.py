"""What the base does for a pooled call beside attention: plan, requests, answers. Its pool ranks only pretend.

Their links lead nowhere and are answered at once with zeros, or are real socketpairs to a process that does the same.
Heads are as short as they can be, so that what is measured grows with rows, heads and ranks, and not with bytes.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fapool_plugin.base.attention import FAPoolAttention
from fapool_plugin.base.forward import Forward
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.base.sequence import SequenceState
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.observe.metrics import Phase
from fapool_plugin.observe.timeline import ATTENTION
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.loop import Loop
from fapool_plugin.wire.messages import Header, LinkLost, Message, Op, Payload, Status
from fapool_plugin.wire.sockets import pair
from fapool_plugin.wire.terms import Terms

Over = Literal["nowhere", "sockets"]
WAYS: tuple[Over, ...] = ("nowhere", "sockets")
_BUDGETS_MS = {"plan_ms": 5.0, "call_ms": 1.0}
"""For 1,024 rows x 32 heads x 40 ranks, with links that lead nowhere; attention of a step takes 8 to 25 ms there."""
_MEMORY = 2**50
"""Bytes that each rank says it has."""


@dataclass(frozen=True)
class Setting:
    """A batch of equal rows, and how it is pooled."""

    rows: int
    kv_heads: int
    layers: int
    ranks: int
    tokens: int
    steps: int
    """Forwards of each phase that are measured, after one that is not."""


class Measured(NamedTuple):
    """Milliseconds of the base, medians over layers and forwards; attention that it computes itself is left out."""

    plan_ms: float
    """The plan of a forward."""
    first_ms: float
    """The first layer's call, which works out what the plan asks of each rank."""
    call_ms: float
    """Every other layer's call."""
    cpu_ms: float
    """The same in processor time of the calling thread: over sockets the rest is waiting."""


def measure(setting: Setting, over: Over, told: Callable[[str, int, int | None], object]) -> dict[str, Measured]:
    """By phase, prefill and decode. ``told`` hears of progress: what, forwards done, of how many."""
    told(f"links {over}", 0, None)
    make = _nowhere if over == "nowhere" else _sockets
    with torch.no_grad(), make(setting.ranks) as links:
        config = FAPoolConfig(pool_ranks=setting.ranks, base_share=0.0, blocks=1, threshold=0, activation="length")
        manager, threads = ResourceManager(config, lambda _: _Pretending(links)), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found = _phases(setting, manager, lambda done: told(f"links {over}", done, 2 * setting.steps + 2))
            stats = manager.stats()
            if stats["faults"] or any(stats[phase]["local_calls"] for phase in found):
                raise RuntimeError(f"not every call was pooled: {stats['local_reasons']}, {stats['events']}")
            return found
        finally:
            torch.set_num_threads(threads)
            manager.close()


def show(setting: Setting, found: dict[Over, dict[str, Measured]]) -> None:
    """Prints a line for each way and phase."""
    title = f"Control of {setting.rows} rows x {setting.kv_heads} heads x {setting.ranks} ranks, ms"
    table = Table("over", "phase", "plan", "first call", "call", "its processor time", box=box.SIMPLE_HEAD, title=title)
    for over, phases in found.items():
        for phase, measured in phases.items():
            table.add_row(over, phase, *(f"{value:.2f}" for value in measured))
    table.caption = f"budget: plan {_BUDGETS_MS['plan_ms']:g}, call {_BUDGETS_MS['call_ms']:g}, nowhere"
    Console().print(table)


def write(path: Path, setting: Setting, found: dict[Over, dict[str, Measured]]) -> None:
    """Everything as JSON."""
    measured = {over: {phase: one._asdict() for phase, one in phases.items()} for over, phases in found.items()}
    values = {"bench": "control", "options": asdict(setting), "budgets_ms": _BUDGETS_MS, "measured": measured}
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _phases(setting: Setting, manager: ResourceManager, told: Callable[[int], object]) -> dict[str, Measured]:
    layers = [FAPoolAttention(manager, n, setting.layers, stands_for="") for n in range(setting.layers)]
    shape, most = (setting.rows, setting.kv_heads), setting.tokens + setting.steps + 1
    q, k, v = (torch.zeros(*shape, most, 1) for _ in range(3))
    found: dict[str, list[Measured]] = {"prefill": [], "decode": []}
    state = SequenceState()

    def forward(phase: Phase, start: int, stop: int) -> list[Measured]:
        geometry = Geometry((0,) * setting.rows, (stop,) * setting.rows, start, stop)
        decided = manager.begin(phase, stop, lambda: geometry, state)
        try:
            began = time.perf_counter()
            decided.plan(setting.kv_heads, 8, setting.layers)
            plan_ms = (time.perf_counter() - began) * 1e3
            # Heads first, as models hand them over; a step's queries are made in every layer.
            new = q[:, :, start:stop].transpose(1, 2).contiguous().transpose(1, 2)
            first, *calls = [_call(layer, decided, new, k[:, :, :stop], v[:, :, :stop]) for layer in layers]
            return [Measured(plan_ms, first[0], *call) for call in calls]
        finally:
            manager.end(decided)

    for step in range(2 * setting.steps + 2):
        if step <= setting.steps:
            state = SequenceState(prompt_columns=setting.tokens, capacity=most)
            measured = "prefill", forward("prefill", 0, setting.tokens)
        else:
            past = setting.tokens + step - setting.steps - 1
            measured = "decode", forward("decode", past, past + 1)
        if step not in (0, setting.steps + 1):  # each phase's first warms it
            found[measured[0]] += measured[1]
        told(step + 1)
    return {
        name: Measured(*(statistics.median(column) for column in zip(*all_, strict=True)))
        for name, all_ in found.items()
    }


def _call(layer: FAPoolAttention, decided: Forward, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, float]:
    """Milliseconds on the clock, and of the processor, without the base's own attention."""
    spent = decided.counters.phase(decided.phase).base_s
    own, wall, cpu = spent.get(ATTENTION, 0.0), time.perf_counter(), time.thread_time()
    layer(q, k, v, decided=decided, resident=True)
    own = spent.get(ATTENTION, 0.0) - own
    return (time.perf_counter() - wall - own) * 1e3, max(0.0, time.thread_time() - cpu - own) * 1e3


def _answer(asked: Header) -> Header | None:
    """What a rank would answer, were all that it computes 0; None to a message that has no answer."""
    if asked.op == Op.HELLO:
        return asked._replace(status=Status.OK, extra=_MEMORY)
    if asked.op != Op.ATTEND:
        return None
    lses = asked.q_elements // asked.head_dim
    return asked._replace(status=Status.OK, q_elements=lses * asked.v_head_dim, lse_elements=lses, extra=0)


class _Link:
    """A link to nowhere."""

    timeout_s, is_local, address = 5.0, True, ""

    def __init__(self) -> None:
        self.terms = Terms(True, 0, lambda process, ended: None)
        self.carrier = self.terms.carrier
        self.lost: str | None = None
        self.check: Callable[[Header], object] = lambda header: None
        self.bytes_sent = self.bytes_received = 0
        self._asked: deque[Header] = deque()
        self._zeros = torch.zeros(0)

    def send(self, header: Header, tensors: Payload = (), attached: None = None, *, answer_bytes: int = 0) -> None:
        if answer := _answer(header):
            self._asked.append(answer)

    def receive(self, stall_s: float) -> Message:
        answer = self._asked.popleft()
        self.check(answer)
        if self._zeros.numel() < answer.q_elements:
            self._zeros = torch.zeros(answer.q_elements)
        return Message(answer, [self._zeros[: answer.q_elements], self._zeros[: answer.lse_elements]])


def _serve(ends: Sequence[socket.socket]) -> None:
    """The other process: answers every request with zeros, until the links are closed."""
    torch.set_num_threads(1)
    loop, waiting = Loop(), deque[tuple[Link, Message | LinkLost]]()
    alive = {Link(end, loop, name="", timeout_s=60, asks=False, into=waiting.append) for end in ends}
    while alive:
        loop.wait(lambda: waiting)
        link, message = waiting.popleft()
        if isinstance(message, LinkLost):
            alive.discard(link)
        elif answer := _answer(message.header):
            zeros = torch.zeros(answer.q_elements), torch.zeros(answer.lse_elements)
            with suppress(LinkLost):
                link.send(answer, () if answer.op == Op.HELLO else zeros)


@contextmanager
def _nowhere(ranks: int) -> Iterator[dict[int, Any]]:
    yield {number: _Link() for number in range(ranks)}


@contextmanager
def _sockets(ranks: int) -> Iterator[dict[int, Any]]:
    pairs, loop = [pair() for _ in range(ranks)], Loop()
    ends = [end.fileno() for _, end in pairs]
    other = subprocess.Popen([sys.executable, "-m", __name__, *map(str, ends)], pass_fds=ends)
    try:
        for _, end in pairs:
            end.close()
        links = {n: Link(end, loop, name=str(n), timeout_s=5.0, asks=True) for n, (end, _) in enumerate(pairs)}
        for link in links.values():
            link.wait_until_heard(60.0)
        yield links
        for link in links.values():
            link.close()
    finally:
        for end, _ in pairs:
            end.close()
        loop.close()
        try:
            other.wait(10)
        finally:
            other.kill()
            other.wait()


class _Pretending:
    """A pool of such links."""

    look, said = None, ()

    def __init__(self, links: dict[int, Any]) -> None:
        self._links = links

    def new_token(self) -> int:
        return 1

    def acquire(self, announce: Callable[[str], object], base: torch.device) -> dict[int, Any]:
        return self._links

    def discard(self, rank: int, reason: str) -> str:
        return f"pool rank {rank}: {reason}"

    def close(self) -> None:
        """Its links are others'."""


if __name__ == "__main__":
    _serve([socket.socket(fileno=int(number)) for number in sys.argv[1:]])
