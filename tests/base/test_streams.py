"""The order of work on streams, written down by a stand-in: packed, own share launched, copied, waited for, sent. And
exact results where memory is filled no sooner than its copy has been waited for, on the base and on pool ranks.

No GPU is needed, and nothing is proved about one but the order in which it is asked.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fapool_plugin.base import gradients
from fapool_plugin.base.lease import PoolRank
from fapool_plugin.base.resource_manager import ResourceManager
from fapool_plugin.config import FAPoolConfig
from fapool_plugin.devices.copies import Copies
from fapool_plugin.kernels import lanes
from fapool_plugin.plan.shares import Geometry
from fapool_plugin.pool.exchange import Inbox
from fapool_plugin.pool.worker import Worker
from fapool_plugin.wire.link import Link
from fapool_plugin.wire.messages import Header, Message, Op, dtype_code, float_bits
from fapool_plugin.wire.sockets import pair
from tests.base.test_attention import Stream, check, dense
from tests.base.test_gradients import inputs, pooled
from tests.blocks import in_blocks
from tests.models import assert_close, eager, random_ids, save_model
from tests.recorded_streams import Recorder, Ticks
from tests.thread_pool import ThreadPool, two_loops

GPU = torch.device("cuda:0")


class RecordedPool(ThreadPool):
    """Ranks that copy, and tell time, as on a device."""

    def acquire(self, announce: Callable[[str], object], base: torch.device = GPU) -> dict[int, Link]:
        links = super().acquire(announce, base)
        for worker in self.workers.values():
            if worker.copies is None:
                worker.copies, worker.clock._events = Copies(Recorder()), Ticks(0.001)
                worker.clock.move_to(GPU)
        return links


@contextmanager
def recorded(**keys: Any) -> Iterator[tuple[ResourceManager, Recorder]]:
    config = FAPoolConfig(threshold=0, kv_block=4, memory_limit_mib=64, **keys)
    with ResourceManager(config, RecordedPool) as manager:
        recorder = Recorder()
        manager.copies = Copies(recorder)
        yield manager, recorder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recorder], None]:
    """Writes down what the host launches and sends, too."""

    def into(recorder: Recorder) -> None:
        for module, name in ((lanes, "attend"), (gradients, "attend_backward")):
            real = getattr(module, name)

            def launched(*args: Any, real: Any = real, **keys: Any) -> Any:
                recorder.log.append("own share")
                return real(*args, **keys)

            monkeypatch.setattr(module, name, launched)
        ask = PoolRank.ask

        def sent(rank: PoolRank, *args: Any) -> int:
            recorder.log.append("sent")
            return ask(rank, *args)

        monkeypatch.setattr(PoolRank, "ask", sent)

    return into


def in_order(log: list[str]) -> list[str]:
    """Without how many tensors a message has, nor tiles a share."""
    kept = [line for line in log if line not in ("copy", "memory kept for copy")]
    return [line for at, line in enumerate(kept) if not at or line != kept[at - 1] or line == "sent"]


def test_a_calls_order(told: Callable[[Recorder], None]) -> None:
    with recorded(pool_ranks=2) as (manager, recorder), torch.no_grad():
        told(recorder)
        got, want = Stream(manager, (0, 3)).call(30)
        check(got, want, 2e-5)
        assert in_order(recorder.log) == [
            "copy waits for compute", "event 1 on copy",
            "copy waits for compute", "event 2 on copy",
            "own share",
            "host waits for event 1", "sent",
            "host waits for event 2", "sent",
            # Answers: the host waits for none, and what comes in has a stream of its own.
            "event 3 on copy 2", "compute waits for event 3", "memory kept for compute",
            "event 4 on copy 2", "compute waits for event 4", "memory kept for compute",
        ]  # fmt: skip


def test_a_backwards_order(told: Callable[[Recorder], None]) -> None:
    with recorded(pool_ranks=1) as (manager, recorder):
        told(recorder)
        q, k, v, _ = inputs(1, 20)
        out = pooled(manager, Geometry((0,), (20,), 0, 20))(q, k, v)
        recorder.log.clear()
        out.sum().backward()
        last = [line for line in in_order(recorder.log) if "event" not in line]
        assert last == ["copy waits for compute", "own share", "sent", "memory kept for compute"]


def test_no_stream_is_current_where_blocks_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    with recorded(pool_ranks=1) as (manager, recorder), torch.no_grad():
        begin = manager.begin
        monkeypatch.setattr(
            manager, "begin", lambda *a, **k: replace(begin(*a, **k), hand_over=lambda: seen.append([*recorder.inside]))
        )
        Stream(manager, (0,)).call(30)
    assert seen == [[]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranks", [1, 3])
def test_prompts_chunks_and_steps_are_exact(ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    with recorded(pool_ranks=ranks, reduction="tree") as (manager, recorder), torch.no_grad():
        stream = Stream(manager, (0, 0, 5, 0), dtype)
        for new in (30, 9, 1, 1, 13, 1):
            check(*stream.call(new), 3e-2 if dtype == torch.bfloat16 else 2e-5)
        assert manager.stats()["faults"] == 0
        assert manager.stats()["decode"]["pooled_calls"] > 0
        assert sum("host waits" in line for line in recorder.log) >= 6


@pytest.mark.parametrize("residency", [False, True])
def test_gradients_are_exact(residency: bool) -> None:
    with recorded(pool_ranks=2, training_residency=residency) as (manager, _):
        q, k, v, _ = inputs(2, 25)
        geometry = Geometry((0, 4), (25, 25), 0, 25)
        dout = torch.randn(2, 25, q.shape[1], v.shape[3], dtype=torch.float64)
        pooled(manager, geometry)(q, k, v).backward(dout)
        got = [x.grad for x in (q, k, v)]
        wanted: list[Tensor] = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        dense(wanted[0], wanted[1], wanted[2], geometry, q.shape[3] ** -0.5, 0.0, None).backward(dout)
        for name, ours, theirs in zip("qkv", got, wanted, strict=True):
            assert ours is not None
            assert theirs.grad is not None
            difference = (ours - theirs.grad).abs().max().item()
            assert difference < 1e-10, f"d{name}: largest difference {difference:.3g}"
        assert manager.stats()["backward"]["pooled_calls"] == 1


@pytest.mark.parametrize("kv_home", ["base", "pool"])
def test_a_model_in_blocks(tmp_path: Path, kv_home: str) -> None:
    folder, ids = save_model("llama", tmp_path, max_position_embeddings=1024), random_ids(2, 300)
    reference = eager(folder)
    with in_blocks(folder, 4, pool_ranks=2, kv_home=kv_home) as model, torch.no_grad():
        model.fa_pool.leases.source, model.fa_pool.copies = RecordedPool, Copies(Recorder())
        got, want = model(ids), reference(ids)
        assert_close(got.logits, want.logits)
        token = ids[:, :1]
        for _ in range(3):
            ours = model(token, past_key_values=got.past_key_values).logits
            assert_close(ours, reference(token, past_key_values=want.past_key_values).logits)
        stats = model.fa_pool.stats()
        assert stats["prefill"]["overlapped_forwards"] == 1
        assert (stats["faults"], stats["decode"]["pooled_forwards"]) == (0, 3)
        assert all(rank["compute_s"] > 0 for rank in stats["ranks"])


def test_the_next_request_is_launched_before_the_last_answer_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests wait in a rank's queue: the second is under way when the first one's answer is waited for."""
    recorder, sent = Recorder(), list[Message]()
    with two_loops() as (base_loop, pool_loop):
        base, end = pair()
        link = Link(base, base_loop, name="rank", timeout_s=5.0, asks=True)
        inbox = Inbox(pool_loop, 1.0)
        worker = Worker(inbox, 2**20, torch.device("cpu"))
        worker.copies, worker.clock._events, worker.lease.token = Copies(recorder), Ticks(0.001), 7
        worker.clock.move_to(GPU)
        real = worker.attend

        def attend(message: Message) -> Any:
            recorder.log.append(f"launched {message.header.call}")
            return real(message)

        monkeypatch.setattr(worker, "attend", attend)
        own = worker.link(end, 5.0)
        ask = own.send

        def send(header: Header, *rest: Any) -> None:
            if header.op == Op.ATTEND:
                recorder.log.append(f"sent {header.call}")
            ask(header, *rest)

        monkeypatch.setattr(own, "send", send)
        for call in (1, 2):
            link.send(*one_query(call))
        assert pool_loop.wait(lambda: len(inbox._waiting) == 2, lambda: time.monotonic() + 10)
        thread = threading.Thread(target=worker.serve, args=([own],))
        thread.start()
        sent += [link.receive(10), link.receive(10)]
        link.close()
        thread.join(10)
    kept = [line for line in recorder.log if "launched" in line or "sent" in line or "host" in line]
    assert kept == [
        "launched 1", "launched 2", "host waits for event 2", "sent 1", "host waits for event 4", "sent 2",
    ]  # fmt: skip
    coming = ["event 1 on copy", "compute waits for event 1"]
    assert [line for line in recorder.log if line in coming] == coming, "computed before it was there"
    for message in sent:
        out, lse = message.tensors
        assert (out - 3).abs().max() < 1e-6, "of one key the value"
        assert lse.isfinite().all()
        assert message.header.extra > 0


def one_query(call: int) -> tuple[Header, list[Tensor]]:
    """One query of one lane against one key, whose value is 3."""
    header = Header(
        op=Op.ATTEND, token=7, call=call, tiles=1, group=1, head_dim=4, v_head_dim=4, q_elements=4, k_elements=4,
        v_elements=4, dtype=dtype_code(torch.float32), scale_bits=float_bits(1.0),
    )  # fmt: skip
    table = torch.tensor([[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0]])
    return header, [table, torch.ones(4), torch.ones(4), torch.full((4,), 3.0)]
